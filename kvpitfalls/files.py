"""The folder of what is kept, and files that are there whole or not at all."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where this package keeps what it made or fetched: ``KVPITFALLS_CACHE``, or ``kvpitfalls`` below the user's cache
    folder."""
    own, of_user = os.environ.get("KVPITFALLS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(of_user or "~/.cache").expanduser() / "kvpitfalls"


def place_of(path: "str | os.PathLike[str]") -> Path:
    """The path, if a file can have it.

    Raises
    ------
    TypeError
        If ``path`` is none.
    IsADirectoryError, FileNotFoundError
        If it is a folder's, or in none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; expected the path of a file")
    place = Path(path)
    if place.is_dir():
        raise IsADirectoryError(f"{place} is a folder; expected the path of a file")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{place} cannot be written: {place.parent} is no folder; expected one that exists")
    return place


@contextlib.contextmanager
def whole(path: "str | os.PathLike[str]") -> Iterator[Path]:
    """A path beside ``path`` to write to: it takes that place when the block ends, and is gone if it fails. Raises what
    :func:`place_of` does.

    A link is replaced, and what it points to stays as it is: it may be another's. A device or a pipe, such as
    /dev/stdout, is written to.
    """
    path = place_of(path)
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder) / "written")
            path.write_bytes(temporary.read_bytes())
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, or one that is only read: told of the file that was asked for
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
