"""The folder of what is kept, and files that are there whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where this package keeps what it made or fetched: ``KVPITFALLS_CACHE``, or ``kvpitfalls`` below the user's cache
    folder."""
    own, of_user = os.environ.get("KVPITFALLS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(of_user or "~/.cache").expanduser() / "kvpitfalls"


@contextlib.contextmanager
def whole(path: "str | os.PathLike[str]") -> Iterator[Path]:
    """A path beside ``path`` to write to: it takes that place when the block ends, and is gone if it fails.

    Raises
    ------
    TypeError
        If ``path`` is none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; expected the path of a file")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
