"""What one layer gives to those who judge its tokens."""

from dataclasses import KW_ONLY, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from .arrays import Array

if TYPE_CHECKING:
    import torch


class Again(NamedTuple):
    """What one layer saw when the model read on after the prompt, as a policy's ``Policy.again`` had it do.

    Shorter rows are padded on the right; of a row that read nothing there is padding alone.

    Parameters
    ----------
    queries : array, shape (B, H*G, n, D)
        Of the ``n`` tokens read.
    keys : array, shape (B, H, n, D)
        Theirs; each query sees the prompt, and of these the keys up to its own.
    values : array, shape (B, H, n, Dv), or None
    turn : int
        Which of the forwards after the prompt it was, from 0.
    before : array of float32, shape (B, H, T), or None
        What ``score`` returned for the turn before; None at the first.

    Examples
    --------
    >>> import numpy as np
    >>> Again(np.zeros((1, 4, 3, 8)), np.zeros((1, 2, 3, 8))).turn
    0
    """

    queries: Array
    keys: Array
    values: Array | None = None
    turn: int = 0
    before: Array | None = None


@dataclass(eq=False)  # arrays are not compared by ==; not frozen, which would make each of its fields by a call
class LayerInputs:
    """What one layer gives a policy, wherever it comes from: a wrapped model, an audit, or :func:`kvpitfalls.keep`.

    Attributes
    ----------
    keys : array, shape (B, H, T, D)
    queries : array, shape (B, H*G, Q, D), or None
        For the last Q of the T positions.
    values : array, shape (B, H, T, Dv), or None
        As they stand in the cache.
    scaling, softcap : float
        Of the attention logits. ``scaling`` None is ``D ** -0.5``; ``softcap`` 0 or None is none.
    sinks : tensor, shape (H*G,), or None
        A logit per query head that joins the denominator of every softmax.
    lse : array of float32, shape (B, H*G, Q), or None
        Natural log of each query's softmax denominator, without sinks, if it is already known.
    layer, n_layer : int
        Which of the model's layers that are compressed it is, and how many there are.
    rotary : Rotary, or None
        How the layer turned queries and keys by their positions.
    output : array, shape (H*G, Dv, E), or None
        What the layer adds to the hidden state for each head's attention-weighted value.
    again : Again, or None
        What was read after the prompt.
    share_heads : bool
        One choice must serve all heads, by the mean of their scores: for models that mix heads after the cache.

    Raises
    ------
    ValueError
        If ``scaling`` is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> LayerInputs(np.zeros((1, 2, 10, 16), np.float32)).scaling
    0.25
    """

    keys: Array
    queries: Array | None = None
    values: Array | None = None
    _: KW_ONLY
    scaling: float = None  # type: ignore[assignment] # a number since __post_init__
    softcap: float = 0.0
    sinks: "torch.Tensor | None" = None
    lse: Array | None = None
    layer: int = 0
    n_layer: int = 1
    rotary: Any = None
    output: Any = None
    again: Again | None = None
    share_heads: bool = False

    def __post_init__(self) -> None:
        self.scaling = self.keys.shape[-1] ** -0.5 if self.scaling is None else float(self.scaling)
        if not isfinite(self.scaling):
            raise ValueError(f"scaling is {self.scaling!r}; expected a finite number")
        self.softcap = float(self.softcap or 0.0)
