"""Attention sinks that are learned logits (gpt-oss): each head has one, and it takes its share of every softmax."""

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from .base import Inputs

_QUERY_BLOCK = 256  # attention rows held at a time


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
    keys, queries = torch.as_tensor(inputs.keys), torch.as_tensor(inputs.queries)
    n_query, n_token, group = queries.shape[2], keys.shape[2], queries.shape[1] // keys.shape[1]
    out = torch.full(queries.shape[:3], -math.inf, dtype=torch.float32, device=keys.device)
    sinks = inputs.sinks.detach().float().to(keys.device)
    position = torch.arange(n_token, device=keys.device)
    for b, (begin, end) in enumerate(inputs.valid):
        wide = keys[b].float().repeat_interleave(group, 0).transpose(-1, -2)
        voters = [t for t in _voters(votes[b]) if max(begin, n_token - n_query) <= t < end]
        for block in (voters[i : i + _QUERY_BLOCK] for i in range(0, len(voters), _QUERY_BLOCK)):
            at = torch.tensor(block, device=keys.device)
            logits = inputs.scaling * (queries[b, :, at - (n_token - n_query)].float() @ wide)
            if inputs.softcap:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            visible = (position <= at[:, None]) & (position >= begin) & (position < end)
            of_keys = logits.masked_fill(~visible, -math.inf).logsumexp(-1)
            out[b, :, at - (n_token - n_query)] = torch.logaddexp(of_keys, sinks[:, None])
    return out


def _voters(votes: npt.NDArray[np.int32]) -> list[int]:
    return sorted({t for vote in votes for first in (2, 4) for t in range(vote[first], vote[first + 1])})
