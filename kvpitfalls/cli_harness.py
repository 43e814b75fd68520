"""The command that runs lm-eval on a compressed cache: ``kvpitfalls lm-eval``."""

import argparse

_USAGE = """\
kvpitfalls lm-eval --policy snapkv --compression-ratio 0.5 [--fair] [...] -- --tasks ifeval --apply_chat_template [lm-eval's own options]

What follows the -- goes to lm-eval run as it is. Its task kvpitfalls_ifeval has the rows of kvpitfalls ifeval."""


def add_commands(commands) -> None:
    """Add the command to the parser of :mod:`kvpitfalls.cli`."""
    lm_eval = commands.add_parser("lm-eval", help="lm-eval's own command line on a compressed cache", usage=_USAGE)
    lm_eval.set_defaults(run=_lm_eval)
    lm_eval.add_argument("--model", metavar="NAME", help="hub id, folder or .gguf file; SmolLM2-135M-Instruct by default")
    lm_eval.add_argument("--policy", metavar="NAME", required=True)
    amount = lm_eval.add_mutually_exclusive_group(required=True)
    amount.add_argument("--compression-ratio", metavar="R", type=float, help="share removed, in [0, 1); at 0 this is lm-eval's hf")
    amount.add_argument("--budget", metavar="N", type=int, help="tokens kept of each prompt")
    lm_eval.add_argument("--fair", metavar="LAMBDA", nargs="?", const=True, default=False, type=_strength, help="or paper")
    lm_eval.add_argument("--protect", metavar="WHAT", action="append", help="an instruction's name, a text of every prompt, or 'sinks'")
    lm_eval.add_argument("--compress", choices=("prompt", "system"), default="prompt", help="the whole prompt, or its system message only")
    lm_eval.add_argument(
        "--instructions", metavar="WHAT", default="sentences", help="sentences (default), lines, messages, or a JSON file: name -> text"
    )
    lm_eval.add_argument("arguments", metavar="...", nargs="*", help=argparse.SUPPRESS)


def _strength(text: str) -> float | str:
    return text if text == "paper" else float(text)


def _lm_eval(args) -> int:
    from .harness.lm_eval_command import run

    names = ("policy", "compression_ratio", "budget", "fair", "protect", "compress", "instructions")
    given = {name: value for name in names if (value := getattr(args, name)) is not None and value is not False}
    given |= {} if args.model is None else {"pretrained": args.model}
    return run(given, args.arguments)
