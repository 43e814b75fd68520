"""Progress bars, on everything that may take over a second."""

import sys
from collections.abc import Iterable
from typing import Any


def shown() -> bool:
    """Whether a bar is drawn: on a terminal, or in a notebook, whose output says that it is no terminal."""
    from tqdm.auto import tqdm

    if sys.stderr is None:  # of a process without a console
        return False
    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of ``tqdm.auto`` that appears after a second, if anyone sees it."""
    from tqdm.auto import tqdm

    return tqdm(iterable, **{"delay": 1, "disable": not shown(), **options})


def progress_or_lines(**options: Any) -> Any:
    """:func:`progress`, or, where nobody sees a bar (a log, a job of a cluster), a line every half minute."""
    from tqdm import tqdm

    return progress(**options) if shown() else tqdm(**options, file=_Lines(), mininterval=30, ascii=True, ncols=80)


class _Lines:
    """The standard error, on which nothing is written over."""

    def write(self, text: str) -> None:
        """A line of its own for what would stand in place of another."""
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        """As for any file."""
        sys.stderr.flush()
