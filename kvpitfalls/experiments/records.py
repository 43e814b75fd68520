"""Records on disk: one JSON line an item, in the order of the plan, whole batches only; and what they were made with.

The file is always a beginning of the plan. A batch is appended by one write; whatever a kill leaves of it is cut off
before going on. So a resumed sweep writes the bytes that an unbroken one would have written, timings aside, and never a
record twice.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..files import whole
from ..numbers import is_whole

RECORDS, META = "records.jsonl", "run_meta.json"


def read_records(folder: str | Path) -> list[dict]:
    """All whole records of a sweep's folder.

    Raises
    ------
    FileNotFoundError
        If it holds none.
    ValueError
        If a line, other than a last one that was cut short, is no JSON object.
    """
    return [record for record, _ in _whole_lines(_path(folder))]


def read_meta(folder: str | Path) -> dict:
    """What :func:`write_meta` wrote.

    Raises
    ------
    FileNotFoundError
        If the folder has none.
    ValueError
        If the file is not what a sweep writes.
    """
    path = Path(folder) / META
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {META}; expected the output folder of a sweep")
    wrong = f"{path} is no description of a sweep; expected the file that a sweep wrote"
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(wrong) from error
    if not (
        isinstance(meta, dict)
        and isinstance(meta.get("same"), dict)
        and isinstance(meta.get("sessions", []), list)
        and is_whole(meta.get("items"))
    ):
        raise ValueError(wrong)
    return meta


def _path(folder: str | Path) -> Path:
    """Of a folder's records, which are there."""
    path = Path(folder) / RECORDS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {RECORDS}; expected the output folder of a sweep")
    return path


def _whole_lines(path: Path) -> list[tuple[dict, int]]:
    """Each record, and the offset at which its line ends. A last line that was cut short is left out."""
    out, at = [], 0
    with path.open("rb") as file:
        for line in file:
            at += len(line)
            if not line.endswith(b"\n"):
                break
            wrong = f"{path}, record {len(out) + 1}, is no JSON object; expected one object a line"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(wrong) from error
            if not isinstance(record, dict):
                raise ValueError(wrong)
            out.append((record, at))
    return out


def recover(folder: str | Path, batches: Iterable[Sequence[Mapping]]) -> int:
    """How many batches are recorded; what follows the last whole one is cut off.

    Parameters
    ----------
    folder : path
    batches : iterable of list of dict
        The plan: what identifies each record of each batch.

    Raises
    ------
    ValueError
        If the records are not a beginning of this plan.
    """
    path = Path(folder) / RECORDS
    if not path.exists():
        return 0
    held = _whole_batches(path, batches)
    end = held[-1][-1][1] if held else 0
    with path.open("r+b") as file:
        file.truncate(end)
        os.fsync(file.fileno())
    return len(held)


def whole_batches(folder: str | Path, batches: Iterable[Sequence[Mapping]]) -> list[list[dict]]:
    """The records of each whole batch, in the order of the plan; nothing is cut off. ``batches`` are those of
    :func:`recover`, which raises the same, and here a folder without records is refused."""
    return [[record for record, _ in batch] for batch in _whole_batches(_path(folder), batches)]


def _whole_batches(path: Path, batches: Iterable[Sequence[Mapping]]) -> list[list[tuple[dict, int]]]:
    """Each record and the offset at which its line ends, batch by batch."""
    lines, out, n_line = _whole_lines(path), [], 0
    for batch in batches:
        held = lines[n_line : n_line + len(batch)]
        for n, ((record, _), item) in enumerate(zip(held, batch, strict=False), n_line + 1):
            if any(record.get(name) != value for name, value in item.items()):
                raise ValueError(
                    f"{path}, record {n}, is not the one that this sweep makes; expected a folder of the same sweep, "
                    "or a new one"
                )
        if len(held) < len(batch):
            return out
        out.append(held)
        n_line += len(batch)
    if len(lines) > n_line:
        raise ValueError(f"{path} holds {len(lines)} records; expected at most {n_line}, all of this sweep")
    return out


def lines_of(records: Sequence[Mapping]) -> bytes:
    """Records as a file holds them. What UTF-8 cannot hold, such as half of a pair in the words of an error, is
    escaped as JSON has it."""
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    return "".join(lines).encode(errors="backslashreplace")


def append(folder: str | Path, records: Sequence[Mapping]) -> None:
    """Add a batch's records, by one write that has reached the disk when this returns."""
    lines, path = lines_of(records), Path(folder) / RECORDS
    with path.open("ab", buffering=0) as file:
        try:
            n = file.write(lines)
            os.fsync(file.fileno())
        except OSError as error:  # a write names no file
            error.filename = str(path)
            raise
    if n != len(lines):
        raise OSError(f"{n} of {len(lines)} bytes were written to {path}; expected all. Free some space and resume")


def write_meta(folder: str | Path, meta: Mapping) -> None:
    """Write ``run_meta.json``, whole or not at all."""
    folder = Path(folder)
    with whole(folder / META) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def check_same(old: Mapping, new: Mapping) -> None:
    """Raise if a sweep was begun with anything else than what it would be resumed with.

    Raises
    ------
    ValueError
        Naming the first thing that differs.
    """
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"the sweep was begun with {name} = {old.get(name)!r} and would go on with {new.get(name)!r}; "
                "expected the same, since "
                "records of two kinds do not mix. Choose a new folder"
                + (", or bring the records to this version: kvpitfalls rescore" if name == "scores" else "")
            )


@contextmanager
def locked(folder: str | Path):
    """Hold the folder: a second sweep in it is refused. The lock goes with the process, however it ends."""
    path = Path(folder) / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another sweep is running in {folder}; expected to be alone there") from error
        except OSError as error:  # of Lustre without its option flock, say
            raise OSError(
                f"{path} cannot be locked ({error.strerror}), so two sweeps could write here; expected a folder on a "
                "file system with locks"
            ) from error
        yield
