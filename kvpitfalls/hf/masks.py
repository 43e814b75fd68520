"""Attention masks over a cache whose slots are not in order: the model's mask is logical, and is read through the
slots' positions."""

from collections.abc import Sequence

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError


def valid_ranges(mask: torch.Tensor | None, n_row: int, n_token: int) -> list[tuple[int, int]]:
    """Per row, the range of real tokens of a prompt, from its padding mask.

    Parameters
    ----------
    mask : tensor (B, T), or None
        1 where a token is real and 0 where it is padding, as tokenizers give it; models count positions by it.

    Raises
    ------
    ValueError
        If a row's real tokens are not one block, or another number is in it.
    """
    if mask is None:
        return [(0, n_token)] * n_row
    if mask.ndim != 2 or tuple(mask.shape) != (n_row, n_token):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected ({n_row}, {n_token}), one entry per token of the "
            "prompt"
        )
    ranges, mask = [], mask.cpu()
    if len(others := mask[(mask != 0) & (mask != 1)]):
        raise ValueError(f"attention_mask holds {others[0].item():g}; expected 1 for a real token and 0 for padding")
    for b, row in enumerate(mask.bool()):
        real = row.nonzero()[:, 0].tolist()
        if not real:
            raise ValueError(f"row {b} of attention_mask hides every token; expected at least one real token")
        if real[-1] - real[0] + 1 != len(real):
            raise ValueError(
                f"row {b} of attention_mask has padding between real tokens; expected padding on the left or right only"
            )
        ranges.append((real[0], real[-1] + 1))
    return ranges


def check_padding(mask, valid: Sequence[tuple[int, int]] | None, n_prompt: int) -> None:
    """Raise unless a later call's padding mask hides of each prompt what was padding at first, and nothing else.

    Positions are counted by the mask, so that those of new tokens would not follow the prompt's.

    Parameters
    ----------
    mask : tensor (B, L), or anything else, which is not looked at
        There may be fewer rows than the cache has, each standing for as many.
    valid : list of (int, int), or None
        Of the cache: per row, the range of real tokens of its prompt. None before there is one.
    n_prompt : int
        How many columns of the mask are the prompt's.
    """
    if not valid or not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] < n_prompt:
        return
    if not len(mask) or len(valid) % len(mask):
        return
    places = torch.arange(n_prompt, device="cpu")
    wanted = torch.stack([(places >= begin) & (places < end) for begin, end in valid])
    shown = mask[:, :n_prompt].bool().cpu().repeat_interleave(len(valid) // len(mask), 0)
    if len(differing := (shown != wanted).nonzero()):
        row, place = differing[0].tolist()
        raise ValueError(
            f"attention_mask hides other tokens of the prompt than its prefill did (row {row}, token {place}); "
            "expected the same, then "
            "what follows"
        )


def columns_of(mask, n_seen: int, n_new: int):
    """A later forward's padding mask without columns of tokens that are yet to come, as the model reads it; raises if
    it lacks some. Anything else is not looked at."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return mask
    if mask.shape[1] < n_seen + n_new:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; expected {n_seen + n_new}, for {n_seen} tokens in the cache "
            f"and {n_new} new ones (prefill_chunk_size of transformers 4 gives the mask of the chunk)"
        )
    return mask[:, : n_seen + n_new]


def is_causal(mask, padding, n_seen: int, n_new: int) -> bool:
    """Whether a model's mask over logical positions lets each new token see itself and all before it, and no other.

    Parameters
    ----------
    mask : tensor (B or 1, 1 or Hq, n_new, L), or None
        Bool (True = visible) or additive. None is causal, and so is a padding mask, as FlashAttention takes it.
    padding : tensor (B, L), or None
        The padding mask. Padding is hidden from real tokens; what it sees itself nobody looks at.
    n_seen, n_new : int
        How many tokens stand in the cache, and how many come.
    """
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return True
    n_all = n_seen + n_new
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] < n_all:
        return False
    is_padded = isinstance(padding, torch.Tensor) and padding.ndim == 2
    real = padding[:, :n_all].to(mask.device).bool() if is_padded else mask.new_ones(1, n_all, dtype=torch.bool)
    token = torch.arange(n_all, device=mask.device)
    for rows in token[n_seen:].split(_ROWS):  # not all at once: a mask of a long prompt is large
        given = mask[:, :, rows - n_seen, :n_all]
        visible = given if given.dtype == torch.bool else given == 0
        wanted = (token <= rows[:, None]) & real[:, None, None]
        if bool(((visible != wanted) & real[:, None, rows, None]).any()):
            return False
    return True


def real_newest(mask, n_new: int) -> torch.Tensor | None:
    """Which of the newest tokens are real, bool (B, n_new), from a forward's padding mask; None: all of them."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    newest = mask[:, mask.shape[1] - n_new :].bool().cpu()
    return None if bool(newest.all()) else newest


def physical_mask(slots, mask: torch.Tensor | None, query: torch.Tensor, implementation: str) -> torch.Tensor | None:
    """The mask (B, Hq or 1, q, S) over the slots of an evicted layer, in the kind the attention function takes; None
    where all is visible.

    Parameters
    ----------
    slots : Slots
        Of the layer, after its update.
    mask : tensor (B or 1, 1 or Hq, q, L), or None
        The model's mask over logical positions: bool (True = visible) or additive.
    query : tensor (B, Hq, q, D)
    implementation : str
        "eager" adds its mask, "sdpa" takes bool; another one takes what the model makes for it.
    """
    n_row, n_query_head, n_new = query.shape[:3]
    adds = _adds(implementation, mask)
    if slots.is_fixed and n_new == 1:
        mask = None  # a captured step has none that grows, and the slots know what is padding
    if implementation not in ("sdpa", "eager") and not _takes_mask(implementation, mask):
        is_causal = _makes_as(implementation, "flash_attention_2")  # aligned to the newest token, whatever is older
        if mask is None and slots.live is None and (is_causal or (n_new == 1 and not _makes_as(implementation, _FLEX))):
            return None
        raise UnsupportedModelError(
            f"attention implementation {implementation!r}{' with padding' if is_causal else ''} is not supported on a "
            "compressed cache, since the model makes it no masks (B, H, q, T); expected "
            "model.set_attn_implementation('sdpa') or 'eager', or for a function of your own "
            "AttentionMaskInterface.register"
        )
    is_large = n_new > 1 and query.shape[1] * n_new * slots.pos.shape[-1] >= _LARGE
    if is_large and (shared := _of_all_heads(slots, mask, n_new)) is not None:
        return _kind(shared, query, adds) if mask is None else shared
    if mask is None:
        if n_new == 1:
            return None if slots.live is None else _kind(_per_query_head(slots.live, query)[:, :, None], query, adds)
        newest = torch.arange(slots.seen - n_new, slots.seen, device=query.device)
        visible = _per_query_head(slots.pos, query)[:, :, None] <= newest[:, None]
        return _kind(
            visible if slots.live is None else visible & _per_query_head(slots.live, query)[:, :, None],
            query,
            adds,
        )
    index = _per_query_head(slots.pos, query)[:, :, None].expand(-1, -1, n_new, -1)
    physical = mask.expand(n_row, n_query_head, n_new, -1).gather(-1, index)
    if slots.live is None:
        return physical
    return hidden(physical, _per_query_head(slots.live, query)[:, :, None])


def hidden(mask: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The mask, bool or additive, of which empty slots are hidden, too."""
    return mask & live if mask.dtype == torch.bool else mask.masked_fill(~live, torch.finfo(mask.dtype).min)


_ROWS = 1024
_LARGE = 2**24  # entries of a mask: a smaller one costs less than it takes to look whether one head's does for all


def _of_all_heads(slots, mask: torch.Tensor | None, n_new: int) -> torch.Tensor | None:
    """The mask (B or 1, 1, q, S) if it is the same for all heads; None if not, or if that cannot be told.

    It is where the newest tokens stand last and see every older slot, as under all but sliding attention. A chunk of
    4,096 tokens over 20,000 slots then has a mask of 80 MB and not, for 32 heads, of 2.5 GB.
    """
    live, n_old = slots.live, slots.seen - n_new
    if slots.is_fixed or slots.n_after < n_new or (live is not None and bool((live != live[:, :1]).any())):
        return None
    older = slots.pos[..., :-n_new]
    if mask is None:
        newest = torch.ones(n_new, n_new, dtype=torch.bool, device=older.device).tril()[None, None]
    elif mask.shape[1] > 1 or mask.shape[-1] != slots.seen:
        return None
    else:
        held = torch.zeros(len(older), n_old, dtype=torch.bool, device=older.device).scatter_(1, older.flatten(1), True)
        before = mask[..., :n_old]
        sees_all = before.all(-2) if mask.dtype == torch.bool else before.amin(-2) == 0
        if bool((held[:, None] & ~sees_all).any()):
            return None
        newest = mask[..., n_old:]
    seen = torch.full_like(newest[..., :1], newest.dtype == torch.bool).expand(-1, -1, -1, older.shape[-1])
    shared = torch.cat([seen, newest], -1)
    return shared if live is None else hidden(shared, live[:, :1, None])


def _per_query_head(per_key_head: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return per_key_head.repeat_interleave(query.shape[1] // per_key_head.shape[1], 1)


def _adds(implementation: str, mask) -> bool:
    """Whether an attention function adds its mask to the logits, and does not take bool; told by the model's mask."""
    if isinstance(mask, torch.Tensor):
        return mask.dtype != torch.bool
    return implementation == "eager" or _makes_as(implementation, "eager")


_FLEX = "flex_attention"


def _makes_as(implementation: str, other: str) -> bool:
    """Whether transformers makes masks for an attention function as for ``other``; kernels have names of their own."""
    makers = ALL_MASK_ATTENTION_FUNCTIONS
    return implementation in makers and other in makers and makers[implementation] is makers[other]


def _takes_mask(implementation: str, mask) -> bool:
    """Whether an attention function that is not transformers' own takes a mask (B, H, q, S): it was given one, or the
    model would make it one where it needs any."""
    if mask is not None:
        return isinstance(mask, torch.Tensor) and mask.ndim == 4
    others = ("flash_attention_2", _FLEX)
    return implementation in ALL_MASK_ATTENTION_FUNCTIONS and not any(_makes_as(implementation, x) for x in others)


def _kind(visible: torch.Tensor, query: torch.Tensor, adds: bool) -> torch.Tensor:
    if not adds:
        return visible
    return torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~visible, torch.finfo(query.dtype).min
    )
