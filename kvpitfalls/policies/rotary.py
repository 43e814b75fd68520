"""Rotary position embedding, for policies that ask what queries would be elsewhere."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..numbers import is_real


class Rotary:
    """How a layer turns queries and keys by their positions; this one is plain rotary embedding, pairing halves.

    :func:`kvpitfalls.wrap` reads each model's own instead.

    Parameters
    ----------
    theta : float
        The base of the frequencies.

    Examples
    --------
    A turn is undone exactly:

    >>> import torch
    >>> import kvpitfalls as kvp
    >>> rotary, queries = kvp.Rotary(), torch.randn(1, 2, 5, 8)
    >>> cos, sin = rotary.angles(torch.arange(5)[None], queries)
    >>> turned = rotary.turned(queries, cos, sin)
    >>> bool((rotary.undone(turned, torch.arange(5)[None]) - queries).abs().max() < 1e-5)
    True
    """

    def __init__(self, theta: float = 10000.0):
        if not is_real(theta) or not 0 < theta < float("inf"):
            raise ValueError(f"theta is {theta!r}; expected a positive number")
        self.theta = theta

    def positions(self, valid: Sequence[tuple[int, int]], n_token: int, device: Any = None) -> Any:
        """Of the ``n_token`` tokens of each row, int64 (B, T): from 0 on for the first real one."""
        import torch

        whole = torch.arange(n_token, device=device)
        if not any(begin for begin, _ in valid):
            return whole.expand(len(valid), -1)
        return torch.stack([(whole - begin).clamp_(min=0) for begin, _ in valid])

    def angles(self, positions: Any, x: Any) -> tuple[Any, Any]:
        """Cosine and sine for each position (B, N) and channel of x, float32 (B, N, D)."""
        n_dim = x.shape[-1]
        if n_dim % 2:
            raise ValueError(
                f"keys have {n_dim} channels; rotary embedding turns pairs of them, and expects an even number"
            )
        angles = (positions[..., None] * _rates(self.theta, n_dim, positions.device)).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    def turned(self, x: Any, cos: Any, sin: Any) -> Any:
        """x (B, H, N, D), turned; linear in x and in the angles' cosines and sines together."""
        low, high = x.chunk(2, -1)
        of_low, of_high = sin[:, None].chunk(2, -1)
        turned = x * cos[:, None]
        first, last = turned.chunk(2, -1)  # changed in place: each tensor less is as much of a long prompt as the sums
        first.addcmul_(high, of_low, value=-1)
        last.addcmul_(low, of_high)
        return turned

    def pairs_halves(self, n_dim: int, cos: Any) -> bool:
        """Whether :meth:`turned` is that of this class for ``n_dim`` channels and such cosines, and so what kernels of
        the core undo, too."""
        return type(self).turned is Rotary.turned and cos.shape[-1] == n_dim

    def undone(self, x: Any, positions: Any) -> Any:
        """Turned x as it was before, float32; also where a model makes it longer or shorter as it turns it."""
        return self.turned(x.float(), *self.backwards(positions, x))

    def backwards(self, positions: Any, x: Any) -> tuple[Any, Any]:
        """Cosine and sine that undo the turn of each position, as :meth:`angles` gives those of the turn."""
        cos, sin = self.angles(positions, x)
        if type(self).angles is Rotary.angles:
            return cos, -sin
        squared = cos**2 + sin**2  # not 1 where a model makes what it turns longer or shorter
        return cos / squared, -sin / squared

    def mean(self, positions: Any, x: Any) -> Any:
        """The matrix (D, D) by which a row vector like x's is turned on average over ``positions`` (N,), float32."""
        import torch

        unit = torch.eye(x.shape[-1], dtype=torch.float32, device=x.device)
        cos, sin = (part.mean(1, keepdim=True) for part in self.angles(positions[None], unit))
        return self.turned(unit[None, None], cos, sin)[0, 0]


@lru_cache(maxsize=64)
def _rates(theta: float, n_dim: int, device: Any) -> Any:
    """By how much each pair of channels turns from one position to the next, float32 (D / 2,)."""
    import torch

    return theta ** (-torch.arange(0, n_dim, 2, dtype=torch.float32, device=device) / n_dim)
