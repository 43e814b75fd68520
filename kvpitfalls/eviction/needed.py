"""What a policy needs of a layer beside its keys, and what of it was given."""

from collections.abc import Sequence
from typing import Any

from ..numbers import is_whole
from ..policies import Again, Policy
from .arrays import Array, check_types
from .layout import Layout

MOST_LAYERS = 2**16  # far beyond any model: budgets are listed layer by layer


def turns_of(policy: Policy, layout: Layout, keys: Array, again: Any) -> Sequence[Again]:
    """What was read after the prompt, forward by forward; raises if it is not what the policy has the model read."""
    if again is None:
        return []
    if (
        isinstance(again, (str, bytes))
        or not isinstance(again, Sequence)
        or not all(isinstance(x, tuple) for x in again)
    ):
        raise TypeError(f"again is a {type(again).__name__}; expected a list of tuples (queries, keys), one a forward")
    rows = [[len(turn) for turn in policy.again(range(end - begin))] for begin, end in layout.valid]
    lengths = [max(row[i] for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    if len(again) != len(lengths) or not all(2 <= len(turn) <= 5 for turn in again):
        raise ValueError(f"again has {len(again)} tuples; expected {len(lengths)} of (queries, keys), one a forward")
    turns = [Again(turn[0], turn[1], turn[2] if len(turn) > 2 else None, i) for i, turn in enumerate(again)]
    check_types(keys=keys)
    for n_fed, turn in zip(lengths, turns, strict=True):
        _check_read(f"queries of again[{turn.turn}]", turn.queries, keys, n_fed, has_group=True)
        _check_read(f"keys of again[{turn.turn}]", turn.keys, keys, n_fed)
    return turns


def _check_read(name: str, x: Any, keys: Array, n_fed: int, has_group: bool = False) -> None:
    """Raise where x is not of ``n_fed`` tokens of the keys' kind; ``has_group``: of one or more heads for each of
    theirs."""
    n_row, n_head, _, n_dim = keys.shape
    shape: tuple[Any, ...] = tuple(getattr(x, "shape", ()))
    fits = type(x) is type(keys) and len(shape) == 4 and (shape[1] % n_head == 0 if has_group else shape[1] == n_head)
    if not fits or (shape[0], *shape[2:]) != (n_row, n_fed, n_dim):
        heads = f"a multiple of {n_head}" if has_group else n_head
        raise ValueError(
            f"{name} is a {type(x).__name__} of shape {shape}; expected a {type(keys).__name__} ({n_row}, {heads}, "
            f"{n_fed}, {n_dim})"
        )
    check_types(**{name: x})
    for what in ("dtype", "device"):
        if (own := getattr(x, what, None)) != (wanted := getattr(keys, what, None)):
            raise TypeError(f"{name} has {what} {own}; expected {wanted}, as keys has")


def check_layer(keys: Array, values: Array | None, layer: object, n_layer: object) -> None:
    """Raise for values that are not the keys', and for a layer that there is not."""
    if values is not None and tuple(values.shape[:-1]) != tuple(keys.shape[:-1]):
        raise ValueError(
            f"values has shape {tuple(values.shape)}; expected {tuple(keys.shape[:-1])} before the last dimension, as "
            "keys has"
        )
    if values is not None and type(values) is not type(keys):
        raise TypeError(
            f"values is a {type(values).__name__} and keys is a {type(keys).__name__}; expected the same type"
        )
    if not is_whole(layer):
        raise TypeError(f"layer is {layer!r}; expected a whole number")
    if not is_whole(n_layer):
        raise TypeError(f"n_layer is {n_layer!r}; expected a whole number")
    if n_layer > MOST_LAYERS:
        raise ValueError(f"n_layer is {n_layer}; expected at most {MOST_LAYERS}")
    if not 0 <= layer < n_layer:
        raise ValueError(f"layer is {layer} of {n_layer}; expected one in [0, {n_layer})")
