"""Scores of the slots of a layer from which tokens have gone: a policy judges them as it judges a prompt's tokens.

In each row the empty slots, if any, stand first.
"""

import torch

from ..eviction import ops
from ..eviction.allocation import raised_at
from ..eviction.arrays import as_torch
from ..policies import Inputs, Vote
from .forward import AttentionCall


def inputs_of(call: AttentionCall, queries, valid, segments=None) -> Inputs:
    """What a policy is given.

    Parameters
    ----------
    call : AttentionCall
    queries : tensor (B, Hq, Q, D), or None
        Of the newest Q slots.
    valid : list of (int, int)
        Per row, the slots that hold a token.
    segments : list of list of (int, int), optional
        Per row, the slots that are judged apart; all of them by default.
    """
    segments = [[row] for row in valid] if segments is None else segments
    spans: list[list[tuple[int, int]]] = [[] for _ in valid]
    # denominators that attention told are of the prompt's queries, not of these
    return Inputs.of(call, queries=queries, lse=None, valid=valid, segments=segments, spans=spans)


def received(call: AttentionCall, fronts: torch.Tensor, votes: list[list[Vote]]) -> torch.Tensor:
    """Attention that slots received in this call from the queries that vote on them: (B, H, slots).

    ``fronts``: empty slots at the start of each row.
    """
    n_slot = call.keys.shape[2]
    inputs = inputs_of(call, call.queries, [(min(front, n_slot - 1), n_slot) for front in fronts.tolist()])
    return over_heads(as_torch(inputs.attend(votes)), call).clamp(min=0)  # minus infinity where a row is empty


def over_heads(scores: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """One score for all heads where one choice must serve them."""
    return scores.double().mean(1, keepdim=True).float() if call.share_heads else scores


def best_first(
    scores: torch.Tensor, pos: torch.Tensor, front: torch.Tensor, edges: torch.Tensor, floors: torch.Tensor
) -> torch.Tensor:
    """The best of each segment above all, as many as its floor says; heads hold different tokens, so each is a row
    here.

    Parameters
    ----------
    scores : tensor (B, H, slots)
    pos : LongTensor (B, H, slots)
        The tokens that the slots hold.
    front : LongTensor (B,)
        Empty slots at the start of each row.
    edges, floors : tensor (B, S+1) and (B, S)
        Of the segments, in tokens.
    """
    n_head, n_slot = scores.shape[1:]
    empty = torch.arange(n_slot, device="cpu") < front[:, None]
    pos = pos.masked_fill(
        empty[:, None].to(pos.device), -1
    ).contiguous()  # ascending, so an edge is found by its position
    cuts = torch.searchsorted(pos, edges.to(pos)[:, None].expand(-1, n_head, -1).contiguous())
    cuts = torch.nn.functional.pad(cuts, (0, 1), value=n_slot).flatten(0, 1).cpu().numpy()
    quotas = torch.nn.functional.pad(floors, (0, 1)).repeat_interleave(n_head, 0)[
        :, None
    ]  # none for what came after the segments
    first, _ = ops.select(scores.reshape(-1, 1, n_slot), quotas.numpy(), segments=cuts)
    return as_torch(raised_at(scores, first.reshape(*scores.shape[:2], -1)))
