"""The prompt's own forward: the model reads it once, and its cache does what it is there for."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..display.progress import progress, shown
from ..errors import UnsupportedModelError
from .arguments import cache_argument
from .cache import KeptCache
from .generate import GREEDY
from .parts import (
    decoder_of,
    device_of,
    is_multimodal,
    n_known_of,
    placeholders,
    reads_for_itself,
    takes,
    tells_positions,
)


def prefill(
    model: Any,
    cache: KeptCache,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    others: Mapping[str, Any] | None = None,
    sizes: Sequence[int] | None = None,
) -> None:
    """Run the model over the prompt, with the position ids that ``generate`` would give and continue."""
    sizes = [ids.shape[1]] if sizes is None else sizes
    others = others or {}
    run: Callable
    decoder = decoder_of(model)
    if is_multimodal(model):
        module, run = model, _through_outer
    else:
        module = model if reads_for_itself(model) else decoder
        run = partial(_through_forward, sizes=sizes, is_told=tells_positions(model))
    device = device_of(module)  # before ids are looked at: it raises where there are no weights
    _check_ids(model, ids, others, placeholders(model))
    inputs = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask}), **others}
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    # Where nobody sees a bar none is made: that takes a lock of tqdm's, which an interrupt may leave locked for all
    n_step = len(cache.kept_layers) * len(sizes) if shown() else 0
    with progress(total=n_step, desc="prefill, layers") if n_step else nullcontext() as cache.progress:
        try:
            run(module, **inputs, use_cache=True, **cache_argument(module, cache))
        finally:
            cache.progress = None
    if module is not decoder and cache.n_seen != ids.shape[1] and not others:
        raise UnsupportedModelError(
            f"{type(model).__name__} gave its decoder {cache.n_seen} tokens of a prompt of {ids.shape[1]}, so that "
            "nobody knows which is which; expected a model that gives it all, and no more"
        )


def _check_ids(model: Any, ids: torch.Tensor, others: Mapping[str, Any], placeholder_ids: set[int]) -> None:
    """Refuse ids that say that an image stands there, where none was given, and ids that the vocabulary lacks: a GPU's
    error for them ends the process's use of it."""
    if not others and (bare := sorted(placeholder_ids & set(ids.unique().tolist()))):
        raise ValueError(
            f"the prompt holds token {bare[0]}, in whose place {type(model).__name__} puts an image, a video or a "
            "sound, but none was given; expected all that the processor returned: handle.compress(processor(...))"
        )
    n_known = n_known_of(model)
    if n_known is None or not ids.numel():
        return
    known = ids[~torch.isin(ids, torch.tensor(sorted(placeholder_ids), dtype=ids.dtype, device=ids.device))]
    if not known.numel():
        return
    low, high = torch.stack(known.aminmax()).tolist()
    if low < 0 or high >= n_known:
        raise ValueError(f"prompt holds token {low if low < 0 else high}; expected ids in [0, {n_known})")


def _through_outer(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
) -> None:
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    model.generate(input_ids, attention_mask=mask, max_new_tokens=1, **GREEDY, **others)


def _through_forward(module: Any, input_ids: torch.Tensor, sizes: Sequence[int], is_told: bool, **others: Any) -> None:
    if is_told:  # some would count otherwise, such as RoBERTa from its padding id
        real = others.get("attention_mask", torch.ones_like(input_ids)).long()
        others["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    if takes(module, "logits_to_keep"):
        others["logits_to_keep"] = 1
    mask, positions = others.pop("attention_mask", None), others.pop("position_ids", None)
    for begin, end in pairwise([0, *accumulate(sizes)]):
        options = {} if mask is None else {"attention_mask": mask[:, :end]}
        options |= {} if positions is None else {"position_ids": positions[:, begin:end]}
        module(input_ids=input_ids[:, begin:end], **options, **others)
