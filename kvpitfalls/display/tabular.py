"""Rows for tables: of pandas, where it is installed; and which of many are shown."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def data_frame(rows: Sequence[Mapping[str, Any]]) -> "pandas.DataFrame":
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


def worst_first(by_name: Mapping[str, Mapping[float, float]], most: int = 5) -> list[tuple[str, Mapping[float, float]]]:
    """Names and their shares by ratio. Of more than ``most`` + 1, the ``most`` of smallest mean share, and the least of
    the others.

    Examples
    --------
    >>> worst_first({"a": {0.5: 0.9}, "b": {0.5: 0.1}, "c": {0.5: 0.8}}, most=1)
    [('b', {0.5: 0.1}), ('2 more, each at least', {0.5: 0.8})]
    """
    if len(by_name) <= most + 1:
        return list(by_name.items())
    ordered = sorted(by_name.items(), key=lambda item: sum(item[1].values()))
    rest = [shares for _, shares in ordered[most:]]
    least = {ratio: min(shares[ratio] for shares in rest) for ratio in rest[0]}
    return [*ordered[:most], (f"{len(rest)} more, each at least", least)]
