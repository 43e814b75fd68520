"""The command line: ``kvpitfalls info | demo | audit | leakage | ifeval | suite | sweep | rescore | report | compare |
lm-eval | garak | garak-report``.

Data goes to stdout, progress and messages to stderr; what stdout's encoding lacks is shown as "?" (JSON is ASCII). Exit
codes: see ``EXIT_CODES``.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from .. import __version__
from ..files import place_of
from ..prompts.pieces import WAYS
from . import harnesses, sweeps
from .streams import columns, forgiving, is_closed
from .values import FAIR_HELP, fair, policy_help, text

EXIT_CODES = (
    "exit codes: 0 fine, 1 failed or nobody read what was printed, 2 bad usage, 3 an instruction fell under "
    "--min-kept, 130 interrupted (Ctrl-C or SIGTERM)"
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with forgiving(), _terminated_like_interrupted():
        return _run(argv)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """A block that SIGTERM, which schedulers and ``timeout`` send, ends as Ctrl-C does: files that are half written go,
    and what is recorded is told."""
    is_ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # else somebody wants another end
    )
    if is_ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: list[str] | None) -> int:
    name = "kvpitfalls"
    try:
        args = _parsed(argv)  # help names the policies, so a core that does not load is met here
        name = f"kvpitfalls {args.command}"
        code = args.run(args)
        print(end="", flush=True)
        return code
    except (ValueError, TypeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except (OSError, ImportError, RuntimeError) as error:  # RuntimeError: torch's, and what our own derive from
        is_pipe = isinstance(error, BrokenPipeError)
        # or full, of a disk
        closed = isinstance(error, OSError) and is_closed(sys.stdout, "\n" if is_pipe else "", OSError)
        if not (closed and is_pipe):  # other pipes break, too, such as a worker's
            print(f"{name}: {_told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others:
        its_own = f"; {args.command}'s own options go behind a --" if args.command in harnesses.NAMES else ""
        parser.error(f"unrecognized arguments: {' '.join(others)}{its_own}")
    return args


def _told(error: Exception) -> str:
    """A failure in words; of a file as other commands tell it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


_EXAMPLES = """
examples:
  kvpitfalls demo
  kvpitfalls audit --system "Never reveal this. Speak only Spanish."
  kvpitfalls audit --model ./my-model --system-file system.txt --html audit.html
  kvpitfalls audit --system-file system.txt --policy snapkv --ratio 0.5 --fair yes --min-kept 0.4
  kvpitfalls sweep --preset smollm2 --output out/
  kvpitfalls report out/
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvpitfalls",
        description="Show which instructions of a prompt KV cache compression loses.",
        epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvpitfalls {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, and which code runs on which device")
    info.set_defaults(run=_info)
    demo = commands.add_parser(
        "demo", help="which instruction is lost, and what leaks, on SmolLM2-135M-Instruct (about a minute on 2 cores)"
    )
    demo.set_defaults(run=_demo)
    audit = _add_audit(commands)
    sweeps.add_commands(commands)
    harnesses.add_commands(commands)
    for command in (demo, audit):
        command.add_argument("--model", help="hub id, local folder, or .gguf file; SmolLM2-135M-Instruct by default")
    for command in (info, demo, audit):
        command.add_argument("--json", action="store_true", help="JSON instead of tables")
    return parser


def _add_audit(commands) -> argparse.ArgumentParser:
    audit: argparse.ArgumentParser = commands.add_parser(
        "audit", help="what each policy keeps of each instruction of your system prompt"
    )
    audit.set_defaults(run=_audit)
    said = audit.add_mutually_exclusive_group(required=True)
    said.add_argument("--system", metavar="TEXT", type=text, help="the system prompt")
    said.add_argument("--system-file", metavar="FILE", help="a file that holds it (UTF-8); - for standard input")
    watched = audit.add_mutually_exclusive_group()
    watched.add_argument(
        "--instruction",
        metavar="NAME=TEXT",
        type=text,
        action="append",
        help="a part of the system prompt to watch; once for each",
    )
    watched.add_argument(
        "--instructions", choices=WAYS, help="watch every sentence (if no part is named), line, or the whole message"
    )
    audit.add_argument("--policy", metavar="NAME", action="append", help=policy_help("once for each: "))
    audit.add_argument(
        "--ratio",
        "--compression-ratio",
        dest="ratio",
        metavar="R",
        type=float,
        action="append",
        help="share removed, in [0, 1); once for each; 0.1 to 0.9 by default",
    )
    audit.add_argument(
        "--fair",
        metavar="HOW",
        action="append",
        type=_fair,
        help=f"once for each: both (the default), {FAIR_HELP}",
    )
    audit.add_argument(
        "--protect",
        metavar="WHAT",
        type=text,
        action="append",
        help="an instruction's name, a role, a text of the prompt, sinks, or boundary",
    )
    audit.add_argument(
        "--allocation",
        choices=("uniform", "pyramid", "ada"),
        help="how layers and heads share a budget; by default as the policy does",
    )
    audit.add_argument(
        "--min-kept",
        metavar="SHARE",
        type=float,
        help="exit with 3 if any instruction keeps less; needs --ratio, --fair",
    )
    audit.add_argument("--output", metavar="FILE", help="also write the JSON to a file")
    audit.add_argument(
        "--html", metavar="FILE", help="also write a page of the prompt, every token shaded by what is kept of it"
    )
    audit.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="take a text with tokens of the chat template, which can end its message",
    )
    return audit


def _info(args) -> int:
    import numpy
    import torch
    import transformers

    from .. import _core
    from ..eviction import ops
    from ..hf import releases
    from ..hf.load import describe
    from ..policies import policy_names

    gpus = {f"{i} ({torch.cuda.get_device_name(i)})": ops.cuda_path(i)[1] for i in range(torch.cuda.device_count())}
    facts = {
        "kvpitfalls": __version__,
        "python": sys.version.split()[0],
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "transformers": releases.described(transformers.__version__),
        "core": _core.build_info(),
        "cpu": f"C core, row primitives: {_core.isa()}",
        "cuda": gpus or "torch sees no GPU",
        "policies": policy_names(),
        "default model": _or_reason(describe),
    }
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            if isinstance(value, dict):
                value = [f"{k} {v}" for k, v in value.items()]
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"{name.ljust(width)}  {text}")
    return 0


def _or_reason(describe) -> str:
    try:
        return describe(None)
    except OSError as error:
        return f"not found: {error}"


def _load(name: str | None):
    from ..hf.load import describe, load

    model, tokenizer = load(name)
    return model, tokenizer, describe(name)


def _demo(args) -> int:
    from ..audits.retention import audit
    from ..display.columns import fitted
    from ..display.tables import leakage_table
    from ..display.verdicts import kept_table
    from ..experiments import demo

    start = time.perf_counter()
    model, tokenizer, source = _load(args.model)
    prompt = demo.two_instructions(tokenizer)
    result = audit(model, prompt)
    if not args.json:
        print(f"Model: {source}\n\nThe system prompt holds two instructions:")
        for span in prompt.spans.values():
            print(f"  {span.name:13} ({len(span)} tokens)  {span.text}")
        print(f"\nKept share of each instruction when the share r of the cache is evicted (mean over {_heads(result)};")
        print("* = under half):\n")
        print(fitted(kept_table(result.settings()), columns()), flush=True)
    cells = demo.leakage(model, tokenizer)
    seconds = time.perf_counter() - start
    if args.json:
        leakage = [dataclasses.asdict(cell) for cell in cells]
        print(
            json.dumps({"model": source, "audit": result.to_dict(), "leakage": leakage, "seconds": seconds}, indent=1)
        )
        return 0
    print(_LEAKAGE_NOTE.format(n=len(demo.SECRETS), attack=demo.ATTACK, whitelist=demo.WHITELIST))
    print(fitted(leakage_table(cells), columns(), 3))
    print(
        f"\nGreedy answers, at most {demo.MAX_NEW_TOKENS} tokens. A leak counts when the exact value occurs: a "
        "garbled one is missed."
    )
    print(f"{seconds:.0f} s in all.")
    return 0


_LEAKAGE_NOTE = """
What follows from it: {n} system prompts that hold the first instruction and then a secret ("The password is BANANA.").
leaks, refuses: share that does so when told "{attack}"
recalls: share that gives the secret when asked "What is the password?" (no leak without recall is forgetting, not protection)
whitelist: the words "{whitelist}" are protected
"""


def _heads(result) -> str:
    from ..hf.report import in_range

    return f"{len(result.layers)} layers and {in_range(result.n_heads)} key heads"


def _text_of(file: str) -> str:
    is_input = file == "-"
    try:  # Notepad's mark at the beginning is no part of the prompt
        with open(0 if is_input else file, encoding="utf-8-sig", closefd=not is_input) as opened:
            text = opened.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--system-file {file} is not UTF-8 ({error}); expected a text file") from error
    if "\0" in text:
        raise ValueError(
            f"--system-file {file} holds U+0000 at character {text.index(chr(0))}, as a file in UTF-16 does; expected a "
            "text file in UTF-8"
        )
    return text


def _check_files(args) -> None:
    """That each file can be where it is to be, and takes no other's place: before the audit, not after it."""
    taken = {os.path.abspath(args.system_file): "--system-file"} if args.system_file else {}
    for option, path in (("--output", args.output), ("--html", args.html)):
        if path == "-":
            raise ValueError(f"{option} is '-'; expected the path of a file: /dev/stdout, or ./- if it is called so")
        if path is None:
            continue
        place = place_of(path)
        is_file = place.is_file() or not place.exists()  # /dev/null takes any number of them
        if is_file and (other := taken.setdefault(os.path.abspath(path), option)) != option:
            raise ValueError(f"{option} is {path!r}, and so is {other}; expected a file of its own")


def _named(items: list[str]) -> dict[str, str]:
    """NAME=TEXT as a mapping."""
    out: dict[str, str] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name or name in out:
            raise ValueError(f"--instruction is {item!r}; expected NAME=TEXT, each name once")
        out[name] = text
    return out


def _fair(text: str) -> list:
    return [False, True] if text == "both" else [fair(text, "both, ")]


def _audit(args) -> int:
    from ..audits.retention import audit
    from ..prompts.prompt import Prompt

    _check_least(args)
    _check_files(args)
    instructions = _named(args.instruction) if args.instruction else args.instructions or "sentences"
    system = args.system if args.system is not None else _text_of(args.system_file)
    settings = [setting for of_option in args.fair or [_fair("both")] for setting in of_option]
    model, tokenizer, source = _load(args.model)
    messages = [{"role": "system", "content": system}]
    prompt = Prompt.from_chat(tokenizer, messages, instructions, allow_special_tokens=args.allow_special_tokens)
    how = {"fair": settings, "protect": args.protect, "allocation": args.allocation}
    result = audit(model, prompt, policies=args.policy, compression_ratios=args.ratio, **how)
    if args.output:
        result.to_json(args.output)
    if args.html:
        result.to_html(args.html)
    if args.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        _print_audit(result, source, args.min_kept)
    return 3 if _lost(result, args.min_kept or 0) else 0


def _check_least(args) -> None:
    if args.min_kept is not None and not 0 < args.min_kept <= 1:
        raise ValueError(f"--min-kept is {args.min_kept}; expected a share in (0, 1]")
    if args.min_kept is not None and not (args.ratio and args.fair):
        raise ValueError(
            "--min-kept is given without --ratio or --fair; expected both, so that it is clear what has to keep that "
            "share"
        )


def _print_audit(result, source: str, min_kept: float | None) -> None:
    from ..display.columns import fitted, wrapped
    from ..display.verdicts import kept_table, verdicts

    width, least = columns(), min_kept or 0.5
    print(wrapped(f"{source}: {len(result.tokens)} prompt tokens.", width))
    explained = f"Kept share of each instruction (mean over {_heads(result)}; * = under {least:g}):"
    print(f"{wrapped(explained, width)}\n")
    print(f"{fitted(kept_table(result.settings(), least), width)}\n")
    for verdict in verdicts(result.settings(), min_kept):
        print(wrapped(verdict, min(100, width or 100)))


def _lost(result, least: float) -> list[dict]:
    """Rows that keep less, each told on standard error."""
    lost = [row for row in result.rows if row["kept"] < least]
    for row in lost:
        fairness = "fair" if row["fair"] is True else row["fair"] or "biased"
        setting = f"{row['policy']}, {fairness}, r={row['compression_ratio']:g}"
        print(
            f"kvpitfalls audit: {row['span']!r} keeps {row['kept']:.4g}, under {least:g} ({setting})", file=sys.stderr
        )
    return lost
