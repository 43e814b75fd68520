"""Batch rows of a cache's layers, of whatever kind: taken, repeated, joined."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version

from ..errors import UnsupportedModelError
from .layer import STATES, KeptLayer
from .masks import real_newest

if TYPE_CHECKING:
    from .cache import KeptCache


def repeat(layer: Any, n: int) -> None:
    """Hold each row of a layer ``n`` times."""
    if not has_states(layer):
        layer.batch_repeat_interleave(n)
    elif n_row := _n_row(layer):
        layer.reorder_cache(torch.arange(n_row, device="cpu").repeat_interleave(n))


def select(layer: Any, indices: Any) -> None:
    """Hold these rows of a layer, in this order."""
    if not has_states(layer):
        layer.batch_select_indices(indices)
    elif n_row := _n_row(layer):
        indices = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        layer.reorder_cache(torch.arange(n_row, device="cpu")[indices])


def taken(cache: "KeptCache", indices: Sequence[int]) -> "KeptCache":
    """These rows, in this order, as a cache of their own."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        for name, x in vars(layer).items():
            if isinstance(x, Mapping):  # states by their number, each of which is replaced in place
                setattr(layer, name, dict(x))
    twin.batch_select_indices(torch.tensor(indices, device="cpu"))
    return twin


def takes_padding(layer: Any, n_token: int) -> bool:
    """Whether columns of padding between a row's tokens, ``n_token`` in all, leave what it gives to the others.

    A window is counted in columns, and a state takes padding for tokens; a layer that holds nothing does neither.
    """
    fits = getattr(layer, "is_sliding", False) and n_token <= layer.sliding_window
    return is_kept_alone(layer) or fits or holds_nothing(layer)


def is_kept_alone(layer: Any) -> bool:
    """Whether it holds nothing but keys and values that are compressed."""
    return isinstance(layer, KeptLayer) and not has_states(layer)


def holds_nothing(layer: Any) -> bool:
    """Whether it stands for a layer without a cache of its own, such as one that reads another's."""
    return type(layer).__name__ == "DummyLayer"


def join(layers: Sequence[Any]) -> Any:
    """The rows of layers of one kind as those of one."""
    if any(getattr(layer, "is_fixed", False) for layer in layers):
        raise ValueError("a fixed cache was to be joined; expected the caches that it and others were made from")
    if any(getattr(layer, "held", None) is not None for layer in layers):
        raise ValueError("a cache holds its budget while generating; expected caches of a wrap with when='prefill'")
    if len(set(map(_length, layers))) > 1:
        raise ValueError(
            "the caches differ in length, or in whether they are compressed; expected caches over equally long prompts"
        )
    if not isinstance(layers[0], KeptLayer):
        joined = copy.copy(layers[0])
        vars(joined).update({name: _joined([vars(layer)[name] for layer in layers]) for name in vars(joined)})
        return joined
    if len({layer.keys.shape[2] for layer in layers}) > 1:  # heads that share a budget need more or fewer slots
        layers = [layer.widened(max(layer.keys.shape[2] for layer in layers)) for layer in layers]
    return _kept(layers)


def _length(layer: Any) -> Any:
    """What layers whose rows are joined have in common."""
    if isinstance(layer, KeptLayer):
        return layer.get_seq_length(), layer.is_evicted or layer.keys.shape[2]
    keys = getattr(layer, "keys", None)  # states have none
    return None if keys is None else keys.shape[2]


def _kept(layers: Sequence[Any]) -> Any:
    joined = copy.copy(layers[0])
    of_rows = ["keys", "values", *(STATES if has_states(joined) else ())]
    vars(joined).update({name: _joined([vars(layer)[name] for layer in layers]) for name in of_rows})
    if joined.is_evicted:
        live = [layer.live for layer in layers]
        if any(each is not None for each in live):
            live = [
                torch.ones_like(x.pos, dtype=torch.bool) if each is None else each
                for x, each in zip(layers, live, strict=True)
            ]
        joined.place(torch.cat([layer.pos for layer in layers]), None if live[0] is None else torch.cat(live))
        joined.prompt_shape = (len(joined.keys), *joined.prompt_shape[1:])
        joined.bytes_before = sum(layer.bytes_before for layer in layers)
    return joined


def _joined(values: Sequence[Any]) -> Any:
    """What layers have under one name, as one: rows one after the other, all else as the first has it."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _joined([of_layer[key] for of_layer in values]) for key in first}
    return torch.cat(list(values)) if isinstance(first, torch.Tensor) and first.ndim > 1 else first


# Model types whose linear attention starts anew with every forward of several tokens: what came before is lost to it.
# Some have remembered it since a release of transformers.
_REMEMBER_SINCE = {
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"), "5.13"),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), "5.13"),
    **dict.fromkeys(("lfm2", "lfm2_moe", "zamba", "zamba2"), "5.17"),
}
_RELEASE = Version(transformers.__version__)
FORGETFUL = {"jamba", *(name for name, since in _REMEMBER_SINCE.items() if Version(since) > _RELEASE)}
TELLS_PADDING_ONCE = Version("5.17") > _RELEASE  # linear attention, in the first forward of a prompt alone


def check_newest(decoder: Any, layers: Sequence[Any], mask: Any, n_new: int) -> None:
    """Raise if the newest tokens of a forward, which are several, hold padding that a layer would take for tokens, or
    make a layer forget what came before them."""
    if decoder.config.model_type in FORGETFUL:
        raise UnsupportedModelError(
            f"the linear attention of {type(decoder).__name__} forgets what came before a forward of several tokens, "
            f"and {n_new} follow what the cache has seen; expected one at a time, or generate without a cache of before"
        )
    if any(map(has_states, layers)) and real_newest(mask, n_new) is not None:
        raise UnsupportedModelError(
            "what follows the prompts is padded, and layers of linear attention would take padding for tokens; "
            "expected rows of one length, such as those of cache.batch_select_indices"
        )


def check_end(decoder: Any, cache: "KeptCache") -> None:
    """Raise if a cache's prompts ended in padding that a layer took for tokens."""
    n_prompt = cache.n_prompt
    if min((end for _, end in cache.valid or ()), default=n_prompt) < n_prompt and any(map(has_states, cache.layers)):
        raise UnsupportedModelError(
            f"the prompts are padded on the right, and the linear attention of {type(decoder).__name__} has taken the "
            "padding for tokens, so that nothing can go on from there; expected padding on the left"
        )


def has_states(layer: Any) -> bool:
    """Whether it holds states of linear attention. Those of transformers have no other way to move rows than that of
    beam search."""
    return hasattr(layer, "recurrent_states")


def _states(x: Any) -> Iterator[torch.Tensor]:
    """The tensors of a layer's fields that have rows."""
    if isinstance(x, torch.Tensor):
        yield from [x] if x.ndim > 1 else []
    elif isinstance(x, Mapping):
        for each in x.values():
            yield from _states(each)


def _n_row(layer: Any) -> int:
    """How many rows it holds; 0 if it is empty."""
    return max((len(x) for field in vars(layer).values() for x in _states(field)), default=0)
