"""Attention sinks that are learned logits (gpt-oss): each head has one, and it takes its share of every softmax."""

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..eviction.arrays import as_torch

if TYPE_CHECKING:
    import torch

    from .base import Inputs

# Logits that torch makes at once, in float32: what a processor's caches hold; elsewhere 64 MiB, which keep a GPU busy.
TILE = {"cpu": 2**20, "elsewhere": 2**24}


def n_at_once(device: "torch.device", n_logit: int) -> int:
    """How many queries are worked on together, each of which has ``n_logit`` logits over all heads.

    Examples
    --------
    >>> import torch
    >>> n_at_once(torch.device("cpu"), 2**15), n_at_once(torch.device("cpu"), 2**30)
    (32, 1)
    """
    return max(1, TILE.get(device.type, TILE["elsewhere"]) // n_logit)


def denominators_with_sinks(inputs: "Inputs", votes: npt.NDArray[np.int32]) -> "torch.Tensor":
    """Log of each voter's softmax denominator, its head's sink included.

    Parameters
    ----------
    inputs : Inputs
        Of torch tensors, with ``sinks``.
    votes : ndarray of int, shape (B, V, 10)
        The fields of ``kvp_vote_field`` in ``csrc/kvp.h``.

    Returns
    -------
    tensor of float32, shape (B, H*G, Q)
        Minus infinity for queries that vote on nothing: they are not computed.
    """
    import torch

    if inputs.queries is None or inputs.sinks is None:
        raise ValueError("queries or sinks are None; expected both")
    keys, queries = as_torch(inputs.keys), as_torch(inputs.queries)
    n_query_head, first = queries.shape[1], keys.shape[2] - queries.shape[2]
    out = torch.full(queries.shape[:3], -math.inf, dtype=torch.float32, device=keys.device)
    sinks = inputs.sinks.detach().float().to(keys.device)[:, None]
    for b, (begin, end) in enumerate(inputs.valid):
        own = keys[b].float()
        grouped = queries[b].unflatten(0, (len(own), -1))
        voters = [t for t in _voters(votes[b]) if max(begin, first) <= t < end]
        step = n_at_once(keys.device, n_query_head * (end - begin))
        for block in (voters[i : i + step] for i in range(0, len(voters), step)):
            at = torch.tensor(block, device=keys.device)
            tile = (grouped[:, :, at - first].float() * inputs.scaling).flatten(1, 2)
            logits = tile @ own[:, begin : block[-1] + 1].mT
            if inputs.softcap:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            logits = logits.view(n_query_head, len(block), -1)
            hidden = torch.arange(begin, block[-1] + 1, device=keys.device) > at[:, None]
            of_keys = logits.masked_fill_(hidden, -math.inf).logsumexp(-1)
            out[b, :, at - first] = torch.logaddexp(of_keys, sinks)
    return out


def _voters(votes: npt.NDArray[np.int32]) -> list[int]:
    return sorted({t for vote in votes for first in (2, 4) for t in range(vote[first], vote[first + 1])})
