"""A key/value cache that holds fewer entries than it has seen, and says which."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..errors import NotInterceptedError

_LAZY_TAKES_VALUES = len(inspect.signature(DynamicLayer.lazy_initialization).parameters) > 2


class Slots(NamedTuple):
    """What stands where in an evicted layer: ``pos``, ``live`` and ``seen`` of :class:`KeptLayer`."""

    pos: torch.Tensor
    live: torch.Tensor | None
    seen: int


class KeptLayer(DynamicLayer):
    """One layer's keys and values after eviction.

    Lengths are *logical* everywhere (how many tokens were seen), so position ids, ``generate`` and the mask builder need not know that
    entries are gone. Slot ``s`` of head ``h`` holds the token at logical position ``pos[b, h, s]``.

    Attributes
    ----------
    seen : int
        Logical length.
    pos : LongTensor (B, H, S), or None
        None: nothing was evicted and slot s holds position s.
    live : BoolTensor (B, H, S), or None
        Slots that hold a token; None: all. (A padded batch keeps different numbers of tokens in its rows.)
    shared : bool
        The model mixes heads after the cache, or caches latents, so one choice of tokens served all heads.
    """

    is_compileable = False

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.pos = self.live = None
        self.kept_positions = self.kept_counts = None  # what eviction left of the prompt, int32 (B,H,K) and (B,H), on the CPU
        self.prompt_shape = None  # (B, H, T) when the prompt was evicted
        self.bytes_before = 0
        self.shared = False

    def update(self, key_states, value_states, *args, **kwargs):
        """Append new rows; called by the model. Refused outside a wrapped model, whose masks would not fit."""
        from .intercept import current_forward

        forward = current_forward()
        if forward is None:
            raise NotInterceptedError(
                "a KeptCache was given to a model that is not wrapped; expected a call inside `with kvpitfalls.wrap(model, ...)`"
            )
        if torch.compiler.is_compiling():
            raise NotImplementedError("torch.compile is running; expected an uncompiled model, since a KeptCache changes shape")
        if not self.is_initialized:
            self.lazy_initialization(*((key_states, value_states) if _LAZY_TAKES_VALUES else (key_states,)))
        n_new = key_states.shape[-2]
        if self.pos is not None:
            new = torch.arange(self.seen, self.seen + n_new, device=self.pos.device).expand(*self.pos.shape[:2], n_new)
            self.pos = torch.cat([self.pos, new], -1)
            if self.live is not None:
                self.live = torch.cat([self.live, torch.ones_like(new, dtype=torch.bool)], -1)
        self.keys = torch.cat([self.keys, key_states], -2)
        self.values = torch.cat([self.values, value_states], -2)
        self.seen += n_new
        forward.expect(self, n_new)
        return self.keys, self.values

    @property
    def slots(self) -> Slots | None:
        """What stands where; None if nothing was evicted."""
        return None if self.pos is None else Slots(self.pos, self.live, self.seen)

    def keep(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> None:
        """Hold only these rows; ``positions`` int32 (B,H,K), -1 where a row keeps fewer than K."""
        self.bytes_before = _bytes(self.keys) + _bytes(self.values)
        self.prompt_shape = tuple(self.keys.shape[:3])
        self.keys, self.values = keys, values
        self.pos = positions.long().clamp(min=0).to(keys.device)
        self.live = None if bool((counts == positions.shape[-1]).all()) else (positions >= 0).to(keys.device)
        self.kept_positions, self.kept_counts = positions.cpu().numpy(), counts.cpu().numpy()

    def get_seq_length(self, *args) -> int:
        """The logical length."""
        return self.seen

    def get_mask_sizes(self, query_length):
        """Logical sizes for the mask; an int, or before transformers 5.4 the tensor of cache positions."""
        n_new = query_length.shape[0] if isinstance(query_length, torch.Tensor) and query_length.ndim else int(query_length)
        return self.seen + n_new, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_croppable(self) -> bool:
        """True as long as nothing was evicted."""
        return self.pos is None

    def crop(self, n: int) -> None:
        """Drop the newest ``-n`` tokens (or, n > 0, cut down to n); only newest tokens that were added after eviction can go."""
        drop = -n if n <= 0 else self.seen - n
        if drop <= 0 or not self.is_initialized:
            return
        added = self.seen - (self.prompt_shape[2] if self.pos is not None else 0)
        if drop > added:
            raise ValueError(f"crop would drop {drop} tokens, but only the newest {added} came after eviction; the others are gone")
        self.keys, self.values = self.keys[..., :-drop, :], self.values[..., :-drop, :]
        self.seen -= drop
        if self.pos is not None:
            self.pos = self.pos[..., :-drop]
            self.live = None if self.live is None else self.live[..., :-drop]

    def reset(self) -> None:
        """Empty the layer; the next prompt is compressed again."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx) -> None:
        """Beam search: rows move."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices) -> None:
        """Keep some batch rows, in the given order."""
        self._map_rows(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def _map_rows(self, rows) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = rows(self.keys), rows(self.values)
        self.pos = None if self.pos is None else rows(self.pos)
        self.live = None if self.live is None else rows(self.live)
        if self.kept_positions is not None:
            self.kept_positions = rows(torch.from_numpy(self.kept_positions)).numpy()
            self.kept_counts = rows(torch.from_numpy(self.kept_counts)).numpy()
            self.prompt_shape = (len(self.kept_counts), *self.prompt_shape[1:])


class KeptCache(DynamicCache):
    """A :class:`transformers.DynamicCache` whose full-attention layers hold what a policy kept of the prompt.

    Give it to ``model.generate(ids, past_key_values=copy.deepcopy(cache))`` inside the wrap that made it; ``ids`` start with the prompt.
    Lengths and positions are logical. Sliding-window and linear-attention layers are the stock ones, since their memory is bounded already.

    Attributes
    ----------
    spans : list of dict of str to (int, int)
        Per row, the instructions in tokens.
    valid : list of (int, int), or None
        Per row, the range of real tokens of the prompt; None before a prompt was seen.
    """

    action = None
    fingerprint: str | None = None  # of the model that filled it
    spans: Sequence[Mapping[str, tuple[int, int]]] = ()
    valid: Sequence[tuple[int, int]] | None = None

    def __init__(self, config=None, action=None):
        super().__init__(config=config)
        self.adopt(config, action)

    def adopt(self, config, action) -> "KeptCache":
        """Replace the plain layers of this empty cache. ``action`` is called with each layer after its prefill."""
        fresh = DynamicCache(config=config).layers
        self.layers = [KeptLayer(i) if type(layer) is DynamicLayer else layer for i, layer in enumerate(fresh)]
        self.layer_class_to_replicate = None
        self.action, self.spans, self.valid, self.fingerprint = action, [], None, None
        return self

    def save(self, path) -> None:
        """Write the cache to a safetensors file, all at once or not at all; :func:`kvpitfalls.load_cache` reads it.

        Raises
        ------
        ValueError
            If it is empty, or holds its budget while generating.
        """
        from .cache_file import save_cache

        save_cache(self, path)

    @classmethod
    def join(cls, caches: "Sequence[KeptCache]") -> "KeptCache":
        """The rows of several caches as one batch. They must have seen equally long prompts and hold equally many slots."""
        first = copy.copy(caches[0])
        first.layers = [_join_layers([cache.layers[i] for cache in caches]) for i in range(len(first.layers))]
        first.spans = [row for cache in caches for row in cache.spans]
        first.valid = [row for cache in caches for row in cache.valid]
        return first

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        super().batch_repeat_interleave(repeats)
        self._map_rows([row for row in range(len(self.valid or [])) for _ in range(repeats)])

    def batch_select_indices(self, indices) -> None:
        """Keep some batch rows, in the given order."""
        super().batch_select_indices(indices)
        self._map_rows(torch.arange(len(self.valid or []))[indices.cpu() if isinstance(indices, torch.Tensor) else indices].tolist())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: rows move."""
        super().reorder_cache(beam_idx)
        self._map_rows(beam_idx.tolist())

    def _map_rows(self, rows: list[int]) -> None:
        if self.valid is not None:
            self.valid = [self.valid[row] for row in rows]
            self.spans = [self.spans[row] for row in rows] if self.spans else self.spans

    @property
    def kept_layers(self) -> list[KeptLayer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, KeptLayer)]

    def positions(self, layer: int) -> np.ndarray:
        """Which tokens of the prompt layer ``layer`` holds: int32 (B, H, K), ascending, -1 where a row holds fewer than K."""
        of_layer = self.layers[layer]
        if not isinstance(of_layer, KeptLayer):
            raise ValueError(f"layer {layer} is a {type(of_layer).__name__}, which is not compressed")
        if not of_layer.seen:
            raise ValueError("the cache is empty; expected one that has seen a prompt")
        if of_layer.kept_positions is not None:
            return of_layer.kept_positions
        whole = np.arange(of_layer.seen, dtype=np.int32)
        return np.broadcast_to(whole, (*of_layer.keys.shape[:2], of_layer.seen))

    def kept(self, span: str | tuple[int, int], row: int = 0) -> np.ndarray:
        """Kept share of an instruction, float64 (layers, H): by name, or by token range (start, end)."""
        if isinstance(span, str):
            of_row = self.spans[row] if row < len(self.spans) else {}
            if span not in of_row:
                raise ValueError(
                    f"span is {span!r}; expected one of {', '.join(of_row) or 'none: the cache was made without instructions'}"
                )
            span = of_row[span]
        begin, end = span
        shares = [((p := self.positions(layer.index)[row]) >= begin) & (p < end) for layer in self.kept_layers]
        return np.stack([inside.sum(-1) for inside in shares]) / (end - begin)

    def report(self) -> dict:
        """What eviction really did.

        Returns
        -------
        dict
            ``n_tokens`` (prompt length), ``layers`` (list of dict: index, kept tokens per row and head, bytes before and after),
            ``not_compressed`` (index -> why, for the layers left as they are), ``bytes_before``, ``bytes_after``, ``kept_share`` (rows
            held over rows seen), ``spans`` (name -> mean kept share; row 0).
        """
        rows = [_layer_report(layer) for layer in self.kept_layers if layer.seen]
        held = [(layer.kept_counts, layer.prompt_shape) for layer in self.kept_layers if layer.kept_counts is not None]
        real = [sum(end - begin for begin, end in self.valid or [(0, s[2])] * s[0]) * s[1] for _, s in held]
        return {
            "n_tokens": self.get_seq_length() if not held else held[0][1][2],
            "layers": rows,
            "not_compressed": {i: why_not_compressed(layer) for i, layer in enumerate(self.layers) if not isinstance(layer, KeptLayer)},
            "bytes_before": sum(row["bytes_before"] for row in rows),
            "bytes_after": sum(row["bytes_after"] for row in rows),
            "kept_share": float(sum(c.sum() for c, _ in held) / sum(real)) if held else 1.0,
            "spans": {name: float(self.kept(name).mean()) for name in (self.spans[0] if self.spans and rows else {})},
        }


def why_not_compressed(layer) -> str:
    """Why a stock cache layer is left as it is."""
    kind = type(layer).__name__
    if "LinearAttention" in kind:
        return f"{kind}: its state has a fixed size"
    if kind == "DummyLayer":
        return f"{kind}: it has no cache of its own"
    if getattr(layer, "is_sliding", False):
        return f"{kind}: it holds no more than its window already"
    return f"{kind}: not a plain full-attention cache"


def _join_layers(layers: list):
    if len({(layer.get_seq_length(), layer.keys.shape[2], getattr(layer, "pos", None) is None) for layer in layers}) > 1:
        raise ValueError("the caches differ in length or in how much they hold; expected caches of one budget over equally long prompts")
    joined = copy.copy(layers[0])
    joined.keys, joined.values = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
    if isinstance(joined, KeptLayer) and joined.pos is not None:
        joined.pos = torch.cat([layer.pos for layer in layers])
        if any(layer.live is not None for layer in layers):
            joined.live = torch.cat([torch.ones_like(x.pos, dtype=torch.bool) if x.live is None else x.live for x in layers])
        joined.kept_positions, joined.kept_counts = (
            np.concatenate([getattr(x, n) for x in layers]) for n in ("kept_positions", "kept_counts")
        )
        joined.prompt_shape = (len(joined.keys), *joined.prompt_shape[1:])
        joined.bytes_before = sum(layer.bytes_before for layer in layers)
    return joined


def _layer_report(layer: KeptLayer) -> dict:
    after = _bytes(layer.keys) + _bytes(layer.values)
    counts = layer.kept_counts if layer.kept_counts is not None else np.full(layer.keys.shape[:2], layer.seen)
    return {
        "index": layer.index,
        "kept": counts.tolist(),
        "bytes_before": layer.bytes_before or after,
        "bytes_after": after,
    }


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
