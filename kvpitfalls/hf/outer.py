"""What a multimodal model does around its decoder: images become embeddings, and positions count in more than one
dimension.

How far positions are ahead of tokens after its images (``rope_deltas``), such a model keeps on itself, of the latest
prompt only. So a cache keeps its own, which the model gets back whenever the cache goes on.
"""

import re
from collections.abc import Mapping

import torch

from .cache import KeptCache
from .coverage import decoder_of

_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


def is_multimodal(model) -> bool:
    """Whether prompts are to go through the model's own ``generate``: it sees to more than its decoder does."""
    return hasattr(model, "generate") and model.config.get_text_config(decoder=True) is not model.config


def placeholders(model) -> set[int]:
    """The tokens in whose place embeddings of images, videos and sounds are put."""
    ids = (value for name, value in vars(model.config).items() if _PLACEHOLDER.fullmatch(name))
    return {value for value in ids if isinstance(value, int)} if is_multimodal(model) else set()


def outer_of(model) -> torch.nn.Module | None:
    """The module that calls a multimodal model's decoder; None for other models."""
    decoder = decoder_of(model)
    return (
        next((module for module in model.modules() if decoder in module.children()), None)
        if is_multimodal(model)
        else None
    )


def others_of(model, prompt: Mapping) -> dict:
    """What a processor returned beside ids and their mask, such as an image; raises if the model has no use for it."""
    others = {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}
    if is_multimodal(model):
        return others
    if unknown := sorted(set(others) - {"token_type_ids"}):
        raise ValueError(
            f"prompt is a {type(prompt).__name__} with {unknown[0]}; expected input_ids and at most an attention_mask"
        )
    return {}


def give_deltas(outer, cache: KeptCache, n_row: int) -> None:
    """Before a filled cache goes on: the model's positions are ahead as they were for its prompt."""
    if "rope_deltas" in vars(outer):
        deltas, device = cache.origin.deltas, next(outer.parameters()).device
        own = torch.zeros(len(cache.valid or ()), 1, dtype=torch.long) if deltas is None else deltas
        outer.rope_deltas = own[:: max(1, len(own) // n_row)].to(device)


def taken_deltas(outer, n_row: int) -> torch.Tensor | None:
    """What the model keeps of the prompt that it runs, (n_row, 1)."""
    deltas = vars(outer).get("rope_deltas")
    return (
        None if deltas is None else deltas.detach().reshape(len(deltas), -1).repeat_interleave(n_row // len(deltas), 0)
    )
