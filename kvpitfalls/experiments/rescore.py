"""Scores made anew from the answers that a sweep recorded: by newer rules, and without a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..display.progress import progress_or_lines
from ..files import whole
from ..numbers import is_whole
from .batch import FAILURES
from .config import SweepConfig
from .corpus import Corpus, load_corpus
from .metrics import check_records, counts
from .modes import Mode
from .plan import Batch, plan
from .records import META, RECORDS, lines_of, read_meta, whole_batches, write_meta
from .scenario import ANSWERED, Scenario
from .sources import DRAWN_SINCE, SCORES, SCORING, versions
from .sweep import need_scoring, session

Old = TypeVar("Old", bound="str | Path")
New = TypeVar("New", bound="str | Path")
SCORED = (*ANSWERED, "turns")  # kinds whose scores are read off answers


def rescore(folder: str | Path, output: str | Path, *, data: str | Path | None = None) -> dict:
    """The records of a sweep with scores by the rules of this version; nothing is generated, and no model is loaded.

    Likelihoods (of probes) are measured, not read off an answer, and stay as they are; so do answers, what was kept,
    and the errors of items that have no answer.

    Parameters
    ----------
    folder : path
        What ``kvpitfalls sweep --output`` was given, of one sweep. It is left as it is. Of a sweep that is running, or
        that was interrupted, what it has recorded.
    output : path
        A new folder; a sweep in it is reported on and gone on with as one that was scored by these rules at first.
    data : path, optional
        The folder of the paper's data.

    Returns
    -------
    dict
        ``items`` (planned), ``recorded``, ``changed`` (records that have other scores now), ``failed``, ``infeasible``.

    Raises
    ------
    FileNotFoundError
        If ``folder`` holds no sweep.
    ValueError
        If ``output`` holds one; if the prompts are not those of the sweep, or its records not those of its config; or
        if it holds the random control as it was drawn before version 5 of the scores, which no scoring mends. Nothing
        is written then.
    ImportError
        If a package for scoring is missing.
    """
    return rescore_each({folder: output}, data=data)[output]


def rescore_each(places: Mapping[Old, New], *, data: str | Path | None = None) -> dict[New, dict]:
    """:func:`rescore` of several sweeps, each into its own folder: all of them are scored before the first is written,
    and an interruption leaves none.

    Parameters
    ----------
    places : mapping
        A sweep's folder to the new one.
    data : path, optional
        The folder of the paper's data.

    Returns
    -------
    dict
        The new folder to what :func:`rescore` returns.
    """
    for output in places.values():
        _check_new(output)
    made = {output: _rescored_sweep(folder, data) for folder, output in places.items()}
    try:
        for output, (meta, new, _) in made.items():
            Path(output).mkdir(parents=True, exist_ok=True)
            write_meta(output, meta)
            with whole(Path(output) / RECORDS) as temporary:
                temporary.write_bytes(lines_of(new))
    except BaseException:
        for output in places.values():
            for name in (RECORDS, META):
                (Path(output) / name).unlink(missing_ok=True)
        raise
    return {output: done for output, (_, _, done) in made.items()}


def _rescored_sweep(folder: str | Path, data: str | Path | None) -> tuple[dict, list[dict], dict]:
    """What is to be written of a sweep, its description and its records, and what :func:`rescore` says of them."""
    meta = read_meta(folder)
    config = SweepConfig.parse({n[7:]: value for n, value in meta["same"].items() if n.startswith("config.")})
    corpus = load_corpus(config.dataset, data)
    _check(folder, meta["same"], config, corpus)
    batches = list(plan(config, corpus))
    old = whole_batches(folder, (batch.items(corpus) for batch in batches))
    check_records([_unscored(record) for records in old for record in records])
    need_scoring(config.kinds)
    new = list(_scored(batches, old, corpus, config.seed))
    check_records(new)
    same = {**meta["same"], "scores": SCORES, **versions(SCORING)}
    n_records = counts(new)
    before = [record["scores"] for records in old for record in records]
    done = {
        "items": meta["items"],
        "recorded": len(new),
        "changed": sum(was != record["scores"] for was, record in zip(before, new, strict=True)),
        "failed": n_records["n_failed"],
        "infeasible": n_records["n_infeasible"],
    }
    return {**meta, "same": same, "sessions": [*meta["sessions"], session("rescore")]}, new, done


def _scored(batches: Sequence[Batch], old: Sequence[Sequence[Mapping]], corpus: Corpus, seed: int) -> Iterator[dict]:
    """The records of the batches, scored by these rules."""
    known: dict[tuple, dict] = {}  # one answer of a prompt is scored once, however many settings give it
    with progress_or_lines(total=sum(map(len, old)), desc="rescore, items") as bar:
        for batch, records in zip(batches, old, strict=False):
            scenarios = {n: Scenario.of(corpus, corpus.rows[n], batch.defense, batch.order) for n in batch.rows}
            rows = [n for n, requests in zip(batch.rows, batch.requests, strict=True) for _ in requests]
            for n, record in zip(rows * len(batch.settings), records, strict=True):
                yield _rescored(record, scenarios[n], seed, known)
                bar.update(1)


def _check_new(output: str | Path) -> None:
    """Raise if a folder holds a sweep, or is none."""
    if output == "":  # as a path it is the current folder
        raise ValueError("output is ''; expected the path of a new folder")
    if any((Path(output) / name).exists() for name in (RECORDS, META)):
        raise ValueError(f"{output} holds a sweep; expected a new folder")


def _check(folder: str | Path, same: Mapping, config: SweepConfig, corpus: Corpus) -> None:
    """Raise unless scores are all that another version would have made otherwise."""
    if same.get("corpus_sha256") != corpus.sha256:
        raise ValueError(
            f"{folder} holds answers to other prompts (sha256 {str(same.get('corpus_sha256'))[:12]}...) than "
            f"{config.dataset!r} is here ({corpus.sha256[:12]}...); expected the same"
        )
    made = same.get("scores")
    if not is_whole(made) or not 0 <= made <= SCORES:
        raise ValueError(f"{folder} has scores of version {made!r}; expected one from 0 to {SCORES}, this version's")
    if made < DRAWN_SINCE and any(Mode.parse(mode).is_control for mode in config.modes):
        raise ValueError(
            f"{folder} holds the control, 'random', of version {made} of the scores, which draws otherwise than since "
            f"version {DRAWN_SINCE}; expected {DRAWN_SINCE} or later, or no control: run the sweep anew"
        )


def _unscored(record: Mapping) -> Mapping:
    """The record without the scores that are not read: those of another version may look otherwise."""
    return {**record, "scores": None, "error": ""} if record["kind"] in ANSWERED else record


def _rescored(record: Mapping, scenario: Scenario, seed: int, known: dict[tuple, dict]) -> dict:
    """The record with scores by these rules, or with the error of scoring, as a sweep would record it."""
    kind, output = record["kind"], record["output"]
    if output is None or kind not in SCORED:
        return dict(record)
    place = (scenario.system, record["key"], kind, output, json.dumps(record["scores"]) if kind == "turns" else None)
    try:
        if place not in known:
            known[place] = (
                _turns(record["scores"], scenario, seed) if kind == "turns" else scenario.score(kind, output, seed)
            )
    except FAILURES as error:  # its record holds the error and no scores, and every table counts it as failed
        return {**record, "scores": None, "error": f"{type(error).__name__}: {error}"}
    return {**record, "scores": known[place], "error": None}


def _turns(scores: Mapping, scenario: Scenario, seed: int) -> dict:
    """Of a conversation's turns."""
    return {
        way: [
            {**scenario.score_turn(recall, attacked, seed), "kept": turn["kept"], "answers": [recall, attacked]}
            for turn in turns
            for recall, attacked in [turn["answers"]]
        ]
        for way, turns in scores.items()
    }
