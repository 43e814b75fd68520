"""Greedy answers to many conversations at once, each going on from a compressed cache."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..prompts.prompt import Prompt
from .arguments import cache_argument
from .cache import KeptCache
from .given_prompts import pad_token
from .offload import device_of

# Plain argmax, whatever the model's generation config says (Qwen2.5's, for one, holds a repetition penalty).
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes
    ----------
    text : str
        Without special tokens, stripped.
    n_token : int
        Generated tokens, the one that ended it included.
    ended : bool
        The model ended by itself, before the limit.
    """

    text: str
    n_token: int
    ended: bool


@torch.no_grad()
def answers(
    model, contexts: Sequence[Prompt], conversations: Sequence[Sequence[int]], cache: KeptCache, max_new_tokens: int
):
    """Continue each conversation greedily; the cache is used up.

    Parameters
    ----------
    model : transformers model
        Wrapped, as the cache was.
    contexts : list of Prompt, one per row
        What the cache has seen, padded on the left.
    conversations : list of list of int, one per row
        Token ids that begin with the context's.
    cache : KeptCache
        As many rows, in the same order.
    max_new_tokens : int

    Returns
    -------
    list of Answer

    Notes
    -----
    Both halves of a row, context and rest, are padded on the left; the cache stands for the first half's columns.
    """
    tokenizer = contexts[0].tokenizer
    tokens, mask = pad_halves(contexts, conversations)
    width = tokens.shape[1]
    device = device_of(model)
    options = {"max_new_tokens": max_new_tokens, **GREEDY, **cache_argument(model, cache)}
    out = model.generate(tokens.to(device), attention_mask=mask.to(device), **options)
    ends = _end_tokens(model)
    return [_answer(tokenizer, row.tolist(), ends) for row in out[:, width:].cpu()]


def pad_halves(contexts: Sequence[Prompt], conversations: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, LongTensor (B, T): each row's context and the rest of its conversation, each padded on the
    left."""
    n_context = max(map(len, contexts))
    width = n_context + max(len(ids) - len(p) for ids, p in zip(conversations, contexts, strict=True))
    tokens = torch.full((len(contexts), width), pad_token(contexts[0].tokenizer))
    mask = torch.zeros_like(tokens)
    for row, seen, ids, prompt in zip(tokens, mask, conversations, contexts, strict=True):
        for part, end in ((ids[: len(prompt)], n_context), (ids[len(prompt) :], width)):
            row[end - len(part) : end], seen[end - len(part) : end] = torch.as_tensor(part), 1
    return tokens, mask


@torch.no_grad()
def logits_after(
    model: Any, contexts: Sequence[Prompt], conversations: Sequence[Sequence[int]], cache: KeptCache, n_last: int
) -> torch.Tensor:
    """Logits (B, N, V) of what follows the contexts, which the cache has seen; it is used up.

    Parameters
    ----------
    model : transformers model
        Wrapped, as the cache was.
    contexts : list of Prompt, one per row
    conversations : list of list of int, one per row
        All token ids, the context's included.
    n_last : int
        How many tokens at the end are asked for. N may be larger: not every model can leave out the others.
    """
    device, known = device_of(model), inspect.signature(model.forward).parameters
    tokens, mask = pad_halves(contexts, conversations)
    n_context = max(map(len, contexts))
    options: dict[str, Any] = {"attention_mask": mask.to(device), "use_cache": True, **cache_argument(model, cache)}
    if "position_ids" in known:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, n_context:].to(device)
    if "logits_to_keep" in known:  # a large vocabulary's take up far more than all else
        options["logits_to_keep"] = n_last
    logits: torch.Tensor = model(tokens[:, n_context:].to(device), **options).logits
    return logits


def _end_tokens(model) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}


def _answer(tokenizer, ids: list[int], ends: set[int]) -> Answer:
    n = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return Answer(tokenizer.decode(ids[:n], skip_special_tokens=True).strip(), n, n > 0 and ids[n - 1] in ends)
