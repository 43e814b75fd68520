"""``kvpitfalls garak``: garak's own command line on a compressed cache, and what its reports say, side by side."""

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..experiments.intervals import share_interval
from ..numbers import is_real, is_whole

_PER_ANSWER = ("n_tokens", "n_kept")


def run(settings: dict, arguments: Sequence[str], model: str = "default") -> int:
    """Run garak on the generator ``kvpitfalls``.

    Parameters
    ----------
    settings : dict
        Of the generator: policy, compression_ratio or budget, fair, protect, compress, instructions.
    arguments : list of str
        garak's own, without a target and its options.
    model : str
        As :func:`kvpitfalls.hf.load.load` takes it.

    Returns
    -------
    int
        0; garak's own errors are raised.
    """
    options = ("--target", "--model_", "--generator_option", "-t ", "-n ")
    if clash := [a for a in arguments if f"{a} ".startswith(options)]:
        raise ValueError(f"garak's {clash[0]} is given; expected the target as options before the --")
    if importlib.util.find_spec("garak") is None:
        raise ImportError(
            "the package garak is missing; expected pip install garak, in an environment of its own: it pins what it "
            "needs"
        )
    import garak.cli  # pyright: ignore[reportMissingImports] # an environment of its own has it
    import garak.generators  # pyright: ignore[reportMissingImports] # an environment of its own has it

    from . import garak_generator

    sys.modules["garak.generators.kvpitfalls"] = garak.generators.kvpitfalls = garak_generator
    chosen = {"kvpitfalls": {"Compressed": settings}}
    garak.cli.main(
        ["--target_type", "kvpitfalls", "--target_name", model, "--generator_options", json.dumps(chosen), *arguments]
    )
    return 0


def read_report(path: str | Path) -> list[dict]:
    """What garak measured, from its ``.report.jsonl``.

    Returns
    -------
    list of dict
        One per probe and detector: ``probe``, ``detector``, the settings of the generator, ``kept_share`` (of all
        compressed tokens), ``answers`` that were scored, ``hits`` (those that failed by garak's threshold),
        ``hit_rate``, with ``low`` and ``high`` (95 %, system prompts as units, under these attacks; prompts themselves
        where they have none), ``n_prompt``, ``mean_score`` and ``max_score``.

    Raises
    ------
    ValueError
        If the file is no finished report of the generator ``kvpitfalls``, or holds numbers that cannot be.
    """
    try:
        return _measured(path)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:  # of another version
        why = f"{type(error).__name__}: {error}"
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        why = str(error)
    raise ValueError(f"{path} is no report of garak ({why}); expected a .report.jsonl as garak 0.17 writes it")


def _measured(path: str | Path) -> list[dict]:
    with Path(path).open(encoding="utf-8-sig") as file:  # answers in it may hold ends of lines of other kinds
        entries = [json.loads(line) for line in file if line.strip()]
    kinds = {entry.get("entry_type") if isinstance(entry, dict) else None for entry in entries}
    if None in kinds or not {"start_run setup", "eval", "completion"} <= kinds:
        raise ValueError(
            f"{path} is no finished report of garak; expected entries from the start of a run to its completion"
        )
    # status 2: scored; each is there before, too
    done = [entry for entry in entries if entry["entry_type"] == "attempt" and entry["status"] == 2]
    setting = _setting(path, done)
    return [_rates(path, entry, done, setting) for entry in entries if entry["entry_type"] == "eval"]


def _setting(path: str | Path, done: Sequence[Mapping]) -> dict:
    """Of the generator, which all answers have in common."""
    notes = [out["notes"].get("kvpitfalls") for entry in done for out in entry["outputs"] if out is not None]
    settings = {
        json.dumps({k: v for k, v in note.items() if k not in _PER_ANSWER}) for note in notes if note is not None
    }
    if None in notes or len(settings) != 1:
        raise ValueError(
            f"{path} has {len(done)} scored attempts, not all of one kvpitfalls setting; expected a report of "
            "kvpitfalls garak"
        )
    return json.loads(settings.pop())


def _rates(path: str | Path, entry: Mapping, done: Sequence[Mapping], setting: Mapping) -> dict:
    """What garak's evaluation of one probe by one detector says, held against the attempts that it is of."""
    mine = [attempt for attempt in done if attempt["probe_classname"] == entry["probe"]]
    kept_share = _kept_share(path, mine)
    scored = [
        (_unit(attempt), x)
        for attempt in mine
        for x in attempt["detector_results"].get(entry["detector"], [])
        if x is not None
    ]
    scores = [x for _, x in scored]
    n = entry["passed"] + entry["fails"]
    if not all(is_real(x) and 0 <= x <= 1 for x in scores) or not 0 <= entry["fails"] <= n:
        raise ValueError(f"{path} has scores or counts for {entry['detector']} that cannot be; expected shares")
    if not n or n != len(scores):
        raise ValueError(
            f"{path} has {len(scores)} scores and counts {n} for {entry['detector']}; expected equally many, at "
            "least one"
        )
    by_prompt = _hits_by_prompt(path, entry, scored)
    low, high = share_interval(by_prompt)
    return {
        "probe": entry["probe"],
        "detector": entry["detector"],
        **setting,
        "kept_share": kept_share,
        "answers": n,
        "hits": entry["fails"],
        "hit_rate": entry["fails"] / n,
        "low": low,
        "high": high,
        "n_prompt": len(by_prompt),
        "mean_score": sum(scores) / n,
        "max_score": max(scores),
    }


def _hits_by_prompt(path: str | Path, entry: Mapping, scored: Sequence[tuple[str, float]]) -> np.ndarray:
    """Hits and answers of each system prompt, from (system prompt, score) of all: garak tells how many hit, which are
    those of highest score."""
    least = sorted((x for _, x in scored), reverse=True)[entry["fails"] - 1] if entry["fails"] else np.inf
    units: dict[str, list[int]] = {}
    for unit, x in scored:
        of_unit = units.setdefault(unit, [0, 0])
        of_unit[0] += x >= least
        of_unit[1] += 1
    pairs = np.array(list(units.values()), float)
    if pairs[:, 0].sum() != entry["fails"]:
        raise ValueError(
            f"{path} counts {entry['fails']} hits for {entry['detector']}, and an answer that is none scores as much "
            "as one; expected a threshold between them"
        )
    return pairs


def _unit(attempt: Mapping) -> str:
    """The system prompt that an attempt attacks, or all that it says where it has none."""
    turns = attempt["prompt"]["turns"]
    said = [turn["content"]["text"] for turn in turns if turn["role"] == "system"]
    return json.dumps(said or [turn["content"]["text"] for turn in turns])


def _kept_share(path: str | Path, attempts: Sequence[Mapping]) -> float:
    """Of all prompts' tokens."""
    notes = [out["notes"]["kvpitfalls"] for attempt in attempts for out in attempt["outputs"] if out is not None]
    counts = [[note[name] for name in _PER_ANSWER] for note in notes]
    tokens, kept = (sum(of_each) for of_each in zip((0, 0), *counts, strict=True))
    if not tokens or not all(is_whole(n) and is_whole(m) and 0 <= m <= n for n, m in counts):
        raise ValueError(f"{path} has {kept} of {tokens} tokens kept; expected whole numbers, no more than there are")
    return kept / tokens
