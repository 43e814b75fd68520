"""Rows as a table of pandas, where pandas is installed."""

import importlib.util
from collections.abc import Mapping, Sequence


def data_frame(rows: Sequence[Mapping]):
    """A ``pandas.DataFrame``, one line a row.

    Raises
    ------
    ImportError
        If pandas is missing.
    """
    if importlib.util.find_spec("pandas") is None:
        raise ImportError("to_pandas needs the package pandas; expected pip install pandas")
    import pandas

    return pandas.DataFrame(list(rows))
