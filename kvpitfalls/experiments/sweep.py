"""Running a sweep: batch after batch, each recorded before the next begins; resumed where it was interrupted."""

import hashlib
import importlib.metadata
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from .. import __version__, _core
from ..audits.following import need_checkers
from ..audits.leakage import need_rouge
from ..display.progress import progress_or_lines
from ..hf.load import DEFAULT_MODEL, describe, load, revision
from .batch import run_batch
from .config import SweepConfig
from .corpus import Corpus, load_corpus
from .metrics import counts
from .plan import Batch, plan
from .ray_engine import need_ray, run_ray
from .records import META, RECORDS, append, check_same, locked, read_meta, read_records, recover, write_meta

_PACKAGES = ("torch", "transformers", "numpy", "rouge-score", "lm-eval", "nltk", "langdetect")


ENGINES = ("local", "ray")
_SAMPLE = 256  # bytes
SCORES = 2  # raised when records get other scores, so that a sweep is not resumed with them


def sweep(
    config: SweepConfig, folder: str | Path, *, data: str | Path | None = None, engine: str = "local", workers: int | None = None
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
        "local": in this process. "ray": on Ray workers, with the same records; a sweep begun by one may go on by the other.
    workers : int, optional
        For "ray": start it here with so many processors. By default Ray's own choice: the cluster of ``RAY_ADDRESS``, or this machine.

    Returns
    -------
    dict
        ``items``, ``failed``, ``infeasible``, ``resumed_at`` (items that were there already).

    Raises
    ------
    ValueError
        If the folder holds another sweep, or this one by other versions; nothing is changed then.
    RuntimeError
        If another process is running a sweep there.
    ImportError
        If a package for scoring is missing, before anything is run.
    """
    if not isinstance(config, SweepConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a SweepConfig")
    corpus = load_corpus(config.dataset, data)
    batches = list(plan(config, corpus))
    if "follow" in config.kinds:
        need_checkers()
    if {"attack", "recall"} & set(config.kinds):
        need_rouge()
    _check_engine(engine, workers, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        n_item = sum(len(batch.items(corpus)) for batch in batches)
        meta = begin(folder, identity(config, corpus), n_item, corpus.notice, engine)
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
        found = counts(read_records(folder))
    return {"items": n_item, "failed": found["n_failed"], "infeasible": found["n_infeasible"], "resumed_at": held}


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


def load_model(config: SweepConfig, name: str):
    """The model and tokenizer of a name in a config."""
    options = {"dtype": config.dtype, "device": config.device, "attn_implementation": config.attn_implementation}
    return load(None if name == "default" else name, **options)


def begin(folder: Path, same: dict, n_item: int, notice: str, engine: str) -> dict:
    """What ``run_meta.json`` is to hold: that of a new sweep, or that of the one there, which must be this one, and this session."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    session = {"started": now, "arguments": shlex.join(sys.argv), "engine": engine, "commit": _commit()}
    try:
        meta = read_meta(folder)
    except FileNotFoundError:
        if (folder / RECORDS).exists():
            raise ValueError(f"{folder} has records but no {META}; expected a new folder, or one of a sweep") from None
        meta = {"same": same, "items": n_item, "notice": notice, "sessions": []}
    check_same(meta["same"], same)
    return {**meta, "sessions": [*meta["sessions"], session]}


def identity(config: SweepConfig, corpus: Corpus) -> dict:
    """All that records depend on: a sweep is only resumed by the same."""
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else "cpu"
    return {
        **{f"config.{name}": value for name, value in config.to_dict().items()},
        "corpus_sha256": corpus.sha256,
        "model_sources": [_source(name) for name in config.models],
        "kvpitfalls": __version__,
        "scores": SCORES,
        **{package: _version(package) for package in _PACKAGES},
        "python": sys.version.split()[0],
        "device": device,
        "core_isa": _core.isa(),
        "threads": torch.get_num_threads(),
    }


def _source(name: str) -> str:
    """Where a model comes from, and which it is: the hub's revision, or a fingerprint of local files."""
    known = None if name in ("default", DEFAULT_MODEL) else name
    path = Path(name).expanduser()
    which = _fingerprint(path) if known is not None and path.exists() else revision(known)
    return " at ".join(part for part in (describe(known), which) if part)


def _fingerprint(path: Path) -> str:
    """Of a model's files: names, sizes, and samples of their bytes; hashing all weights would take minutes for large models.

    256 bytes are read in every MiB, or in every 1024th of a smaller file, and small files are read whole: weights that were trained on
    in place are noticed even if only one matrix was.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file()):
        size = file.stat().st_size
        digest.update(repr((file.name, size)).encode())
        stride = max(_SAMPLE, min(2**20, size // 1024))
        with file.open("rb") as content:
            for at in range(0, size, stride):
                content.seek(at)
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout this package runs from; None if it is installed, or there is no git."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()
