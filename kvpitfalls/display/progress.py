"""Progress bars, on everything that may take over a second."""

import sys


def shown() -> bool:
    """Whether there is someone to see a bar: on a terminal or in a notebook, whose output says that it is no terminal."""
    from tqdm.auto import tqdm

    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


def progress(iterable=None, **options):
    """A bar of ``tqdm.auto`` that appears after a second, if anyone sees it."""
    from tqdm.auto import tqdm

    return tqdm(iterable, **{"delay": 1, "disable": not shown(), **options})
