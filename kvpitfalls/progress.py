"""Progress bars, on everything that may take over a second."""


def progress(iterable=None, **options):
    """A bar of ``tqdm.auto`` that appears after a second, on a terminal or in a notebook; where neither is, none."""
    from tqdm.auto import tqdm

    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)  # whose output says that it is no terminal
    return tqdm(iterable, **{"delay": 1, "disable": False if in_notebook else None, **options})
