"""The commands that run and report experiments: ``kvpitfalls sweep``."""

import json
import sys
from pathlib import Path


def add_commands(commands) -> None:
    """Add the commands to the parser of :mod:`kvpitfalls.cli`."""
    sweep = commands.add_parser("sweep", help="run a matrix of policies, ratios, prompts and attacks, or go on with one")
    what = sweep.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", metavar="FILE", help="a .toml or .json file; its names are those of kvpitfalls.experiments.config.SweepConfig"
    )
    what.add_argument("--preset", metavar="NAME", help="figure1 to figure15, composite, or smollm2 (some minutes on two cores)")
    sweep.set_defaults(run=_sweep)
    _add_run_arguments(sweep)


def _add_run_arguments(command) -> None:
    command.add_argument("--output", metavar="DIR", required=True, help="records are written here; the same sweep is resumed")
    command.add_argument("--data", metavar="DIR", help="folder of the paper's data; KVPITFALLS_DATA or a download by default")
    command.add_argument("--model", action="append", dest="models", metavar="NAME", help="hub id, folder or .gguf file; once for each")
    command.add_argument("--dataset", metavar="NAME", help="own, paper, paper_shuffled, or a JSONL file of rows")
    command.add_argument("--n-prompts", type=int, metavar="N", help="the first N rows")
    command.add_argument("--batch-size", type=int, metavar="N", help="conversations generated together")
    command.add_argument("--device", metavar="NAME", help="cpu, cuda, ...")
    command.add_argument("--dtype", metavar="NAME", help="float32, bfloat16, ...")
    command.add_argument("--json", action="store_true", help="JSON instead of text")


def _changes(args) -> dict:
    names = ("models", "dataset", "n_prompts", "batch_size", "device", "dtype")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _sweep(args) -> int:
    from .experiments.config import SweepConfig
    from .experiments.presets import preset

    if args.preset is not None:
        return run_parts(args, preset(args.preset, **_changes(args)))
    config = SweepConfig.read(args.config)
    return run_parts(args, {"all": SweepConfig.parse({**config.to_dict(), **_changes(args)})})


def run_parts(args, parts: dict) -> int:
    """Run the sweeps of a command, each in a folder of its own if there are several; 1 if an item failed."""
    from .experiments.sweep import sweep

    done = {}
    for name, config in parts.items():
        folder = Path(args.output) / name if len(parts) > 1 else Path(args.output)
        done[name] = {"folder": str(folder), **sweep(config, folder, data=args.data)}
    if args.json:
        print(json.dumps(done, indent=1))
    else:
        for part in done.values():
            print(f"{part['folder']}: {part['items']} items, {part['failed']} failed, {part['resumed_at']} were there already")
    failed = sum(part["failed"] for part in done.values())
    if failed:
        print(f"kvpitfalls {args.command}: {failed} items failed; their records hold the error", file=sys.stderr)
    return 1 if failed else 0
