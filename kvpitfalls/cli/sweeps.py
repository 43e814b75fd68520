"""The commands that run and report experiments: ``kvpitfalls leakage``, ``ifeval``, ``suite``, ``sweep``, ``rescore``,
``report`` and ``compare``."""

import argparse
import functools
import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from .streams import columns
from .values import number_or, policy_help

_REPORT_OF = "Tables, figures and a page of it: kvpitfalls report {}\n"
_DATA_HELP = "folder of the paper's data; KVPITFALLS_DATA or a download by default"


class _HelpWithNames(argparse.Action):
    """``--help``, and after it the names that the arguments take; they are read when somebody asks."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show this, and the names that there are")

    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_help()
        print()
        for what, names in _names().items():
            print(textwrap.fill(f"{what}: {', '.join(names)}", 100, subsequent_indent="  ", break_on_hyphens=False))
        parser.exit()


def _names() -> dict[str, list[str]]:
    from ..experiments.corpus import load_corpus
    from ..experiments.modes import FIXES, MODES
    from ..experiments.presets import preset_names
    from ..policies import policy_names

    own = load_corpus("own")
    families = [name.rpartition("-")[0] for name in own.attacks]
    return {
        "presets": preset_names(),
        "policies": policy_names(),
        "modes": [
            *dict.fromkeys([*MODES, *FIXES]),
            "a number from 0 (biased) to 1 (fair)",
            "parts joined by +, such as fair+sinks=4",
        ],
        "defenses": list(own.defenses),
        "attacks": [f"{name} ({name}-1 to {name}-{families.count(name)})" for name in dict.fromkeys(families)],
    }


def add_commands(commands) -> None:
    """Add the commands to the parser of :mod:`kvpitfalls.cli`."""
    sweep = commands.add_parser(
        "sweep", add_help=False, help="run a matrix of policies, ratios, prompts and attacks, or go on with one"
    )
    what = sweep.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        metavar="FILE",
        help="a .toml or .json file; its names are those of kvpitfalls.experiments.config.SweepConfig",
    )
    what.add_argument(
        "--preset",
        metavar="NAME",
        help="figure1 to figure15, composite, smollm2 (minutes on two cores), fixes, suite-v1, suite-v1-small, probe, or turns",
    )
    sweep.set_defaults(run=_sweep)
    _add_run_arguments(sweep, *["the preset's or config's by default"] * 4)
    _add_prompt_arguments(sweep, *["the preset's or config's by default"] * 2)
    suite = commands.add_parser(
        "suite", help="the fixed suite, v1, on a model: one card (JSON) and one page of results"
    )
    suite.add_argument(
        "--small",
        action="store_true",
        help="its first 24 prompts, two policies, three modes, r = .5: 504 answers, for a small model on a CPU",
    )
    suite.set_defaults(run=_suite)
    _add_run_arguments(suite)
    _add_single_commands(commands)
    rescore = commands.add_parser(
        "rescore", help="score the recorded answers of a sweep by this version's rules; nothing is generated"
    )
    rescore.add_argument("folder", metavar="DIR", help="what --output of the sweep named; it is left as it is")
    rescore.add_argument("--output", metavar="NEW", required=True, help="a new folder for the records")
    rescore.add_argument("--data", metavar="DIR", help=_DATA_HELP)
    rescore.add_argument("--json", action="store_true", help="JSON instead of text")
    rescore.set_defaults(run=_rescore)
    report = commands.add_parser(
        "report", help="tables, CSV files, figures and one HTML page from the records of a sweep"
    )
    report.add_argument("folder", metavar="DIR", help="what --output named")
    report.add_argument("--json", action="store_true", help="JSON instead of a table")
    report.set_defaults(run=_report)
    compare = commands.add_parser(
        "compare", help="two cards (report/card.json), such as two models' or two versions', prompt by prompt"
    )
    compare.add_argument("a", metavar="A.json", help="the card that the other is compared with")
    compare.add_argument("b", metavar="B.json", help="the card whose numbers less those of A are shown")
    compare.add_argument("--json", action="store_true", help="JSON instead of a table")
    compare.set_defaults(run=_compare)


def _compare(args) -> int:
    from ..display.columns import fitted, one_line
    from ..display.tables import N_COMPARED, compare_table
    from ..experiments.card import compare, read_card

    a, b = read_card(args.a), read_card(args.b)
    changes = compare(a, b)
    if args.json:
        print(json.dumps(changes, indent=1))
    else:
        shown = fitted(compare_table(changes), columns(), N_COMPARED)
        more, less = (one_line(card["model"]) for card in (b, a))
        print(f"What {more} has more than {less}; 95 % for each alone, paired by prompt:\n\n{shown}")
    return 0


def _add_single_commands(commands) -> None:
    leakage = commands.add_parser(
        "leakage", add_help=False, help="attack defended system prompts: leak, refusal, recall and following, together"
    )
    leakage.add_argument(
        "--attack",
        action="append",
        dest="attacks",
        metavar="NAME",
        help="an attack or a family; once for each; the first attack by default",
    )
    leakage.set_defaults(run=_leakage)
    ifeval = commands.add_parser(
        "ifeval", add_help=False, help="how many checkable instructions of the system prompt are followed"
    )
    ifeval.set_defaults(run=_ifeval)
    limits = "256 to an attack, 64 of recall, 1280 to a task"
    defaults = {leakage: ("the first", "biased and fair", limits), ifeval: ("none", "biased", "1280")}
    for command, (defense, modes, limit) in defaults.items():
        command.add_argument(
            "--defense",
            action="append",
            dest="defenses",
            metavar="NAME",
            help=f"once for each; {defense} by default",
        )
        command.add_argument(
            "--order",
            action="append",
            dest="orders",
            metavar="NAME",
            help="defense_first, directive_first; both by default",
        )
        command.add_argument(
            "--policy", action="append", dest="policies", metavar="NAME", help=policy_help("once for each: ")
        )
        command.add_argument(
            "--mode",
            action="append",
            dest="modes",
            metavar="NAME",
            help="once for each: biased, random, phrase, pinned, boundary, floor, fair, fair_phrase, paper, a number, "
            f"...; {modes} by default",
        )
        command.add_argument(
            "--ratio",
            "--compression-ratio",
            action="append",
            dest="compression_ratios",
            type=float,
            metavar="R",
            help="share removed, in [0, 1); once for each; 0.1 to 0.9 by default; 0 is always run",
        )
        command.add_argument("--max-new-tokens", type=int, metavar="N", help=f"of every answer; by default {limit}")
        _add_run_arguments(command)
        _add_prompt_arguments(command, "own by default", "all by default")


def _add_run_arguments(
    command,
    model: str = "SmolLM2-135M-Instruct by default",
    batch_size: str = "64 by default",
    device: str = "cpu by default",
    dtype: str = "float32 by default",
) -> None:
    command.add_argument(
        "--output", metavar="DIR", required=True, help="records are written here; the same sweep is resumed"
    )
    command.add_argument(
        "--model",
        action="append",
        dest="models",
        metavar="NAME",
        help=f"hub id, folder or .gguf file; once for each; {model}",
    )
    command.add_argument("--batch-size", type=int, metavar="N", help=f"conversations generated together; {batch_size}")
    command.add_argument("--device", metavar="NAME", help=f"cpu, cuda, ...; {device}")
    command.add_argument("--dtype", metavar="NAME", help=f"float32, bfloat16, ...; {dtype}")
    command.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="ray: on Ray workers, with the same records"
    )
    command.add_argument("--workers", type=int, metavar="N", help="for ray: start it here with N processors")
    command.add_argument("--json", action="store_true", help="JSON instead of text")


def _add_prompt_arguments(command, dataset: str, n_prompts: str) -> None:
    command.add_argument("-h", "--help", action=_HelpWithNames)
    command.add_argument("--data", metavar="DIR", help=_DATA_HELP)
    command.add_argument(
        "--dataset", metavar="NAME", help=f"own, suite-v1, paper, paper_shuffled, or a JSONL file of rows; {dataset}"
    )
    command.add_argument("--n-prompts", type=int, metavar="N", help=f"the first N rows; {n_prompts}")


def _changes(args) -> dict:
    names = ("models", "dataset", "n_prompts", "batch_size", "device", "dtype")
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _sweep(args) -> int:
    from ..experiments.config import SweepConfig
    from ..experiments.presets import preset

    if args.preset is not None:
        return run_parts(args, preset(args.preset, **_changes(args)))
    config = SweepConfig.read(args.config)
    return run_parts(args, {"all": SweepConfig.parse({**config.to_dict(), **_changes(args)})})


def _suite(args) -> int:
    from ..display.columns import fitted
    from ..display.page import write_report
    from ..display.tables import N_SETTING, outcome_table
    from ..experiments.corpus import SUITE
    from ..experiments.presets import preset

    report = functools.cache(lambda: write_report(args.output))
    code = run_parts(args, preset(f"{SUITE}-small" if args.small else SUITE, **_changes(args)), report, after="")
    if not args.json and code != 130:
        written = report()
        print(f"\n{fitted(outcome_table(written['cells']), columns(), N_SETTING)}\n")
        print(end=_note(written["unread"]))
        print(f"Page: {written['page']}\nCard: {', '.join(written['cards'])} (see kvpitfalls compare)")
    return code


def run_parts(args, parts: dict, measured: Callable[[], Mapping] = dict, after: str = _REPORT_OF) -> int:
    """Run the sweeps of a command, each in a folder of its own if there are several; 1 if an item failed, not where one
    was infeasible. ``measured``: what JSON says of them beside their names; ``after``: the line that says what is
    next."""
    from ..experiments.sweep import sweep

    if not args.output:  # as the path of a folder it is the current one
        raise ValueError("--output is ''; expected the path of a folder")
    done = {}
    for name, config in parts.items():
        folder = Path(args.output) / name if len(parts) > 1 else Path(args.output)
        try:
            data = getattr(args, "data", None)
            done[name] = {
                "folder": str(folder),
                **sweep(config, folder, data=data, engine=args.engine, workers=args.workers),
            }
        except KeyboardInterrupt:
            print(f"\nkvpitfalls {args.command}: interrupted; {_recorded(folder)}", file=sys.stderr)
            return 130
    if args.json:
        print(json.dumps({**done, **measured()}, indent=1))
    else:
        for part in done.values():
            states = f"{part['failed']} failed, {part['infeasible']} infeasible"
            print(f"{part['folder']}: {part['items']} items, {states}, {part['resumed_at']} were there already")
        print(end=after.format(shlex.quote(args.output)))
    return _failed(args, done)


def _failed(args, done: Mapping[str, dict]) -> int:
    """The exit code of what was done, and a line where an item failed."""
    failed = sum(part["failed"] for part in done.values())
    if failed:
        print(f"kvpitfalls {args.command}: {failed} items failed; their records hold the error", file=sys.stderr)
    return 1 if failed else 0


def _recorded(folder: Path) -> str:
    """What an interrupted sweep leaves."""
    from ..experiments.records import META, RECORDS, read_meta, read_records

    if not all((folder / name).exists() for name in (META, RECORDS)):
        return f"nothing is recorded in {folder} yet"
    n_item = read_meta(folder)["items"]
    return (
        f"{len(read_records(folder))} of {n_item} items are recorded in {folder}, and the same command goes on from "
        "there"
    )


def _single(args, **changes) -> dict:
    """The config of ``leakage`` and ``ifeval``: the same matrix as a sweep's, from flags."""
    from ..experiments.config import SweepConfig
    from ..experiments.scenario import ANSWERED

    lists = ("defenses", "orders", "policies", "modes", "compression_ratios", "attacks")
    options = {name: getattr(args, name) for name in lists if getattr(args, name, None) is not None}
    if "modes" in options:
        options["modes"] = [number_or(mode) for mode in options["modes"]]
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = dict.fromkeys(ANSWERED, args.max_new_tokens)
    return {"all": SweepConfig.parse({**changes, **_changes(args), **options})}


def _leakage(args) -> int:
    from ..display.tables import N_SETTING, outcome_table
    from ..experiments.corpus import load_corpus
    from ..experiments.records import read_records
    from ..experiments.summary import summarize

    corpus = load_corpus(args.dataset or "own", args.data)
    kinds = ["attack", "recall"]
    if all(row["instruction_id_list"] for row in corpus.rows):
        kinds.append("follow")
    else:
        print("kvpitfalls leakage: rows have no checkable instructions; following is not measured", file=sys.stderr)
    chosen = {
        "attacks": [next(iter(corpus.attacks))],
        "defenses": [name for name in corpus.defenses if name != "none"][:1],
    }
    parts = _single(args, kinds=kinds, **chosen)
    return _run_and_show(args, parts, lambda: summarize(read_records(args.output)), outcome_table, N_SETTING)


def _ifeval(args) -> int:
    from ..display.tables import N_FOLLOWING, following_table
    from ..experiments.records import read_records
    from ..experiments.summary import following

    parts = _single(args, kinds=["follow"], defenses=["none"], modes=["biased"])
    return _run_and_show(args, parts, lambda: following(read_records(args.output)), following_table, N_FOLLOWING)


def _run_and_show(args, parts: dict, cells: Callable[[], list], table: Callable[[list], str], n_key: int) -> int:
    from ..display.columns import fitted

    code = run_parts(args, parts, lambda: {"cells": cells()})
    if not args.json and code != 130:
        print(f"\n{fitted(table(cells()), columns(), n_key)}")
    return code


def _rescore(args) -> int:
    from ..display.page import sweep_folders
    from ..experiments.rescore import rescore_each

    parts = sweep_folders(args.folder)
    places = {part: str(Path(args.output) / part.relative_to(args.folder)) for part in parts}
    done = rescore_each(places, data=args.data)
    if args.json:
        print(json.dumps(done, indent=1))
    else:
        for place, part in done.items():
            states = f"{part['failed']} failed, {part['infeasible']} infeasible"
            recorded = f"{part['recorded']} of {part['items']} items"
            print(f"{place}: {recorded}, {part['changed']} with other scores than before; {states}")
        print(end=_REPORT_OF.format(shlex.quote(args.output)))
    return _failed(args, done)


def _note(sentence: str) -> str:
    from ..display.columns import wrapped

    return f"{wrapped(sentence, columns())}\n" if sentence else ""


def _report(args) -> int:
    from ..display.columns import fitted
    from ..display.page import write_report
    from ..display.tables import N_SETTING, N_TURN_SETTING, outcome_table, probe_table, turn_table

    written = write_report(args.folder)
    if args.json:
        print(json.dumps(written, indent=1))
    else:
        n_keys = {outcome_table: N_SETTING, probe_table: N_SETTING, turn_table: N_TURN_SETTING}
        tables = [(text, n_key) for of, n_key in n_keys.items() if (text := of(written["cells"]))]
        print("\n\n".join(fitted(text, columns(), n_key) for text, n_key in tables))
        states = f"{written['failed']} failed, {written['infeasible']} infeasible"
        print(end="\n" + _note(written["unread"]))
        print(f"{written['recorded']} of {written['items']} items recorded, {states}. Page: {written['page']}")
    return 0
