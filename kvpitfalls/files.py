"""The folder of what is kept, files that are there whole or not at all, and JSON that users write."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where this package keeps what it made or fetched: ``KVPITFALLS_CACHE``, or ``kvpitfalls`` below the user's cache
    folder."""
    own, of_user = os.environ.get("KVPITFALLS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own) if own else Path(of_user or "~/.cache").expanduser() / "kvpitfalls"
    except RuntimeError as error:  # as of a user of a container whom the system does not know
        raise OSError(f"the user's home folder is not known; {_EXPECTED}") from error


_EXPECTED = "expected the environment variable KVPITFALLS_CACHE to name a folder that can be written to"


def in_home(name: "str | os.PathLike[str]") -> Path:
    """The path that somebody wrote; ``~`` may stand for a home folder, and stays where that is not known."""
    return Path(os.path.expanduser(name))


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that is kept: ``make`` fills another, which takes its place, so that it is there whole or not at all."""
    if not folder.is_dir():
        with _beside(folder) as temporary:
            make(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.is_dir():  # another process that was faster is fine
                    raise
    return folder


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder beside one that is to be made, which is gone when the block ends, and what killed processes left of
    such goes first.

    Whoever fills one holds a share of the lock of the folder that they are in, and a lock goes with its process: so
    where the whole lock is to be had, nobody is at it.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder.parent, os.O_RDONLY)
            held.callback(os.close, lock)
            _clear(folder, lock)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part"))
        except OSError as error:
            raise OSError(f"{folder} cannot be made ({error.strerror}); {_EXPECTED}") from error
        held.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


def _clear(folder: Path, lock: int) -> None:
    """Take away what is left of a folder, if nobody fills one beside it, and take a share of the lock."""
    with contextlib.suppress(OSError):  # somebody does, or the disk has no such locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.parent.iterdir():
            if path.name.startswith(f"{folder.name}.") and path.suffix == ".part":
                shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH)


def place_of(path: "str | os.PathLike[str]") -> Path:
    """The path, if a file can have it.

    Raises
    ------
    TypeError, ValueError
        If ``path`` is none.
    IsADirectoryError, FileNotFoundError
        If it is a folder's, or in none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; expected the path of a file")
    if "\0" in str(path):
        raise ValueError(f"path is {str(path)!r}; expected the path of a file")
    place = Path(path)
    if place.is_dir():
        raise IsADirectoryError(f"{place} is a folder; expected the path of a file")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{place} cannot be written: {place.parent} is no folder; expected one that exists")
    return place


_NAME = 200  # bytes of a file's name that the one beside it has, too; most systems hold 255


@contextlib.contextmanager
def whole(path: "str | os.PathLike[str]") -> Iterator[Path]:
    """A path beside ``path`` to write to: it takes that place when the block ends, and is gone if it fails. Raises what
    :func:`place_of` does.

    Who may read a file that was there may read what takes its place, and nobody else. A link is replaced, and what it
    points to stays as it is: it may be another's. A device or a pipe is written to, and
    so is what is open under a number, such as /dev/stdout, be it a pipe, a file or closed.
    """
    path = place_of(path)
    number = _open_as(path)
    in_place = number is not None or (path.exists() and not path.is_file())
    with tempfile.TemporaryDirectory() if in_place else contextlib.nullcontext(path.parent) as folder:
        temporary = Path(folder) / f".{os.fsdecode(os.fsencode(path.name)[:_NAME])}.{uuid.uuid4().hex}"
        try:
            yield temporary
            if in_place:
                _put(temporary.read_bytes(), path if number is None else number)
            else:
                if path.exists() and not path.is_symlink():
                    shutil.copymode(path, temporary)
                os.replace(temporary, path)
        except OSError as error:  # of a full disk, or one that is only read: told of the file that was asked for
            if error.errno is not None and error.filename in (None, str(temporary)):
                error.filename = str(path)
            raise
        finally:
            with contextlib.suppress(OSError):  # on a disk that is only read: none is there, and none can go
                temporary.unlink()


def _open_as(path: Path) -> int | None:
    """The number under which this process has it open, of /dev/stdout, /dev/fd/3 and links to such; else None."""
    numbers = Path("/dev/fd").resolve()
    for _ in range(40):  # links, of which some lead to themselves
        if path.parent.resolve() == numbers and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def _put(content: bytes, to: Path | int) -> None:
    """Write to what is there, behind what it was told before: a file that stdout goes to is not begun anew."""
    if sys.stdout is not None:
        sys.stdout.flush()
    with open(to, "wb", closefd=isinstance(to, Path)) as file:
        file.write(content)


def read_json(text: str | bytes) -> Any:
    """What a user wrote in JSON. A name that stands twice in an object is refused: the last of them would count.

    Examples
    --------
    >>> read_json('{"seed": 1}')
    {'seed': 1}
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named:
            raise ValueError(f"an object has {name!r} twice; expected each name once")
        named[name] = value
    return named
