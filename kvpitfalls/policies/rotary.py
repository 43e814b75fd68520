"""Rotary position embedding, for policies that ask what queries would be elsewhere."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from ..numbers import is_real

Order = tuple[slice, slice, slice, slice]  # of channels: those of the first two are paired with those of the others


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

    def order(self, n_dim: int, n_angle: int) -> Order | None:
        """In which ``n_dim`` channels are turned as this class turns halves of all, which is what kernels of the core
        undo, by angles of so many channels; None if that is not known."""
        return next(orders(n_dim, n_dim)) if type(self).turned is Rotary.turned and n_angle == n_dim else None

    def of_halves(self, cos: Any, sin: Any, order: Order) -> tuple[Any, Any]:
        """Cosines and sines (B, N, D) by which halves are turned of channels in this order, as by these all of them are
        turned as they lie."""
        import torch

        n_dim = order[-1].stop
        if cos.shape[-1] == n_dim and order == next(orders(n_dim, n_dim)):
            return cos, sin
        units = cos.new_zeros(2, len(cos), 1, cos.shape[1], n_dim)  # first halves of ones, and second halves
        for at, part in enumerate(order):
            units[at // 2, ..., part] = 1
        first, last = (in_order(self.turned(unit, cos, sin), order)[:, 0].chunk(2, -1) for unit in units)
        return torch.cat([first[0], last[1]], -1), torch.cat([-last[0], first[1]], -1)

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

    def of_tokens(
        self, valid: Sequence[tuple[int, int]], n_token: int, x: Any, order: Order | None = None
    ) -> tuple[Any, Any]:
        """Cosine and sine for each of the ``n_token`` tokens of each row, float32 (B, T, D), and zero for padding; of
        halves of channels in this order, if there is one, and as :meth:`once` says."""
        import torch

        def make() -> tuple[Any, Any]:
            rows, positions = [], self.positions(valid, n_token, x.device)
            for at, (begin, end) in zip(positions, valid, strict=True):
                angles = self._angles(at[None, begin:end], x, order)
                padding = (0, 0, begin, n_token - end)
                rows.append([torch.nn.functional.pad(part, padding) for part in angles] if any(padding) else angles)
            return _joined(rows)

        return self.once(f"tokens {order}", (tuple(map(tuple, valid)), n_token), x, make)

    def ahead(
        self, valid: Sequence[tuple[int, int]], n_token: int, n_ahead: int, x: Any, order: Order | None = None
    ) -> tuple[Any, Any]:
        """Means of cosine and sine over the ``n_ahead`` positions after each row's last token, float32 (B, D); of
        halves of channels in this order, if there is one, and as :meth:`once` says."""
        import torch

        def make() -> tuple[Any, Any]:
            positions, later = self.positions(valid, n_token, x.device), torch.arange(1, 1 + n_ahead, device=x.device)
            ends = [row[end - 1] for row, (_, end) in zip(positions, valid, strict=True)]
            # each row's mean by itself: of several together torch adds in another order
            of_rows = (self._angles((end + later)[None], x.float(), order) for end in ends)
            return _joined([[part.mean(1) for part in angles] for angles in of_rows])

        return self.once(f"ahead {order}", (tuple(map(tuple, valid)), n_token, n_ahead), x, make)

    def _angles(self, positions: Any, x: Any, order: Order | None) -> tuple[Any, Any]:
        angles = self.angles(positions, x)
        return angles if order is None else self.of_halves(*angles, order)

    def once(self, name: str, key: Hashable, x: Any, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """What ``make()`` returns, which all layers of a prompt share: it is kept until another ``key`` is asked for,
        or x is of another kind. Not where nobody can tell what angles depend on, and not while a CUDA graph is
        captured, which must own what it reads."""
        kind, place = self.kind(), _place_of(x)
        if kind is None or place is None:
            return make()
        made: dict[Hashable, tuple[Hashable, tuple[Any, Any]]] = self.__dict__.setdefault("_made", {})
        slot, key = (name, kind), (key, x.shape[-1], x.dtype, place)
        if (known := made.get(slot)) is None or known[0] != key:
            made[slot] = known = (key, make())
        return known[1]

    def kind(self) -> Hashable | None:
        """What :meth:`angles` depends on beside its arguments; None of a subclass that has its own and does not say."""
        own = type(self)
        return self.theta if own.angles is Rotary.angles and own.positions is Rotary.positions else None

    def mean(self, positions: Any, x: Any) -> Any:
        """The matrix (D, D) by which a row vector like x's is turned on average over ``positions`` (N,), float32."""
        import torch

        unit = torch.eye(x.shape[-1], dtype=torch.float32, device=x.device)
        cos, sin = (part.mean(1, keepdim=True) for part in self.angles(positions[None], unit))
        return self.turned(unit[None, None], cos, sin)[0, 0]


def orders(n_dim: int, n_turned: int) -> Iterator[Order]:
    """Of channels of which the first ``n_turned`` are paired: halves of these, or neighbours."""
    half, middle = n_turned // 2, (n_turned + n_dim) // 2
    rest = slice(n_turned, middle), slice(middle, n_dim)
    yield slice(0, half), rest[0], slice(half, n_turned), rest[1]
    yield slice(0, n_turned, 2), rest[0], slice(1, n_turned, 2), rest[1]


def in_order(x: Any, order: Order) -> Any:
    """x with its channels in this order; itself, if they are."""
    import torch

    parts = [part for part in order if part.start < part.stop]
    as_they_lie = all(part.step is None for part in parts) and parts == sorted(parts, key=lambda part: part.start)
    return x if as_they_lie else torch.cat([x[..., part] for part in parts], -1)


@lru_cache(maxsize=64)
def _rates(theta: float, n_dim: int, device: Any) -> Any:
    """By how much each pair of channels turns from one position to the next, float32 (D / 2,)."""
    import torch

    return theta ** (-torch.arange(0, n_dim, 2, dtype=torch.float32, device=device) / n_dim)


def _joined(rows: Sequence[Any]) -> tuple[Any, Any]:
    """Of pairs of tensors (1, ...), a pair of (B, ...)."""
    import torch

    cosines, sines = (part[0] if len(rows) == 1 else torch.cat(part) for part in zip(*rows, strict=True))
    return cosines, sines


def _place_of(x: Any) -> Hashable | None:
    """The device of x, and the stream on which it is worked on there; None while that is captured in a graph."""
    import torch

    if not x.is_cuda:
        return str(x.device)
    if torch.cuda.is_current_stream_capturing():
        return None
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
