"""What a user may give as a prompt: token ids, prompts of this package, what a tokenizer returned; made one batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from ..eviction.arrays import Table, as_torch
from ..eviction.layout import PROTECT_WORDS, Layout, Protect, Spans, listed, protected_positions
from ..prompts.prompt import Instructions, Prompt
from .evict import Evict
from .masks import valid_ranges
from .parts import decoder_of, is_multimodal, takes

AnyPrompt: TypeAlias = Prompt | Sequence[Prompt] | Table | Mapping[str, Any]


class Batch(NamedTuple):
    """Prompts as a model takes them.

    Attributes
    ----------
    ids : LongTensor (B, T)
    mask : tensor (B, T), or None
    layout : Layout
        Where real tokens, instructions and protected ones stand.
    others : mapping
        What a processor returned beside ids and their mask.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    layout: Layout
    others: Mapping[str, Any] = {}


def by_name(prompt: AnyPrompt | None, inputs: Mapping[str, Any]) -> Any:
    """The prompt, or what was given by name in its place."""
    if not inputs or (prompt is None and "input_ids" in inputs):
        return inputs or prompt
    prompts = "no prompt" if prompt is None else f"a prompt and {sorted(inputs)[0]}"
    raise TypeError(
        f"compress was given {prompts}; expected a prompt, or all that a tokenizer or a processor returned: "
        "compress(**inputs)"
    )


def marked(prompt: object, instructions: Instructions) -> list[Prompt]:
    """Prompts with these instructions marked in each."""
    prompts = [prompt] if isinstance(prompt, Prompt) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(p, Prompt) for p in prompts):
        raise TypeError(
            f"instructions were given with a {type(prompt).__name__}; expected them only with a Prompt, or a list of "
            "them"
        )
    return [p.marked(instructions) for p in prompts]


def batch_of(model: Any, prompt: AnyPrompt | None, attention_mask: Any, spans: Spans | None, action: Evict) -> Batch:
    """What a user gives as a prompt, made one batch; raises where a row has nothing to evict from, or instructions or
    protection do not fit."""
    others: Mapping[str, Any] = {}
    if isinstance(prompt, Prompt):
        prompt = [prompt]
    if isinstance(prompt, Mapping):
        others = _others_of(model, prompt)
        prompt, attention_mask = _of_tokenizer(prompt, attention_mask)
    if isinstance(prompt, Sequence) and prompt and all(isinstance(p, Prompt) for p in prompt):
        if attention_mask is not None or spans is not None:
            raise ValueError("attention_mask or spans were given with a Prompt; expected them only with token ids")
        batch = pad_left([p for p in prompt if isinstance(p, Prompt)], action)
        _check_lengths(batch.ids, batch.layout.valid)
        return batch
    ids = _tensor(prompt, "prompt", "a Prompt, a list of them, or token ids (T,) or (B, T)")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"prompt has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected a Prompt, or token ids (T,) or (B, T)"
        )
    mask = None if attention_mask is None else _tensor(attention_mask, "attention_mask", "a tensor (B, T)")
    _check_lengths(ids)
    valid = valid_ranges(mask, *ids.shape)
    _check_lengths(ids, valid)
    where = {"valid": valid, "spans": spans, "protect": action.protect}
    layout = Layout.of(*ids.shape, **where, n_sink=action.n_sink, limit=action.limit)
    return Batch(ids, mask, layout, others)


def _check_lengths(ids: torch.Tensor, valid: Sequence[tuple[int, int]] = ()) -> None:
    """Raise where there is nothing to evict from: in all rows, or in one that has its real tokens in ``valid``."""
    if not len(ids):
        raise ValueError("the prompt has no rows; expected at least one")
    for whose, n_token in (("the", ids.shape[1]), *(("a", end - begin) for begin, end in valid)):
        if n_token < 2:
            raise ValueError(
                f"{whose} prompt has {n_token} token{'s' * (not n_token)}; expected at least 2, since there is nothing "
                "to evict from"
            )


def _others_of(model: Any, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor returned beside ids and their mask, such as an image; raises if the model has no use for it."""
    others = {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}
    if is_multimodal(model):
        return others
    if unknown := sorted(set(others) - {"token_type_ids"}):
        raise ValueError(
            f"prompt is a {type(prompt).__name__} with {unknown[0]}; expected input_ids and at most an attention_mask"
        )
    kinds = others.get("token_type_ids")
    if kinds is not None and takes(decoder_of(model), "token_type_ids") and bool(as_torch(kinds).any()):
        raise ValueError(
            f"prompt is a {type(prompt).__name__} with token_type_ids other than 0, which {type(model).__name__} would "
            "look at and compress does not hand on; expected none, or a forward with handle.new_cache()"
        )
    return {}


def _of_tokenizer(encoding: Mapping[str, Any], attention_mask: Any) -> tuple[Any, Any]:
    """Ids and mask of what a tokenizer returns."""
    if "input_ids" not in encoding:
        raise ValueError(
            f"prompt is a {type(encoding).__name__} with no input_ids; expected input_ids and at most an attention_mask"
        )
    if attention_mask is not None and encoding.get("attention_mask") is not None:
        raise ValueError("attention_mask was given twice, once in the prompt; expected it once")
    return encoding["input_ids"], encoding.get("attention_mask") if attention_mask is None else attention_mask


def _tensor(value: Any, name: str, expected: str) -> torch.Tensor:
    try:
        tensor = as_torch(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a {type(value).__name__} that is no tensor; expected {expected}") from error
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the device 'meta', without values; expected {expected}")
    return tensor


def pad_left(prompts: Sequence[Prompt], action: Evict) -> Batch:
    """Prompts of any lengths as one batch. What a prompt says of itself is not checked again."""
    rows, pad = [list(p.token_ids) for p in prompts], pad_token(prompts[0].tokenizer)
    width = max(map(len, rows))
    starts = [width - len(row) for row in rows]
    ids = torch.tensor([[pad] * start + row for row, start in zip(rows, starts, strict=True)], device="cpu")
    mask = torch.tensor([[0] * start + [1] * len(row) for row, start in zip(rows, starts, strict=True)], device="cpu")
    spans = [
        {s.name: (s.start + start, s.end + start) for s in p.spans.values()}
        for p, start in zip(prompts, starts, strict=True)
    ]
    protected: list[list[int]] = [[] for _ in prompts]
    if action.protect is not None:
        of_prompts = [protected_in(p, action.protect, action.n_sink, action.limit) for p in prompts]
        protected = [[start + t for t in row] for row, start in zip(of_prompts, starts, strict=True)]
    layout = Layout(width, [(start, width) for start in starts], spans, protected)
    return Batch(ids, mask if any(starts) else None, layout)


def check_fits(prompt: Prompt, action: Evict, n_layer: int) -> None:
    """Raise as the prefill of a prompt on so many layers would, where the budget has no room for what must be kept."""
    layout = pad_left([prompt], action).layout
    action.of_prompts(layout=layout).spans_of(layout.n_token, layout.valid, n_layer)


def pad_token(tokenizer: Any) -> int:
    """What stands where a row has no token: nothing sees it, so any id of the vocabulary will do."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def protected_in(prompt: Prompt, protect: Protect, n_sink: int, limit: Callable[[int], int]) -> list[int]:
    """Protected token positions of one prompt; a text that is no instruction's name and no role is looked up in it."""
    spans, known = {s.name: (s.start, s.end) for s in prompt.spans.values()}, list[Any]()
    for item in listed(protect):
        if not isinstance(item, str) or item in spans or item in PROTECT_WORDS:
            known.append(item)
        else:
            known.extend(prompt.tokens_of(item) if item in prompt.roles else _tokens_of_text(prompt, item))
    return protected_positions(known, 0, 0, len(prompt), spans, n_sink, limit)


def _tokens_of_text(prompt: Prompt, text: str) -> range:
    """Where a text stands; a text that is not there may be a name that was mistyped."""
    try:
        return range(*prompt.find(text))
    except ValueError as error:
        roles = f", or a role ({', '.join(dict.fromkeys(prompt.roles))})" if prompt.roles else ""
        raise ValueError(
            f"{error}; or the name of an instruction ({', '.join(prompt.spans) or 'there is none'}){roles}"
        ) from error
