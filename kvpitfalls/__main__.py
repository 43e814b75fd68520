"""``kvpitfalls`` and ``python -m kvpitfalls``."""

import os
import sys


def main() -> int:
    """:func:`kvpitfalls.cli.main`, and one line where Ctrl-C comes before that is imported."""
    _open_what_is_closed()
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        print("kvpitfalls: interrupted", file=sys.stderr)
        return 130


def _open_what_is_closed() -> None:
    """A stream that a shell closed (``2>&-``) leads nowhere from now on. Without it messages would stand among the
    data, since ``print(file=None)`` prints to stdout, and the next file would take the stream's number, and all that C
    code prints there: a library that keeps one open does as soon as it is imported. What is opened here takes it: it is
    the lowest that is free."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
