"""The verbs in plain torch, in float64: the definition, the oracle of the tests, and what runs on devices without
a kernel.

Same names and signatures as :mod:`kvpitfalls.eviction.ops`. Short on purpose: each verb is meant to be read.
"""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from .arrays import A, Array, Table

__all__ = ["gather", "score", "select"]
_QUERY_BLOCK = 256  # attention rows held at a time: memory is O(block * T), never O(T * T)
_VOTE_RANGES = {"keys": 0, "queries": 2, "more_queries": 4, "window": 8}  # first field of each range, as in csrc/kvp.h
_SUM, _MEAN, _AGE, _MAX = 0, 1, 2, 3
_SMALLEST = float(np.finfo(np.float64).tiny)
_STEP = 0x1E3779B97F4A7C15  # of the scorer "random": odd, and of no pattern
_TOLD_BY = 8  # tokens whose keys tell its rows apart
_NO_MEAN = 2.0**-18  # a mean of unit vectors that is shorter is what rounding left of those that cancel each other out


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
    """How much each cached token matters; the definition of :func:`kvpitfalls.eviction.ops.score`, which has the
    parameters.

    Examples
    --------
    >>> score("norm", np.array([[[[3.0, 4.0], [0.0, 1.0]]]], dtype=np.float32))
    array([[[-5., -1.]]], dtype=float32)
    """
    k = _tensor(keys)
    n_row, n_head, n_token, _ = k.shape
    spans = _valid_ranges(valid, n_row, n_token)
    if scorer == "norm":
        out = -k.double().norm(dim=-1)
    elif scorer == "position":
        t = torch.arange(n_token, device=k.device, dtype=torch.float64)
        rows = [torch.where(t - begin < params.get("n_sink", 4), 2 * n_token - t, t) for begin, _ in spans]
        out = torch.stack(rows)[:, None].expand(n_row, n_head, n_token).clone()
    elif scorer == "attention":
        if queries is None or votes is None:
            raise ValueError("queries or votes is None; scorer 'attention' needs both")
        how: dict[str, Any] = {**params}
        heads = [_attention_row(b, k, _tensor(queries), _array(votes)[b], spans[b], lse, **how) for b in range(n_row)]
        out = torch.stack(heads)
    elif scorer == "keydiff":
        if votes is None:
            raise ValueError("votes is None; scorer 'keydiff' needs them")
        out = torch.stack([_unlike_the_mean(k[b], _array(votes)[b], spans[b]) for b in range(n_row)])
    elif scorer == "lagkv":
        if values is None:
            raise ValueError("values is None; scorer 'lagkv' needs them")
        both = k, _tensor(values)
        out = torch.stack([_unlike_the_next_chunk([x[b] for x in both], spans[b], **params) for b in range(n_row)])
    elif scorer == "random":
        out = torch.zeros(k.shape[:3], dtype=torch.float64, device=k.device)
        for b, (begin, end) in enumerate(spans):
            if begin < end:
                out[b, :, begin:end] = _drawn(k[b, :, begin:end], **params)
    else:
        names = "'norm', 'position', 'attention', 'keydiff', 'lagkv' or 'random'"
        raise ValueError(f"scorer is {scorer!r}; expected {names}")
    for b, (begin, end) in enumerate(spans):
        out[b, :, :begin] = out[b, :, end:] = -torch.inf
    return _like(out.float(), keys)


def _attention_row(
    b: int,
    keys: torch.Tensor,
    queries: torch.Tensor,
    votes: npt.NDArray[Any],
    valid: tuple[int, int],
    lse: Array | None,
    scaling: float = 1.0,
    softcap: float = 0.0,
    kernel_size: int = 1,
    share_heads: int = 0,
) -> torch.Tensor:
    """The attention scores (H,T) of one batch row: csrc/kvp.h states what a vote is."""
    n_head, n_token, n_query = keys.shape[1], keys.shape[2], queries.shape[2]
    group = queries.shape[1] // n_head
    column = torch.zeros(len(votes), queries.shape[1], n_token, dtype=torch.float64, device=keys.device)
    position = torch.arange(n_token, device=keys.device)
    inside = (position >= valid[0]) & (position < valid[1])
    wide = keys[b].double().repeat_interleave(group, 0)
    for start in range(0, n_query, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, n_query))
        q = position[n_token - n_query :][rows]
        if not any(_overlaps(vote, int(q[0]), int(q[-1]) + 1) for vote in votes):
            continue
        logits = scaling * queries[b, :, rows].double() @ wide.transpose(-1, -2)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        visible = (position <= q[:, None]) & inside
        logits = logits.masked_fill(~visible, -torch.inf)
        norm = logits.logsumexp(-1, keepdim=True) if lse is None else _tensor(lse)[b, :, rows, None].double()
        no_softmax = torch.nan if lse is None else 0.0  # a given norm that is not finite casts no vote
        attention = (logits - norm).exp().masked_fill(~norm.isfinite(), no_softmax).masked_fill(~visible, 0.0)
        for v, vote in enumerate(votes):
            voter = inside[q] & (_within(q, vote, "queries") | _within(q, vote, "more_queries"))
            if vote[6] == _MAX and voter.any():
                column[v] = column[v].maximum(attention[:, voter].amax(1))
            elif vote[6] != _MAX:
                column[v] += attention[:, voter].sum(1)
    heads = column.unsqueeze(1) if share_heads else column.unflatten(1, (n_head, group))
    out = torch.zeros(n_head, n_token, dtype=torch.float64, device=keys.device)
    for v, vote in enumerate(votes):
        key = _within(position, vote, "keys") & inside
        n_voter = (inside & (_within(position, vote, "queries") | _within(position, vote, "more_queries"))).sum()
        one = torch.ones_like(position)
        divisor = {_SUM: one, _MEAN: n_voter, _AGE: int(vote[7]) - position, _MAX: one}[int(vote[6])]
        of_heads = heads[v].amax(1) if vote[6] == _MAX else heads[v].mean(1)
        summed = torch.where(key, of_heads / divisor.clamp(min=1), 0.0).expand(n_head, -1)
        pooled = torch.nn.functional.avg_pool1d(summed, kernel_size, 1, kernel_size // 2)
        out = torch.where(key, pooled, out)
        window = _within(position, vote, "window") & inside
        out = torch.where(window, 2.0 + position - max(int(vote[8]), valid[0]), out)
    return out


def _unlike_the_mean(keys: torch.Tensor, votes: npt.NDArray[Any], valid: tuple[int, int]) -> torch.Tensor:
    """The scores (H,T) of one batch row by "keydiff", of keys (H,T,D)."""
    out = torch.zeros(keys.shape[:2], dtype=torch.float64, device=keys.device)
    for vote in votes:
        begin, end = max(int(vote[0]), valid[0]), min(int(vote[1]), valid[1])
        if end - begin <= 2:  # each as like their mean as the other
            continue
        units = keys[:, begin:end].to(torch.float64, copy=True)  # the only copy: a long prompt's is large
        units /= units.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST)
        mean = units.mean(1, keepdim=True)
        length = mean.norm(dim=-1, keepdim=True)
        mean = torch.where(length < _NO_MEAN, 0.0, mean / length)
        out[:, begin:end] = 0.0 - (units @ mean.mT)[..., 0]
    return out


def _unlike_the_next_chunk(
    both: list[torch.Tensor], valid: tuple[int, int], n_sink: float = 4, lag_size: float = 128
) -> torch.Tensor:
    """The scores (H,T) of one batch row by "lagkv", of its keys (H,T,D) and values (H,T,Dv)."""
    (begin, end), n, n_token = valid, int(lag_size), both[0].shape[1]
    first = min(begin + int(n_sink), end)
    last = first + max(0, (end - first) // n - 1) * n
    out = torch.arange(1 - last, n_token - last + 1, dtype=torch.float64, device=both[0].device)
    out[begin:first] = n_token + 1
    out = out.repeat(both[0].shape[0], 1)
    if first < last:
        chunks = [x[:, first : last + n].double().unflatten(1, (-1, n)) for x in both]
        weights = _lag_weights(chunks[0]) + _lag_weights(chunks[1])
        order = weights.argsort(dim=-1, descending=True, stable=True)
        ranks = order.argsort(dim=-1).double().masked_fill(weights.isnan(), torch.nan)
        out[:, first:last] = 0 - ranks.flatten(1)
    return out


def _lag_weights(x: torch.Tensor) -> torch.Tensor:
    """Of the tokens (H,C,L,D) of all chunks but the last, (H,C-1,L): each by the chunk after its own."""
    low, high = (bound[:, 1:] for bound in x.aminmax(dim=2, keepdim=True))
    width = high - low
    spread = ((x[:, :-1] - low) / width.masked_fill(width == 0, torch.inf)).std(-1, correction=min(1, x.shape[-1] - 1))
    return spread.softmax(-1)


def _drawn(keys: torch.Tensor, seed: float = 0, seed_high: float = 0) -> torch.Tensor:
    """The scores (H,n) of one batch row's valid tokens by "random", of their keys (H,n,D): int64 counts modulo 2^64."""
    n_token = keys.shape[1]
    of_heads, of_tokens = (torch.arange(n, device=keys.device) for n in keys.shape[:2])
    told_by = [n_token - 1 - i * n_token // _TOLD_BY for i in range(_TOLD_BY)]
    salts = (4 * keys[:, told_by].float()).nan_to_num().clamp(-(2.0**30), 2.0**30).round().long().flatten(1)
    salts = _mixed(salts + torch.arange(salts.shape[1], device=keys.device) * _STEP).sum(-1)
    of_row = (int(seed) + (int(seed_high) << 32) + _STEP * n_token) % 2**62
    of_head = _mixed(_mixed(salts + of_heads) + of_row)
    return (_mixed(of_head[:, None] + of_tokens * _STEP) & 0xFFFFFF).double() * 2.0**-24


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Of each of the numbers int64 another, all of whose bits depend on all of its own.

    The finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def _within(position: torch.Tensor, vote: npt.NDArray[Any], what: str) -> torch.Tensor:
    begin = _VOTE_RANGES[what]
    return (position >= int(vote[begin])) & (position < int(vote[begin + 1]))


def _overlaps(vote: npt.NDArray[Any], begin: int, end: int) -> bool:
    return any(max(begin, vote[i]) < min(end, vote[i + 1]) for i in (2, 4))


def select(
    scores: A, quotas: Table, *, segments: Table | None = None, protect: Table | None = None, valid: Table | None = None
) -> tuple[A, A]:
    """The positions to keep; the definition of :func:`kvpitfalls.eviction.ops.select`, which has the parameters.

    Examples
    --------
    >>> select(np.array([[[5, 1, 4, 2]]], dtype=np.float32), [1, 1], segments=[0, 2, 4])
    (array([[[0, 2]]], dtype=int32), array([[2]], dtype=int32))
    """
    s = _tensor(scores)
    n_row, n_head, n_token = s.shape
    each = np.asarray(_array(quotas), np.int32)
    each = each.reshape(1, 1, -1) if each.ndim < 2 else each[:, None] if each.ndim == 2 else each
    each = np.broadcast_to(each, (n_row, n_head, each.shape[-1]))
    edges = np.broadcast_to([0, n_token] if segments is None else _array(segments), (n_row, each.shape[-1] + 1))
    spans = _valid_ranges(valid, n_row, n_token)
    shielded = (
        np.zeros((n_row, n_token), bool)
        if protect is None
        else np.broadcast_to(_array(protect).astype(bool), (n_row, n_token))
    )
    out = np.full((n_row, n_head, int(each.sum(-1).max())), -1, np.int32)
    counts = np.zeros((n_row, n_head), np.int32)
    values = s.float().cpu().numpy()
    for b, h in np.ndindex(n_row, n_head):
        kept: list[int] = []
        for j, quota in enumerate(each[b, h]):
            begin, end = max(edges[b, j], spans[b][0]), min(edges[b, j + 1], spans[b][1])
            t = np.arange(begin, max(begin, end))
            v = values[b, h, t]
            order = np.lexsort(
                (t, np.where(shielded[b, t] | np.isnan(v), 0, -v), np.isnan(v) & ~shielded[b, t], ~shielded[b, t])
            )
            kept += sorted(t[order[:quota]])
        out[b, h, : len(kept)] = kept
        counts[b, h] = len(kept)
    return _like(torch.from_numpy(out), scores), _like(torch.from_numpy(counts), scores)


def share(
    scores: Array, segments: npt.NDArray[np.int32], quotas: npt.NDArray[np.int32], floors: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """How many positions each head keeps where heads share; the definition of
    :func:`kvpitfalls.eviction.ops.share`, which has the parameters."""
    counts = np.zeros(quotas.shape, np.int32)
    values = _array(scores)
    for b, s in np.ndindex(len(segments), quotas.shape[2]):
        v = values[b, :, segments[b, s] : segments[b, s + 1]]
        head, t = np.indices(v.shape)
        order = t, np.where(np.isnan(v), 0, -v), np.isnan(v)  # from the last that tells two apart to the first
        place = np.lexsort(order, axis=-1).argsort(-1) if v.size else t  # of each, in its own head
        quota, floor = (x[b, :, s] for x in (quotas, floors))
        sure = np.maximum(floor, np.minimum(np.isposinf(v).sum(-1), quota))
        first = [x.ravel() for x in (t, head, *order[1:], place >= sure[:, None])]
        counts[b, :, s] = np.bincount(head.ravel()[np.lexsort(first)[: quota.sum()]], minlength=len(v))
    return counts


def gather(keys: A, values: A, positions: Array) -> tuple[A, A]:
    """The kept rows of keys and values; the definition of :func:`kvpitfalls.eviction.ops.gather`, which has the
    parameters.

    Examples
    --------
    >>> x = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    >>> gather(x, x, np.array([[[0, 2]]], dtype=np.int32))[0].tolist()
    [[[[0.0, 1.0], [4.0, 5.0]]]]
    """
    index = _tensor(positions).long().to(_tensor(keys).device)[..., None]
    return _kept_rows(keys, index), _kept_rows(values, index)


def _kept_rows(x: A, index: torch.Tensor) -> A:
    t = _tensor(x)
    rows = t.gather(2, index.clamp(min=0).expand(*index.shape[:3], t.shape[-1]))
    return _like(rows.masked_fill(index < 0, 0), x)


def _valid_ranges(valid: Table | None, n_row: int, n_token: int) -> list[tuple[int, int]]:
    return [(0, n_token)] * n_row if valid is None else [(int(begin), int(end)) for begin, end in _array(valid)]


def _tensor(x: Array) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.from_numpy(np.asarray(x))


def _array(x: Table) -> npt.NDArray[Any]:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _like(result: torch.Tensor, example: A) -> A:
    return cast(A, result.to(example.device) if isinstance(example, torch.Tensor) else result.cpu().numpy())
