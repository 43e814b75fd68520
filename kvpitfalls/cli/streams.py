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
