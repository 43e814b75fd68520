"""The commands that run other people's harnesses on a compressed cache: ``kvpitfalls lm-eval | garak |
garak-report``."""

import argparse
import json

from .streams import columns
from .values import FAIR_HELP, fair, policy_help, text

NAMES = ("lm-eval", "garak")  # commands that hand on what stands behind a --
_LM_EVAL = """\
kvpitfalls lm-eval --policy snapkv --compression-ratio 0.5 [--fair] [...] -- --tasks ifeval --apply_chat_template [lm-eval's own options]

What follows the -- goes to lm-eval run as it is. Its task kvpitfalls_ifeval has the rows of kvpitfalls ifeval."""
_GARAK = """\
kvpitfalls garak --policy snapkv --compression-ratio 0.5 [--fair] [...] -- --probes sysprompt_extraction [garak's own options]

What follows the -- goes to garak as it is. garak pins what it needs, and so wants an environment of its own, with this package in it."""


def add_commands(commands) -> None:
    """Add the commands to the parser of :mod:`kvpitfalls.cli`."""
    lm_eval = commands.add_parser("lm-eval", help="lm-eval's own command line on a compressed cache", usage=_LM_EVAL)
    lm_eval.set_defaults(run=_lm_eval)
    garak = commands.add_parser("garak", help="garak's own command line on a compressed cache", usage=_GARAK)
    garak.set_defaults(run=_garak)
    for command, scope in ((lm_eval, "prompt"), (garak, "system")):
        _add_settings(command, scope)
    report = commands.add_parser("garak-report", help="what garak found, from its reports, side by side")
    report.add_argument("files", metavar="FILE", nargs="+", help="a .report.jsonl of kvpitfalls garak")
    report.add_argument("--json", action="store_true", help="JSON instead of a table")
    report.set_defaults(run=_garak_report)


def _add_settings(command, scope: str) -> None:
    command.add_argument(
        "--model", metavar="NAME", help="hub id, folder or .gguf file; SmolLM2-135M-Instruct by default"
    )
    command.add_argument("--policy", metavar="NAME", required=True, help=policy_help())
    amount = command.add_mutually_exclusive_group(required=True)
    amount.add_argument("--compression-ratio", "--ratio", metavar="R", type=float, help="share removed, in [0, 1)")
    amount.add_argument("--budget", metavar="N", type=int, help="tokens kept of each prompt")
    command.add_argument(
        "--fair",
        metavar="HOW",
        nargs="?",
        const=True,
        default=False,
        type=fair,
        help=f"each keeps its share; or {FAIR_HELP}",
    )
    command.add_argument(
        "--protect",
        metavar="WHAT",
        type=text,
        action="append",
        help="an instruction's name, a role, a text of every prompt, sinks, boundary",
    )
    command.add_argument(
        "--compress",
        choices=("prompt", "system"),
        default=scope,
        help=f"the whole prompt, or its system message only; {scope} by default",
    )
    command.add_argument(
        "--instructions",
        metavar="WHAT",
        default="sentences",
        help="sentences (default), lines, messages, or a JSON file: name -> text",
    )
    command.add_argument("arguments", metavar="...", nargs="*", help=argparse.SUPPRESS)


def _settings(args) -> dict:
    names = ("policy", "compression_ratio", "budget", "fair", "protect", "compress", "instructions")
    return {name: value for name in names if (value := getattr(args, name)) is not None and value is not False}


def _lm_eval(args) -> int:
    from ..harness.lm_eval_command import run

    return run(_settings(args) | ({} if args.model is None else {"pretrained": args.model}), args.arguments)


def _garak(args) -> int:
    from ..harness.garak_command import run

    return run(_settings(args), args.arguments, args.model or "default")


def _garak_report(args) -> int:
    from ..display.columns import fitted, table
    from ..harness.garak_command import read_report

    results = [row for path in args.files for row in read_report(path)]
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    names = (
        "probe",
        "detector",
        "policy",
        "fair",
        "compress",
        "kept_share",
        "answers",
        "hits",
        "n_prompt",
        "hit_rate",
        "mean_score",
        "max_score",
    )
    rows = [
        [
            f"{row[name]:.2f}" + (f" [{row['low']:.2f}, {row['high']:.2f}]" if name == "hit_rate" else "")
            if isinstance(row[name], float)
            else str(row[name])
            for name in names
        ]
        for row in results
    ]
    header = ["prompts" if name == "n_prompt" else name.replace("_", " ") for name in names]
    shown = table(header, rows, right=range(5, len(names)))
    print(fitted(shown, columns(), n_key=5))
    return 0
