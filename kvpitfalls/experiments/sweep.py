"""Running a sweep: batch after batch, each recorded before the next begins; resumed where it was interrupted."""

import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..audits.following import need_checkers
from ..audits.leakage import need_rouge
from ..display.progress import progress_or_lines
from ..hf.load import check_device, dtype_named
from .batch import run_batch
from .config import SweepConfig
from .corpus import Corpus, load_corpus
from .metrics import check_records, counts
from .plan import Batch, plan
from .ray_engine import need_ray, run_ray
from .records import META, RECORDS, append, check_same, locked, read_meta, read_records, recover, write_meta
from .sources import identity, load_model

ENGINES = ("local", "ray")


def sweep(
    config: SweepConfig,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    engine: str = "local",
    workers: int | None = None,
) -> dict:
    """Run a sweep, or go on with one.

    Parameters
    ----------
    config : SweepConfig
    folder : path
        Made if needed. Holds ``records.jsonl`` and ``run_meta.json`` afterwards. A folder of the same sweep is resumed.
    data : path, optional
        The folder of the paper's data.
    engine : {"local", "ray"}
        "local": in this process. "ray": on Ray workers, with the same records; a sweep begun by one may go on by the
        other.
    workers : int, optional
        For "ray": start it here with so many processors. By default Ray's own choice: the cluster of ``RAY_ADDRESS``,
        or this machine.

    Returns
    -------
    dict
        ``items``, ``failed``, ``infeasible``, ``resumed_at`` (items that were there already).

    Raises
    ------
    ValueError
        If the folder holds another sweep, this one by other versions, or what is no record; nothing is changed then.
    DeviceError
        If there is no such GPU, before anything is run.
    RuntimeError
        If another process is running a sweep there.
    ImportError
        If a package for scoring is missing, before anything is run.
    """
    if not isinstance(config, SweepConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a SweepConfig")
    if folder == "":  # a path of no letters is the current folder's, and most likely a shell's variable that is not set
        raise ValueError("folder is ''; expected the path of a folder")
    corpus = load_corpus(config.dataset, data)
    batches = list(plan(config, corpus))
    need_scoring(config.kinds)
    _check_engine(engine, workers, config)
    check_device(config.device)
    dtype_named(config.dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        n_item = sum(len(batch.items(corpus)) for batch in batches)
        meta = begin(folder, identity(config, corpus), n_item, corpus.notice, engine)
        if (folder / RECORDS).exists():
            check_records(read_records(folder))  # before hours of work are put on what no report would take
        done = recover(folder, (batch.items(corpus) for batch in batches))
        write_meta(folder, meta)
        held = sum(len(batch.items(corpus)) for batch in batches[:done])
        with progress_or_lines(total=n_item, initial=held, desc="sweep, items") as bar:
            left = batches[done:]
            if engine == "ray" and left:
                made = run_ray(config, corpus, left, meta["same"], workers)
            else:
                made = run_local(config, corpus, left)
            for records in made:
                append(folder, records)
                bar.update(len(records))
        n_records = counts(read_records(folder))
    return {
        "items": n_item,
        "failed": n_records["n_failed"],
        "infeasible": n_records["n_infeasible"],
        "resumed_at": held,
    }


def need_scoring(kinds: Collection[str]) -> None:
    """Raise ImportError, in one sentence, if a package that scores answers of these kinds is missing."""
    if "follow" in kinds:
        need_checkers()
    if {"attack", "recall", "turns"} & set(kinds):
        need_rouge()


def _check_engine(engine: str, workers: int | None, config: SweepConfig) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "ray":
        need_ray(config, workers)
    elif workers is not None:
        raise ValueError(f"workers is {workers!r}, with the engine 'local'; expected it with engine='ray' only")


def run_local(config: SweepConfig, corpus: Corpus, batches: list[Batch]) -> Iterator[list[dict]]:
    """The records of each batch, in order, made in this process; one model is held at a time."""
    name, model, tokenizer = None, None, None
    for batch in batches:
        if batch.model != name:
            model = None  # before the next is loaded: two may not fit
            name, (model, tokenizer) = batch.model, load_model(config, batch.model)
        yield run_batch(model, tokenizer, corpus, config, batch)


def begin(folder: Path, same: dict, n_item: int, notice: str, engine: str) -> dict:
    """What ``run_meta.json`` is to hold: that of a new sweep, or that of the one there, which must be this one, and
    this session."""
    try:
        meta = read_meta(folder)
    except FileNotFoundError:
        if (folder / RECORDS).exists():
            raise ValueError(f"{folder} has records but no {META}; expected a new folder, or one of a sweep") from None
        meta = {"same": same, "items": n_item, "notice": notice, "sessions": []}
    check_same(meta["same"], same)
    return {**meta, "sessions": [*meta["sessions"], session(engine)]}


def session(engine: str) -> dict:
    """Who works on a folder, and since when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"started": now, "arguments": shlex.join(sys.argv), "engine": engine, "commit": _commit()}


def _commit() -> str | None:
    """The commit of a checkout this package runs from; None if it is installed, or there is no git."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
