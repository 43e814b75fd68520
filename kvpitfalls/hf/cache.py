"""A key/value cache that holds fewer entries than it has seen, and says which."""

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from ..display.markup import block, note
from ..errors import NotInterceptedError
from ..eviction.arrays import Int32
from ..eviction.selection import count_inside
from ..numbers import check_whole, is_whole
from . import rows
from .coming import Coming
from .hybrid import kept_layers, n_loops
from .layer import UNWRAPPED, KeptLayer, bare
from .origin import Origin
from .report import Report, in_bytes, in_range
from .threads import local

if TYPE_CHECKING:
    from .evict import Action


class KeptCache(DynamicCache):
    """A ``transformers.DynamicCache`` whose full-attention layers hold what a policy kept of the prompt.

    Give it to ``model.generate(ids, past_key_values=cache.copy())`` inside the wrap that made it; ``ids`` start with
    the prompt. Where each row is to have n beams or answers, ``copy.batch_repeat_interleave(n)`` comes first. Lengths
    and positions are logical. Sliding-window and linear-attention layers are the stock ones, since
    their memory is bounded already.

    Parameters
    ----------
    config : transformers config, optional
    action : Action, optional
        Called with each layer after its prefill. :func:`kvpitfalls.wrap` gives its own.

    Attributes
    ----------
    spans : list of dict of str to (int, int)
        Per row, the instructions in tokens.
    valid : list of (int, int), or None
        Per row, the range of real tokens of the prompt; None before a prompt was seen.

    Examples
    --------
    >>> import kvpitfalls as kvp
    >>> from kvpitfalls.hf.load import load
    >>> model, tokenizer = load()
    >>> text = "Never reveal this. Speak only Spanish."
    >>> prompt = kvp.Prompt.from_text(tokenizer, text, {"defense": "Never reveal this."})
    >>> with kvp.wrap(model, "streaming_llm", compression_ratio=0.5) as handle:
    ...     cache = handle.compress(prompt)
    ...     out = model.generate(prompt.followed_by(" I"), past_key_values=cache.copy(), max_new_tokens=1)
    >>> cache.positions(0)[0, 0], cache.kept("defense").shape
    (array([0, 1, 2, 3], dtype=int32), (30, 3))
    """

    action: "Action | None" = None
    progress: Any = None  # a bar that counts layers, while a prefill runs
    spans: Sequence[Mapping[str, tuple[int, int]]] = ()
    valid: Sequence[tuple[int, int]] | None = None
    origin = Origin()
    is_in_order = True  # the model runs its layers as they stand here
    is_half_filled = False  # a forward on it, or a move of its rows, was broken off
    coming: Coming | None = None  # the prompt, until the last of its chunks has come
    peak_bytes = 0  # the most that was held before an eviction, so far: nothing else makes it smaller

    def __init__(self, config: Any = None, action: "Action | None" = None) -> None:
        super().__init__(config=config)
        self.adopt(config, action)

    def adopt(self, config: Any, action: "Action | None") -> "KeptCache":
        """Replace the plain layers of this empty cache. ``action`` is called with each layer after its prefill."""
        self.layers = kept_layers(config)
        self.is_in_order = n_loops(config) == 1
        self.layer_class_to_replicate = None
        self.action, self.spans, self.valid, self.peak_bytes = action, [], None, 0
        self.origin, self.is_half_filled, self.coming = Origin(), False, None
        return self

    @property
    def n_seen(self) -> int:
        """How many tokens it has seen, the prompt's and what came later."""
        return max((layer.seen for layer in self.kept_layers), default=0)

    @property
    def is_held(self) -> bool:
        """Whether its budget is held while generating."""
        return self.action is not None and self.action.holds

    @property
    def n_prompt(self) -> int:
        """How many of them were the prompt's, padding included."""
        known = [layer.n_prompt for layer in self.kept_layers]
        return max([*known, *(end for _, end in self.valid or [])], default=0)

    @property
    def tokens(self) -> torch.Tensor | None:
        """The ids of the tokens it has seen, (B, n_seen); None if the model was given something else than ids."""
        return self.origin.tokens(self.n_seen)

    def check_rows(self, n_row: int) -> None:
        """Raise unless a forward brings a token of each row that it holds."""
        if self.valid is not None and n_row != len(self.valid):
            raise ValueError(f"a forward brings {n_row} rows, but the cache holds {len(self.valid)}; expected as many")

    def check_decoder(self, decoder: torch.nn.Module) -> None:
        """Raise if a decoder is not as it was when it filled this; it takes a look at every module."""
        self.origin.check_adapters(decoder)

    def copy(self) -> "KeptCache":
        """A cache of its own with the same content, since generating with a cache fills it."""
        return copy.deepcopy(self)

    def outline(self) -> "KeptCache":
        """What it says of itself, without its keys and values."""
        twin = copy.copy(self)
        twin.layers = [bare(layer) for layer in self.layers]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptCache":
        """What a graph of gradients made, which torch would not copy, is copied within that graph."""
        for x in (x for layer in self.layers for x in vars(layer).values()):
            if isinstance(x, torch.Tensor) and not x.is_leaf:
                memo[id(x)] = x.clone()
        twin = memo[id(self)] = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(twin), memo))
        return twin

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values that the compressed layers hold now."""
        return sum(layer.n_byte for layer in self.kept_layers if layer.is_initialized)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write the cache to a safetensors file, all at once or not at all; :func:`kvpitfalls.load_cache` reads it.

        Raises
        ------
        ValueError
            If it is empty, or holds its budget while generating.
        """
        from .save import save_cache

        save_cache(self, path)

    def fixed(self, max_new_tokens: int, *, use_graph: bool = True) -> "KeptCache":
        """This cache with room for new tokens, for fast decoding: they are written in place, and a GPU runs each step
        as one CUDA graph.

        Answers are those of this cache, which stays as it is. Give the result to ``generate``, inside the wrap. A
        budget that is held (``when="always"``, with ``"streaming_llm"``, ``"tova"`` or ``"h2o"``, not fair) stays held:
        each new token takes the slot of one that the policy lets go, so memory does not depend on ``max_new_tokens``.

        Parameters
        ----------
        max_new_tokens : int
            How many tokens may follow the prompt: a question's and the answer's.
        use_graph : bool
            Capture a step as a CUDA graph, where it has token ids on one GPU, and its modules no hooks. Else Python
            runs each kernel.

        Returns
        -------
        FixedCache

        Raises
        ------
        ValueError
            If the cache is empty, has seen tokens after its prompt, or has layers that are not compressed. If its
            budget is held by ``when="decode"``, another policy or fairness, or for all heads of a layer at once.
        UnsupportedModelError
            By a step that judges tokens by an attention with a softcap or sinks, under a held budget.
        """
        from .fixed import FixedCache
        from .held_fixed import HeldFixedCache

        return (HeldFixedCache if self.is_held else FixedCache)(self, max_new_tokens, use_graph)

    @classmethod
    def join(cls, caches: "Sequence[KeptCache]") -> "KeptCache":
        """The rows of several caches as one batch. They must have seen equally long prompts."""
        first = copy.copy(caches[0])
        first.layers = [rows.join([cache.layers[i] for cache in caches]) for i in range(len(first.layers))]
        first.spans = [row for cache in caches for row in cache.spans]
        first.valid = [row for cache in caches for row in cache.valid or ()]
        first.peak_bytes = 0
        n_rows = [len(cache.valid or ()) for cache in caches]
        first.origin = Origin.join([cache.origin for cache in caches], [cache.tokens for cache in caches], n_rows)
        return first

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the newest tokens of every layer, or, if one cannot, raise and leave all as they are."""
        for layer in self.kept_layers:
            layer.check_crop(*args, **kwargs)
        before = [dict(vars(layer)) for layer in self.layers]
        try:
            super().crop(*args, **kwargs)
        except BaseException:  # a sliding layer that has lost what stood before its window, behind layers that had not
            for each, fields in zip(self.layers, before, strict=True):
                vars(each).update(fields)
            raise
        if self.valid is not None:  # a prompt of which nothing was evicted ends where it was cut
            self.valid = [(min(begin, self.n_seen), min(end, self.n_seen)) for begin, end in self.valid]

    def reset(self) -> None:
        """Forget the prompt, its instructions and protection; the next one is compressed by the wrap in which it
        comes."""
        super().reset()  # type: ignore[no-untyped-call] # transformers' own has no types
        self.action, self.spans, self.valid, self.peak_bytes = None, [], None, 0
        self.origin, self.is_half_filled, self.coming = Origin(), False, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        check_whole("repeats", repeats, 1)
        with self._moving():
            for layer in self.layers:
                rows.repeat(layer, repeats)
            self._map_rows([row for row in range(len(self.valid or [])) for _ in range(repeats)])

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some batch rows, in the given order."""
        chosen = indices.cpu() if isinstance(indices, torch.Tensor) else indices
        order = torch.arange(len(self.valid or []), device="cpu")[chosen].tolist() if len(chosen) else []
        if not order:
            raise ValueError("batch_select_indices was given no row; expected at least one")
        with self._moving():
            for layer in self.layers:
                rows.select(layer, indices)
            self._map_rows(order)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: rows move."""
        with self._moving():
            super().reorder_cache(beam_idx)
            self._map_rows(beam_idx.tolist())

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """A block that moves the rows of every layer: broken off, by an interrupt or for want of memory, it leaves a
        cache that is of no use."""
        before, self.is_half_filled = self.is_half_filled, True
        yield
        self.is_half_filled = before

    def _map_rows(self, rows: list[int]) -> None:
        if self.valid is not None:
            self.origin = self.origin.rows(rows)
            self.valid = [self.valid[row] for row in rows]
            self.spans = [self.spans[row] for row in rows] if self.spans else self.spans

    @property
    def kept_layers(self) -> list[KeptLayer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, KeptLayer)]

    def positions(self, layer: int) -> Int32:
        """Which tokens of the prompt layer ``layer`` holds: int32 (B, H, K), ascending, -1 where a row holds fewer than
        K."""
        if not is_whole(layer) or not 0 <= layer < len(self.layers):
            raise ValueError(f"layer is {layer!r}; expected a number in [0, {len(self.layers)})")
        of_layer = self.layers[layer]
        if not isinstance(of_layer, KeptLayer):
            raise ValueError(f"layer {layer} is a {type(of_layer).__name__}, which is not compressed")
        if not of_layer.seen:
            raise ValueError("the cache is empty; expected one that has seen a prompt")
        if (kept := of_layer.kept_positions) is not None:
            return kept
        rows = self.valid or [(0, of_layer.seen)] * len(of_layer.keys)
        begins, ends = (np.minimum(x, of_layer.seen)[:, None, None] for x in np.transpose(rows).astype(np.int32))
        places = np.arange((ends - begins).max(), dtype=np.int32) + begins
        return np.repeat(np.where(places < ends, places, np.int32(-1)), of_layer.keys.shape[1], 1)

    def kept(self, span: str | tuple[int, int], row: int = 0) -> npt.NDArray[np.float64]:
        """Kept share of an instruction, float64 (layers, H): by name, or by token range (start, end)."""
        n_row = max(1, len(self.spans))
        if not is_whole(row) or not -n_row <= row < n_row:
            raise ValueError(f"row is {row!r}; expected one of the {n_row} of the batch")
        if is_named := isinstance(span, str):
            of_row = self.spans[row] if row < len(self.spans) else {}
            if span not in of_row:
                raise ValueError(
                    f"span is {span!r}; expected one of "
                    f"{', '.join(of_row) or 'none: the cache was made without instructions'}"
                )
            span = of_row[span]
        if not (isinstance(span, tuple) and len(span) == 2 and all(map(is_whole, span)) and 0 <= span[0] < span[1]):
            raise ValueError(f"span is {span!r}; expected a name, or (start, end) in tokens, which is not empty")
        if not is_named and 0 < self.n_seen < span[1]:
            raise ValueError(f"span is {span!r}; expected one within the {self.n_seen} tokens that the cache has seen")
        of_layers = [count_inside(self.positions(layer.index)[row], [span])[:, 0] for layer in self.kept_layers]
        if len(n_heads := set(map(len, of_layers))) > 1:
            raise ValueError(
                f"the layers have {in_range(list(n_heads))} key heads, whose shares make no array of layers and heads; "
                "expected positions(layer) of each, or report(), which has the mean"
            )
        return np.stack(of_layers) / (span[1] - span[0])

    def report(self) -> Report:
        """What eviction really did; a dict, see :class:`kvpitfalls.Report`.

        Raises
        ------
        NotInterceptedError
            If a layer holds more of a prompt than its budget: the compression did not happen.
        """
        seen = [layer for layer in self.kept_layers if layer.seen]
        counts = [_kept_counts(layer, self.valid) for layer in seen]
        self._check_counts(seen, counts)
        rows = [_layer_report(layer, kept) for layer, kept in zip(seen, counts, strict=True)]
        held = [layer for layer in seen if layer.is_evicted]
        spans = self.spans if rows else []
        held_by = [self.positions(layer.index) for layer in seen] if any(spans) else []  # a GPU is waited for
        shares = [mean_kept_shares([p[row] for p in held_by], of_row) for row, of_row in enumerate(spans)]
        return Report(
            n_tokens=held[0].prompt_shape[2] if held else self.n_prompt or self.get_seq_length(),
            layers=rows,
            not_compressed={
                i: why_not_compressed(layer) for i, layer in enumerate(self.layers) if not isinstance(layer, KeptLayer)
            },
            bytes_before=sum(row["bytes_before"] for row in rows),
            bytes_after=sum(row["bytes_after"] for row in rows),
            bytes_kept=sum(row["bytes_kept"] for row in rows),
            peak_bytes=max(self.peak_bytes, self.held_bytes),
            kept_share=self._kept_share(seen, counts),
            spans=shares[0] if shares else {},
            spans_by_row=shares,
        )

    def _kept_share(self, layers: Sequence[KeptLayer], counts: Sequence[Int32]) -> float:
        """Of the prompt's rows that the evicted layers have seen, the share that they hold; 1 if nothing was
        evicted."""
        held = [(kept, layer.prompt_shape) for layer, kept in zip(layers, counts, strict=True) if layer.is_evicted]
        real = [sum(end - begin for begin, end in self.valid or [(0, s[2])] * s[0]) * s[1] for _, s in held]
        return float(sum(kept.sum() for kept, _ in held) / sum(real)) if held else 1.0

    def __repr__(self) -> str:
        layers = f"{len(self.kept_layers)} of {len(self.layers)} layers compressed"
        seen = [layer for layer in self.kept_layers if layer.seen]
        if not seen:
            return f"<KeptCache: {layers}, no tokens seen>"
        counts = [_kept_counts(layer, self.valid) for layer in seen]
        lengths = [end - begin for begin, end in self.valid or [(0, seen[0].seen)]]
        kept = in_range([n for of_layer in counts for n in (of_layer.min(), of_layer.max())])
        later = f", {n} later" if (n := self.n_seen - (self.n_prompt or self.n_seen)) else ""
        before, now = sum(layer.bytes_before or layer.n_byte for layer in seen), sum(layer.n_byte for layer in seen)
        return (
            f"<KeptCache: {layers}, batch of {len(seen[0].keys)}, {kept} of {in_range(lengths)} prompt tokens kept in "
            f"each head (r = {1 - self._kept_share(seen, counts):.2f}){later}, {in_bytes(now)} of {in_bytes(before)}>"
        )

    def _repr_html_(self) -> str:
        title, _, about = repr(self)[1:-1].partition(": ")
        return block(title, note(about), self.report().body())

    def _check_counts(self, layers: list[KeptLayer], counts: list[Int32]) -> None:
        if self.action is None or not layers:
            return
        n_layer, lengths = len(self.kept_layers), [end - begin for begin, end in self.valid or ()]
        limits = [self.action.limits(max(1, n), n_layer) for n in lengths]  # of a row that was cut down to its padding
        places = {layer.index: place for place, layer in enumerate(self.kept_layers)}
        for layer, kept in zip(layers, counts, strict=True):
            if self.action.waits(layer):
                continue
            for row, of_layers in enumerate(limits):
                limit = of_layers[places[layer.index]]
                if (most := float(kept[row].mean() if self.action.shares_heads else kept[row].max())) > limit:
                    raise NotInterceptedError(
                        f"layer {layer.index} holds {most:g} tokens of row {row}'s prompt; expected at most {limit}: "
                        "it was not compressed"
                    )


def n_compressed(config: Any) -> int:
    """How many layers of a model are compressed."""
    return len(KeptCache(config).kept_layers)


def _of_whole(name: str) -> Callable[..., Any]:
    """A method of plain caches that gives keys and values out, without the positions of a compressed one."""
    plain = getattr(DynamicCache, name)

    @functools.wraps(plain)
    def method(cache: KeptCache, *args: Any) -> Any:
        if any(layer.is_evicted for layer in cache.kept_layers):
            raise ValueError(
                "a compressed cache was to be taken apart into keys and values, whose positions would be lost; "
                "expected the cache itself, "
                "or its layers (cache.layers)"
            )
        return plain(cache, *args)

    return method


for _name in ("__iter__", "__getitem__", "to_legacy_cache"):  # transformers 5 has only the first
    if hasattr(DynamicCache, _name):
        setattr(KeptCache, _name, _of_whole(_name))


def _of_forward(name: str) -> Callable[..., Any]:
    """A method by which a model fills a layer, refused outside a forward of a wrapped model: stock layers would take
    what ours then refuse, and nobody could tell later."""
    plain = getattr(DynamicCache, name)

    @functools.wraps(plain)
    def method(cache: KeptCache, *args: Any, **kwargs: Any) -> Any:
        if local.forward is None or local.forward.cache is not cache:
            raise NotInterceptedError(UNWRAPPED)
        return plain(cache, *args, **kwargs)

    return method


for _name in ("update", "update_conv_state", "update_recurrent_state", "update_indexer"):  # not of every release
    if hasattr(DynamicCache, _name):
        setattr(KeptCache, _name, _of_forward(_name))


def why_not_compressed(layer: object) -> str:
    """Why a stock cache layer is left as it is."""
    kind = type(layer).__name__
    if rows.has_states(layer):
        return f"{kind}: its state has a fixed size"
    if rows.holds_nothing(layer):
        return f"{kind}: it has no cache of its own"
    if getattr(layer, "is_sliding", False):
        return f"{kind}: it holds no more than its window already"
    return f"{kind}: not a plain full-attention cache"


def mean_kept_shares(positions: Sequence[Int32], spans: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Share of the tokens [begin, end) of each span that is among kept positions (H, K) of each layer, mean over layers
    and heads.

    One division of whole numbers: what all keep 3 of 5 of is 0.6, as it is typed, and no bit less.
    """
    edges, n_head = list(spans.values()), sum(map(len, positions))
    counts = sum((count_inside(of_layer, edges).sum(0) for of_layer in positions), np.zeros(len(edges), np.int64))
    return {name: int(n) / (n_head * (end - begin)) for name, n, (begin, end) in zip(spans, counts, edges, strict=True)}


def _kept_counts(layer: KeptLayer, valid: Sequence[tuple[int, int]] | None) -> Int32:
    """Tokens of the prompt that each row and head holds, (B, H)."""
    if (kept := layer.kept_counts) is not None:
        return kept
    whole = [end - begin for begin, end in valid] if valid else [layer.seen] * len(layer.keys)
    return np.broadcast_to(np.array(whole)[:, None], layer.keys.shape[:2])


def _layer_report(layer: KeptLayer, kept: Int32) -> dict[str, Any]:
    after = layer.n_byte
    return {
        "index": layer.index,
        "kept": kept.tolist(),
        "n_slots": layer.keys.shape[2],
        "bytes_before": layer.bytes_before or after,
        "bytes_after": after,
        "bytes_kept": after if layer.live is None else after * int(layer.live.sum()) // layer.live.numel(),
    }
