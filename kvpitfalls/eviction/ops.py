"""The verbs on NumPy arrays or torch tensors: score, select, gather; and share, how many tokens heads keep that share.

CPU arrays go to the C core, CUDA tensors to its CUDA kernels; where those are missing, to
:mod:`kvpitfalls.eviction.reference` (torch operations on the GPU), with a warning. ``kvpitfalls info`` says which path
a device takes, and why.
Results are in the library, and on the device, of the first argument. Tables (votes, valid, segments, quotas) are read
on the host: give them as NumPy arrays, or a GPU has to be waited for.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .. import _core
from ..numbers import is_real
from .arrays import A, Array, Table, check_types

if TYPE_CHECKING:
    import torch

__all__ = ["gather", "score", "select"]
D = TypeVar("D", bound=np.generic)
_MOST = 2**31 - 1  # tokens of a row: positions are int32
_PADDED = 2**16  # positions of a head that may be padding beyond the tokens that there are
_SCORERS = {name: dict(params) for name, _, params in _core.scorers()}


def score(
    scorer: str,
    keys: A,
    *,
    values: Array | None = None,
    queries: Array | None = None,
    votes: Table | None = None,
    valid: Table | None = None,
    lse: Array | None = None,
    **params: float,
) -> A:
    """How much each cached token matters; higher means keep.

    Parameters
    ----------
    scorer : {"norm", "position", "attention", "keydiff", "lagkv", "random"}
        ``norm``: minus the Euclidean norm of each key. ``position``: the first ``n_sink`` valid tokens, then the
        newest. ``attention``: sums of attention columns, or the most of each, as ``votes`` say. ``keydiff``: minus the
        cosine of each key and the mean of the unit vectors of its range, where ``votes`` name key ranges and nothing
        else (all other fields 0); a key in no range scores 0. ``lagkv``: minus the rank, within its chunk, of how much
        a token's key and value spread between the bounds of the next chunk; see :class:`kvpitfalls.LagKV`. ``random``:
        a draw from [0, 1) that depends on the head, the row's length, the keys of eight of its tokens and the seed.
    keys : array, shape (B, H, T, D)
        float32, float16 or bfloat16; any strides.
    values : array, shape (B, H, T, Dv), optional
        ``lagkv`` needs them.
    queries : array, shape (B, H*G, Q, D), optional
        For the last Q of the T positions, after rotary embedding. ``attention`` needs them.
    votes : array of int, shape (B, V, 10), optional
        Which queries judge which keys; the fields are those of ``kvp_vote_field`` in ``csrc/kvp.h``. ``attention``
        and ``keydiff`` need them; :class:`kvpitfalls.policies.Vote` builds them.
    valid : array of int, shape (B, 2), optional
        First and one past the last real token of each row; the rest is padding and scores minus infinity.
    lse : array of float32, shape (B, H*G, Q), optional
        Natural log of each query row's softmax denominator, if already known. A row that is not finite casts no vote.
    **params
        ``position``: ``n_sink=4``. ``attention``: ``scaling=1`` of q.k, ``softcap=0`` (none), ``kernel_size=1`` (odd;
        zero-padded mean over neighbouring keys), ``share_heads=0`` (1: mean over all query heads instead of one key
        head's). ``lagkv``: ``n_sink=4``, ``lag_size=128``. ``random``: ``seed=0`` and ``seed_high=0``, the lowest 32
        bits of a seed and the 30 above them.

    Returns
    -------
    array of float32, shape (B, H, T)

    Raises
    ------
    ValueError, TypeError, DeviceError
        On arguments that do not fit; the message says what was given and what was expected.

    Notes
    -----
    The softmax runs over all visible keys before any range is cut out of it (arXiv 2510.00231, appendix E). Memory is
    O(T).

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.array([[[[3.0, 4.0], [0.0, 1.0]]]], dtype=np.float32)
    >>> score("norm", keys)
    array([[[-5., -1.]]], dtype=float32)
    """
    numbers = _numbers(scorer, params)
    if not _has_kernels(keys):
        from . import reference

        check_types(keys=keys, queries=queries, values=values)
        known: dict[str, Any] = {"queries": queries, "votes": votes, "valid": valid, "lse": lse, **params}
        return reference.score(scorer, keys, values=values, **known)
    out = _empty(keys, _shape(keys, "keys", 4)[:3], "float32")
    tables = None if votes is None else _int32(votes, "votes"), None if valid is None else _int32(valid, "valid")
    arguments = scorer, keys, values, queries, *tables, lse, out, numbers
    _core.score(*arguments, workspace(keys, _core.score_workspace, arguments), n_worker())
    return out


def select(
    scores: A, quotas: Table, *, segments: Table | None = None, protect: Table | None = None, valid: Table | None = None
) -> tuple[A, A]:
    """The positions to keep: the best of each segment, ascending.

    Parameters
    ----------
    scores : array of float32, shape (B, H, T)
    quotas : int or array of int, shape (S,), (B, S) or (B, H, S)
        Tokens to keep per segment.
    segments : array of int, shape (S+1,) or (B, S+1), optional
        Edges of the segments, not descending. One segment, the whole row, by default.
    protect : array of bool, shape (T,) or (B, T), optional
        Tokens that come before all others, whatever their score; they are paid from the quota.
    valid : array of int, shape (B, 2), optional
        Positions outside are never kept.

    Returns
    -------
    positions : array of int32, shape (B, H, K)
        Ascending, then -1 where a row keeps fewer than K, the largest sum of quotas.
    counts : array of int32, shape (B, H)

    Notes
    -----
    The order is total: protected first, then by score, NaN last, equal scores by the lower position; so every backend
    gives the same positions.

    Examples
    --------
    >>> import numpy as np
    >>> positions, counts = select(np.array([[[5, 1, 4, 2]]], dtype=np.float32), [1, 1], segments=[0, 2, 4])
    >>> positions, counts
    (array([[[0, 2]]], dtype=int32), array([[2]], dtype=int32))
    """
    n_row, n_head, n_token = _shape(scores, "scores", 3)
    if n_token > _MOST:
        raise ValueError(f"scores.shape[2] is {n_token}; expected at most {_MOST}")
    if quotas is None:
        raise TypeError("quotas is None; expected whole numbers, the tokens to keep of each segment")
    each = expand_quotas(_int32(quotas, "quotas"), n_row, n_head)
    edges = expand_segments(None if segments is None else _int32(segments, "segments"), n_row, n_token)
    shielded: Array | None = None
    if protect is not None:
        mask = host(protect)
        if mask.dtype.kind not in "biu":
            raise TypeError(f"protect has dtype {mask.dtype}; expected bool")
        shielded = beside(_expanded(mask.astype(np.uint8), (n_row, n_token), "protect"), scores)
    n_kept = int(each.sum(-1, dtype=np.int64).max(initial=0))
    if n_kept > n_token + _PADDED:  # it is so much memory for each head, whatever there is to keep
        raise ValueError(f"quotas sum to {n_kept}; expected at most {n_token + _PADDED} for rows of {n_token} tokens")
    return select_checked(scores, edges, each, shielded, None if valid is None else _int32(valid, "valid"), n_kept)


def press_checked(
    scorer: str,
    keys: A,
    values: A,
    queries: Array | None,
    votes: Table | None,
    valid: npt.NDArray[np.int32] | None,
    lse: Array | None,
    segments: npt.NDArray[np.int32],
    quotas: npt.NDArray[np.int32],
    protect: Array | None,
    n_kept: int,
    params: Mapping[str, float],
    floors: npt.NDArray[np.int32] | None = None,
    shares: npt.NDArray[np.int32] | None = None,
) -> tuple[A, A, A]:
    """:func:`score`, :func:`select` and :func:`gather` by one call, where nobody asks for the scores; the same bits.

    Parameters
    ----------
    scorer, keys, values, queries, votes, valid, lse, params
        As for :func:`score` and :func:`gather`.
    segments, quotas, protect, n_kept
        As for :func:`select_checked`.
    floors, shares
        Where heads share: what :func:`share` takes, and room for what it gives; a GPU is waited for.

    Returns
    -------
    positions : array of int32, shape (B, H, K)
    keys, values : array, shape (B, H, K, D) and (B, H, K, Dv)

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[[3.0], [1.0], [2.0]]]], dtype=np.float32)
    >>> edges, quotas = np.array([[0, 3]], np.int32), np.array([[[2]]], np.int32)
    >>> press_checked("norm", x, x, None, None, None, None, edges, quotas, None, 2, {})[0]
    array([[[1, 2]]], dtype=int32)
    """
    read, numbers = (keys, values, queries, votes, valid, lse), _numbers(scorer, params)
    if shares is None and _is_lent(keys) and _has_kernels(keys):
        return _core.press(scorer, *read, segments, quotas, protect, numbers, n_kept or 1, n_worker())
    if floors is not None and shares is not None and _is_lent(keys) and not _on_cuda(keys):
        return _core.press_shared(scorer, *read, segments, quotas, floors, shares, numbers, n_worker())
    scores = score(scorer, keys, values=values, queries=queries, votes=votes, valid=valid, lse=lse, **params)
    return evict_checked(scores, keys, values, valid, segments, quotas, protect, n_kept, floors, shares)


def evict_checked(
    scores: A,
    keys: A,
    values: A,
    valid: npt.NDArray[np.int32] | None,
    segments: npt.NDArray[np.int32],
    quotas: npt.NDArray[np.int32],
    protect: Array | None,
    n_kept: int,
    floors: npt.NDArray[np.int32] | None = None,
    shares: npt.NDArray[np.int32] | None = None,
) -> tuple[A, A, A]:
    """:func:`press_checked` by scores that are there; by one call on the CPU."""
    if _is_lent(keys) and not _on_cuda(keys):
        return _core.evict(
            scores, keys, values, valid, segments, quotas, protect, floors, shares, n_kept or 1, n_worker()
        )
    if floors is not None and shares is not None:
        shares[...] = quotas = share(scores, segments, quotas, floors)
        n_kept = int(quotas.sum(-1).max())
    positions, _ = select_checked(scores, segments, quotas, protect, valid, n_kept or 1)
    return positions, *gather(keys, values, positions)


def _is_lent(x: object) -> bool:  # whether the core can make arrays of its library
    return isinstance(x, np.ndarray) or hasattr(type(x), "__dlpack_c_exchange_api__")


def _numbers(scorer: str, params: Mapping[str, float]) -> list[float]:
    """All parameters of a scorer, in the core's order. True is a number only where the parameter is a choice."""
    if not isinstance(scorer, str) or scorer not in _SCORERS:
        raise ValueError(f"scorer is {scorer!r}; expected one of {', '.join(map(repr, _SCORERS))}")
    numbers = dict(_SCORERS[scorer])
    for name, x in params.items():
        if name not in numbers:
            raise TypeError(f"scorer {scorer!r} has no parameter {name!r}; expected {', '.join(numbers) or 'none'}")
        if type(x) is not float and not is_real(x) and not (name == "share_heads" and isinstance(x, bool)):
            raise TypeError(f"{name} is {x!r}; expected a number")
        numbers[name] = float(x)
    return list(numbers.values())


def select_checked(
    scores: A,
    segments: npt.NDArray[np.int32],
    quotas: npt.NDArray[np.int32],
    protect: Array | None,
    valid: npt.NDArray[np.int32] | None,
    n_kept: int,
) -> tuple[A, A]:
    """:func:`select` for arrays that are the core's already: int32 (B,S+1), int32 (B,H,S), uint8 (B,T) or None, int32
    (B,2) or None.

    ``protect`` is where the scores are (:func:`beside`).
    """
    if not _has_kernels(scores):
        from . import reference

        return reference.select(scores, quotas, segments=segments, protect=protect, valid=valid)
    n_row, n_head = scores.shape[:2]
    positions = _empty(scores, (n_row, n_head, max(1, n_kept)), "int32")
    counts = _empty(scores, (n_row, n_head), "int32")
    arguments = scores, segments, quotas, protect, valid, positions, counts
    _core.select(*arguments, workspace(scores, _core.select_workspace, arguments), n_worker())
    return positions, counts


def share(
    scores: Array, segments: npt.NDArray[np.int32], quotas: npt.NDArray[np.int32], floors: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """How many positions each head keeps of each segment, (B,H,S), where the heads of a row share their quotas; for
    arrays that are the core's already, int32 (B,S+1), (B,H,S) and (B,H,S). A GPU is waited for.

    Each head keeps its floor's best, and of its infinite scores as many as its quota; then the best of all that is left
    make up the sum of the quotas.

    Examples
    --------
    >>> scores = np.array([[[9, 8, 7, 6], [5, 4, 3, 2]]], np.float32)
    >>> share(scores, np.array([[0, 4]], np.int32), *(np.full((1, 2, 1), n, np.int32) for n in (2, 1))).tolist()
    [[[3], [1]]]
    """
    if not _has_kernels(scores):
        from . import reference

        return reference.share(scores, segments, quotas, floors)
    counts = _empty(scores, quotas.shape, "int32")
    arguments = scores, segments, quotas, floors, counts
    _core.share(*arguments, workspace(scores, _core.share_workspace, arguments), n_worker())
    return host(counts)


def gather(keys: A, values: A, positions: Array) -> tuple[A, A]:
    """The kept rows of keys and values, in new contiguous memory; bit for bit.

    Parameters
    ----------
    keys : array, shape (B, H, T, D)
    values : array, shape (B, H, T, Dv)
        float32, float16 or bfloat16; any strides.
    positions : array of int32, shape (B, H, K)
        Strictly ascending; -1 at the end of a row gives rows of zeros.

    Returns
    -------
    keys : array, shape (B, H, K, D)
    values : array, shape (B, H, K, Dv)

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    >>> gather(x, x, np.array([[[0, 2]]], dtype=np.int32))[0]
    array([[[[0., 1.],
             [4., 5.]]]], dtype=float32)
    """
    if not _has_kernels(keys):
        from . import reference

        return reference.gather(keys, values, positions)
    kept = _shape(positions, "positions", 3)
    if kept[2] > (most := _shape(keys, "keys", 4)[2] + _PADDED):
        raise ValueError(f"positions.shape[2] is {kept[2]}; expected at most {most} for the tokens in keys")
    out_keys, out_values = (
        _empty(x, (*kept, _shape(x, name, 4)[3]), x.dtype) for x, name in ((keys, "keys"), (values, "values"))
    )
    positions = positions if str(positions.dtype) in ("int32", "torch.int32") else _int32(positions, "positions")
    _core.gather(keys, values, positions, out_keys, out_values, n_worker())
    return out_keys, out_values


def beside(mask: npt.NDArray[np.uint8], scores: Array) -> Array:
    """The mask where the scores are. On a GPU it is a copy, for which the GPU is waited for."""
    return sys.modules["torch"].tensor(np.array(mask), device=scores.device) if _on_cuda(scores) else mask


def expand_quotas(quotas: npt.NDArray[np.int32], n_row: int, n_head: int) -> npt.NDArray[np.int32]:
    """Quotas (B,H,S), from an int, (S,), (B,S) or (B,H,S)."""
    shaped = quotas.reshape(1, 1, -1) if quotas.ndim < 2 else quotas[:, None] if quotas.ndim == 2 else quotas
    return _expanded(shaped, (n_row, n_head, shaped.shape[-1]), "quotas")


def expand_segments(segments: npt.NDArray[np.int32] | None, n_row: int, n_token: int) -> npt.NDArray[np.int32]:
    """Segment edges (B,S+1), from None (one segment), (S+1,) or (B,S+1)."""
    edges = np.array([0, n_token], np.int32) if segments is None else segments
    return _expanded(edges, (n_row, edges.shape[-1] if edges.ndim else 1), "segments")


def _expanded(array: npt.NDArray[D], shape: tuple[int, ...], name: str) -> npt.NDArray[D]:
    """What ``np.broadcast_to`` gives, which takes longer than copying so little."""
    if array.shape == shape:
        return array
    if array.ndim > len(shape) or any(n not in (1, m) for n, m in zip(array.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} has shape {array.shape}; expected what fits {shape}")
    out = np.empty(shape, array.dtype)
    out[...] = array
    return out


def _is_torch(x: object) -> TypeGuard["torch.Tensor"]:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _on_cuda(x: object) -> TypeGuard["torch.Tensor"]:
    return bool(getattr(x, "is_cuda", False))


@lru_cache(maxsize=1)
def _cuda_module() -> ModuleType | None:
    """The module of the CUDA kernels, which registers them with the core; None where they were not built."""
    try:
        from .. import _cuda
    except ModuleNotFoundError:
        return None
    return _cuda


@lru_cache(maxsize=64)
def cuda_path(device_index: int) -> tuple[bool, str]:
    """Whether a GPU runs the CUDA kernels, and why or why not, in words.

    Parameters
    ----------
    device_index : int

    Returns
    -------
    (bool, str)
    """
    import torch

    if (kernels := _cuda_module()) is None:
        return (
            False,
            "torch operations on the GPU, because kvpitfalls was built without CUDA kernels (no nvcc was found)",
        )
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return (
            False,
            f"torch operations on the GPU, because torch {torch.__version__} does not tell its current stream (2.10 "
            "does)",
        )
    if (capability := torch.cuda.get_device_capability(device_index)) < (8, 0):
        return (
            False,
            f"torch operations on the GPU, because its compute capability is {capability[0]}.{capability[1]} (the "
            "kernels need 8.0)",
        )
    return True, f"CUDA kernels ({kernels.build_info()['compiler']})"


@lru_cache(maxsize=64)
def _warn_once(reason: str) -> None:
    warnings.warn(f"score, select and gather run as {reason}", RuntimeWarning, stacklevel=4)


def _has_kernels(x: object) -> bool:
    if not _on_cuda(x):
        return True
    runs, reason = cuda_path(x.device.index)
    if not runs:
        _warn_once(reason)
    return runs


def workspace(x: Array, size: Callable[..., int], arguments: tuple[Any, ...]) -> "torch.Tensor | None":
    """Scratch on the GPU, from torch's own pool; on the CPU the core sees to it."""
    if not _on_cuda(x):
        return None
    n_byte = size(*arguments, 1)
    return x.new_empty(n_byte, dtype=sys.modules["torch"].uint8) if n_byte else None


def host(x: Table) -> npt.NDArray[Any]:
    """As an array of NumPy's; a GPU is waited for."""
    return x.detach().cpu().numpy() if _is_torch(x) else np.asarray(x)


def _int32(x: Table, name: str) -> npt.NDArray[np.int32]:
    if type(x) is np.ndarray and x.dtype == np.int32:
        return x
    array = host(x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; expected whole numbers")
    if array.dtype != np.int32 and array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise ValueError(
            f"{name} holds {array.max() if array.max() >= 2**31 else array.min()}; expected numbers that fit int32"
        )
    return np.asarray(array, np.int32)


def _shape(x: Array, name: str, ndim: int) -> tuple[int, ...]:
    if not hasattr(x, "shape"):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a NumPy array or a torch tensor")
    if len(x.shape) != ndim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {ndim} dimensions")
    return tuple(x.shape)


def _empty(example: A, shape: tuple[int, ...], dtype: Any) -> A:
    if isinstance(example, np.ndarray) or not _is_torch(example):
        return cast(A, _empty_numpy(shape, np.dtype(dtype)))
    return cast(
        A, example.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype) if isinstance(dtype, str) else dtype)
    )


def _empty_numpy(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """``np.empty`` from a multiple of 64 bytes on, where torch's tensors begin, too, so that rows are written past the
    caches a line at a time."""
    if dtype.hasobject:  # which the core refuses
        return np.empty(shape, dtype)
    memory = np.empty(math.prod(shape) * dtype.itemsize + 63, np.uint8)
    return np.ndarray(shape, dtype, memory, -memory.__array_interface__["data"][0] % 64)


def n_worker() -> int:
    """Threads that the core may use on the CPU: torch's, where it is loaded."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
