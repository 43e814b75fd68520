"""What becomes of stdout where a console lacks a character, or where nobody reads on."""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator


def columns() -> int | None:
    """How wide the terminal is that stdout goes to; None if it goes elsewhere, where lines may be of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """A block in which stdout shows characters that its encoding lacks as "?", and that ends quietly if its reader has
    gone."""
    _open_what_is_closed()
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's takes any character
        yield
        return
    errors = stream.errors
    if errors in ("strict", "surrogateescape"):  # nobody asked for another way
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        is_closed(stream)
        stream.reconfigure(errors=errors)


def _open_what_is_closed() -> None:
    """A stream that a shell closed (``2>&-``) leads nowhere from now on. Without it messages would stand among the data,
    since ``print(file=None)`` prints to stdout, and the next file would take the stream's number, and all that C code
    prints there. What is opened here takes it: it is the lowest that is free."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def is_closed(stream, probe: str = "", kind: type[OSError] = BrokenPipeError) -> bool:
    """Whether a stream fails in this way, such as after ``| head -1``; what is printed from now on goes nowhere
    then."""
    try:
        print(probe, end="", file=stream, flush=True)
    except kind:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True
    return False
