"""Attention of one new token over slots under a mask, without repeating the keys that a group of query heads shares.

transformers repeats them where a mask is given (before 5.2x), or asks SDPA to, which on a CPU takes up to ten times as
long. What is fast depends on the device: cuDNN's kernel for groups, where it takes the call; else the query heads of a
group stand as rows of their key head.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .masks import hidden


def serves(base, implementation: str, query: torch.Tensor, key: torch.Tensor, kwargs: dict) -> bool:
    """Whether :func:`attend` gives what this attention function would."""
    return (
        query.shape[2] == 1
        and implementation == "sdpa"
        and base is ALL_ATTENTION_FUNCTIONS["sdpa"]
        and query.shape[1] % key.shape[1] == 0
        and query.device.type in ("cpu", "cuda")
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and kwargs.get("s_aux") is None
    )


def visible_slots(slots, mask: torch.Tensor | None) -> torch.Tensor | None:
    """What the newest token sees: (B, H or 1, 1, S), bool or additive; None: every slot.

    Parameters
    ----------
    slots : Slots or FixedSlots
    mask : tensor (B or 1, 1, 1, L), or None
        The model's, over logical positions.
    """
    if slots.is_fixed:
        return slots.bias[:, :, None]
    live = None if slots.live is None else slots.live[:, :, None]
    if mask is None:
        return live
    index = slots.pos[:, :, None]
    physical = mask.expand(*index.shape[:3], -1).gather(-1, index)
    return physical if live is None else hidden(physical, live)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scaling: float | None
):
    """Output (B, 1, Hq, Dv), and no weights.

    Parameters
    ----------
    query : tensor (B, Hq, 1, D)
    key, value : tensor (B, H, S, D or Dv)
    visible : tensor (B, H or 1, 1, S), or None
    """
    n_row, n_query_head, _, n_dim = query.shape
    if query.is_cuda and key.dtype != torch.float32:
        per_query_head = visible
        if visible is not None and visible.shape[1] > 1:
            per_query_head = visible.repeat_interleave(n_query_head // key.shape[1], 1)
        if _is_served_by_cudnn(query, key, value, per_query_head):
            return sdpa(query, key, value, attn_mask=per_query_head, scale=scaling, enable_gqa=True).transpose(
                1, 2
            ), None
    rows = query.reshape(n_row, key.shape[1], -1, n_dim)
    if query.is_cuda and key.dtype == torch.float32:
        out = _by_products(rows, key, value, visible, scaling)
    else:
        out = sdpa(rows, key, value, attn_mask=visible, scale=scaling)
    return out.reshape(n_row, 1, n_query_head, -1), None


def _is_served_by_cudnn(query, key, value, visible) -> bool:
    """Whether it takes these; its time is that of reading the keys and values once. Asked of torch for every call: it
    depends on sizes."""
    params = torch.backends.cuda.SDPAParams(query, key, value, visible, 0.0, False, True)
    return torch.backends.cuda.can_use_cudnn_attention(params, debug=False)


def _by_products(rows, key, value, visible, scaling: float | None) -> torch.Tensor:
    """Two matrix products and a softmax, in float32: twice as fast on an H100 as SDPA's kernel, which has few blocks
    for one query.

    Not in less: a logit would be rounded to 8 bits, or in float16 overflow before it is scaled.
    """
    logits = (rows @ key.transpose(-1, -2)) * (rows.shape[-1] ** -0.5 if scaling is None else scaling)
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf")) if visible.dtype == torch.bool else logits + visible
    return logits.softmax(-1) @ value
