"""What a cache stands for: which decoder filled it, with which tokens, and how it was compressed.

A decoder is told from others, and from itself at another time, by its weights and the adapters that are active.
"""

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .parts import stored

_SAMPLES = 8  # weights per tensor that the fingerprint looks at
_MANY = 16  # pieces of a conversation, after which they are joined: each step counts their tokens


@dataclass(frozen=True)
class Origin:
    """Not changed in place: caches made of each other share it.

    Attributes
    ----------
    settings : str, or None
        Of the wrap that made the cache; None if none did.
    decoder : weakref, or None
        The decoder that filled it; None before that, and after a pickle, which has its fingerprint instead.
    adapters : tuple of tuple of str
        Those that were active then: each row's, or once those of all rows.
    n_change : int
        How often the decoder's weights had been changed in place.
    fingerprint : str, or None
        Of the decoder; only of a cache that was pickled, until it meets that decoder again.
    pieces : tuple of LongTensor (B, n), or None
        Token ids, in the order in which they were seen; None if the model was given something else, such as embeddings.
    deltas : LongTensor (B, 1), or None
        How far a multimodal model's positions are ahead of its tokens, after its images: such a model keeps that on
        itself (``rope_deltas``), of the latest prompt only, and gets it back whenever the cache goes on.
    has_kinds : bool
        Whether the decoder was told the kinds of its prompt's tokens (``token_type_ids``).
    """

    settings: str | None = None
    decoder: "weakref.ref | None" = None
    adapters: tuple[tuple[str, ...], ...] = ((),)
    n_change: int = 0
    fingerprint: str | None = None
    pieces: tuple[torch.Tensor, ...] | None = ()
    deltas: torch.Tensor | None = None
    has_kinds: bool = False

    def filled_by(self, decoder: torch.nn.Module, has_kinds: bool = False) -> "Origin":
        """This origin with ``decoder`` as the one that begins to fill the cache."""
        return replace(self._with(decoder), pieces=(), deltas=None, has_kinds=has_kinds)

    def _with(self, decoder: torch.nn.Module) -> "Origin":
        known = {"adapters": adapters_of_rows(decoder), "n_change": count_changes(decoder), "fingerprint": None}
        return replace(self, decoder=weakref.ref(decoder), **known)

    def met(self, decoder: torch.nn.Module) -> "Origin":
        """This origin, once the filled cache is given to ``decoder``; raises if another decoder, or nobody knows which,
        filled it."""
        if self.decoder is None and self.fingerprint is None:
            raise ValueError(
                "the cache was pickled when the model that filled it was gone or changed; expected save() and "
                "load_cache"
            )
        if self.decoder is None and self.fingerprint == fingerprint(decoder):
            origin = replace(self._with(decoder), adapters=self.adapters)
            origin.check_adapters(decoder)
            return origin
        if self.decoder is None or self.decoder() is not decoder:
            raise ValueError(
                f"the cache was filled by another {type(decoder).__name__}; expected the model that filled it, or a "
                "cache of load_cache, "
                "which compares the weights"
            )
        return self

    def filler(self) -> torch.nn.Module:
        """The decoder that filled it; raises if that is not known, or is not what it was then."""
        decoder = None if self.decoder is None else self.decoder()
        if decoder is None:
            raise ValueError(
                "the model that filled the cache is gone, or the cache was pickled; expected save() while the model "
                "is there"
            )
        self.check_adapters(decoder)
        if count_changes(decoder) != self.n_change:
            raise ValueError("the model's weights were changed since the cache was filled; expected save() before that")
        return decoder

    def check_adapters(self, decoder: torch.nn.Module) -> None:
        """Raise if other adapters than those that filled it are active now; :meth:`met` is for other decoders."""
        if (
            self.decoder is not None
            and self.decoder() is decoder
            and (now := adapters_of_rows(decoder)) != self.adapters
        ):
            before, now = ("; ".join(", ".join(names) or "none" for names in rows) for rows in (self.adapters, now))
            raise ValueError(
                f"the cache was filled with the adapters {before}, but now {now} is active; expected the same"
            )

    def check_length(self, n_seen: int) -> None:
        """Raise if the layers have seen more than went through this cache."""
        if self.pieces is not None and (n_known := sum(x.shape[1] for x in self.pieces)) < n_seen:
            raise ValueError(
                f"the cache's layers have seen {n_seen} tokens, {n_seen - n_known} of them through another cache that "
                "shares them "
                "(copy.copy); expected cache.copy()"
            )

    def tokens(self, n_seen: int) -> torch.Tensor | None:
        """The first ``n_seen`` token ids (B, n_seen), if they are known."""
        if self.pieces is None or not self.pieces or sum(x.shape[1] for x in self.pieces) < n_seen:
            return None
        return torch.cat(self.pieces, 1)[:, :n_seen]

    def then(self, ids: torch.Tensor | None, n_seen: int) -> "Origin":
        """This origin after ``ids``, where the cache had seen ``n_seen`` tokens before them."""
        if self.pieces is None or ids is None:
            return replace(self, pieces=None)
        pieces = self.pieces
        if len(pieces) >= _MANY or sum(x.shape[1] for x in pieces) != n_seen:  # some were taken back
            whole = self.tokens(n_seen) if n_seen else None
            if n_seen and whole is None:
                return replace(self, pieces=None)
            pieces = () if whole is None else (whole,)
        return replace(self, pieces=(*pieces, ids.detach().clone()))

    def with_deltas(self, outer: torch.nn.Module, n_row: int) -> "Origin":
        """This origin with what the module around the decoder keeps of the prompt of ``n_row`` rows that it runs."""
        deltas = vars(outer).get("rope_deltas")
        if deltas is not None:
            deltas = deltas.detach().reshape(len(deltas), -1).repeat_interleave(n_row // len(deltas), 0)
        return replace(self, deltas=deltas)

    def give_deltas(self, outer: torch.nn.Module, n_held: int, n_row: int) -> None:
        """Before a filled cache of ``n_held`` rows goes on by ``n_row``: the model's positions are ahead as they were
        for its prompt."""
        if "rope_deltas" in vars(outer):
            own = torch.zeros(n_held, 1, dtype=torch.long, device="cpu") if self.deltas is None else self.deltas
            outer.rope_deltas = own[:: max(1, len(own) // n_row)].to(next(outer.parameters()).device)

    def rows(self, rows: list[int]) -> "Origin":
        """This origin for a cache of these rows of the batch."""
        moved: dict[str, Any] = {}
        if len(self.adapters) > 1:
            moved["adapters"] = _once([self.adapters[row] for row in rows])
        if self.pieces:
            whole = torch.cat(self.pieces, 1)
            moved["pieces"] = (whole[torch.tensor(rows, device=whole.device)],)
        if self.deltas is not None:
            moved["deltas"] = self.deltas[torch.tensor(rows, device=self.deltas.device)]
        return replace(self, **moved)

    @classmethod
    def join(
        cls, origins: Sequence["Origin"], tokens: Sequence[torch.Tensor | None], n_rows: Sequence[int]
    ) -> "Origin":
        """Of a cache that is made of these caches' rows, so many of each, which have seen these tokens."""
        adapters = [x.adapters * (n if len(x.adapters) == 1 else 1) for x, n in zip(origins, n_rows, strict=True)]
        known = [x for x in tokens if x is not None]
        pieces = (torch.cat(known),) if len(known) == len(tokens) else None
        deltas = [origin.deltas for origin in origins if origin.deltas is not None]
        return replace(
            origins[0],
            adapters=_once([of_row for rows in adapters for of_row in rows]),
            pieces=pieces,
            deltas=torch.cat(deltas) if len(deltas) == len(origins) else None,
        )

    def __deepcopy__(self, memo: dict) -> "Origin":
        return self

    def __copy__(self) -> "Origin":
        return self

    def __getstate__(self) -> dict:
        try:
            known = fingerprint(self.filler())
        except ValueError:  # met() refuses it by name
            known = None
        return {**vars(self), "decoder": None, "fingerprint": known or self.fingerprint}


def fingerprint(decoder: torch.nn.Module) -> str:
    """Tells models apart whose caches do not fit each other: active adapters, and of every weight and buffer name,
    shape, dtype, a sample.

    Raises
    ------
    ValueError
        If a weight's values are nowhere to be found.
    """
    digest = hashlib.sha256(repr(active_adapters(decoder)).encode())
    samples: dict[torch.device, list[torch.Tensor]] = {}  # fetched a device at a time: each fetch waits for a GPU
    places: dict[tuple, torch.Tensor] = {}
    for name, weight in _weights(decoder):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.numel():
            key = weight.numel(), weight.device
            if key not in places:
                spread = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64, device="cpu")
                places[key] = spread.long().to(weight.device)
            bits = (
                weight.detach().reshape(-1).view(torch.uint8).view(weight.numel(), -1)
            )  # float8 has few operations of its own
            samples.setdefault(weight.device, []).append(bits[places[key]].flatten())
    for of_device in samples.values():
        digest.update(torch.cat(of_device).cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights(decoder: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers; quantized ones as the tensors that they are made of, offloaded ones from where
    they wait."""
    for path, module in decoder.named_modules():
        own = {
            **module._parameters,
            **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set},
        }
        for name, weight in own.items():
            if weight is not None:
                yield from _plain(f"{path}.{name}", stored(module, name, weight))


def _plain(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if (flatten := getattr(weight, "__tensor_flatten__", None)) is not None:
        for part in flatten()[0]:
            if isinstance(inner := getattr(weight, part), torch.Tensor):  # a shard names its mesh of devices, too
                yield from _plain(f"{name}.{part}", inner)
    elif weight.device.type == "meta":
        raise ValueError(
            f"the weight {name} is on the device 'meta', without values; expected a model whose weights can be read"
        )
    else:
        yield name, weight


def count_changes(decoder: torch.nn.Module) -> int:
    """How often its weights were changed in place; those that are offloaded come and go, and tell nothing."""
    here = (weight for weight in decoder.parameters() if weight.device.type != "meta")
    return sum(weight._version for weight in here if not weight.is_inference())


def active_adapters(decoder: torch.nn.Module) -> tuple[str, ...]:
    """Names of the adapters (LoRA and others) that the decoder's modules use now, sorted."""
    active: set[str] = set()
    for module in decoder.modules():
        names = getattr(module, "active_adapters", None)
        if isinstance(names, (list, tuple)) and not getattr(module, "disable_adapters", False):
            active.update(map(str, names))
    return tuple(sorted(active))


def adapters_of_rows(decoder: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """The adapters that each row uses now, or once those of all rows: PEFT tells its layers the ``adapter_names`` of a
    call by hooks, for as long as that runs."""
    active, names = active_adapters(decoder), None
    if not active:  # what is disabled is so for all rows
        return (active,)
    for hook in (hook for module in decoder.modules() for hook in module._forward_pre_hooks.values()):
        if isinstance(hook, partial):  # a module's last one counts: those of a call that failed stay there
            names = hook.keywords.get("adapter_names", names)
    if names is None:
        return (active,)
    return _once([() if name == "__base__" else (name,) for name in names])


def _once(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """What all rows have, once, if that is the same."""
    return tuple(rows[:1] if len(set(rows)) == 1 else rows)
