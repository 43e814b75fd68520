"""What a compressed cache must be after any sequence of operations, kept beside it in plain tensors: which tokens it
has seen, and which of them each token could attend to, layer by layer and head by head."""

import functools
from dataclasses import dataclass, replace

import torch
from tiny_models import build

from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.parts import attention_modules


def held_sets(cache):
    """Per compressed layer, bool (B, H, n_seen): the tokens whose rows it holds; raises if one is held twice."""
    out = []
    for layer in cache.kept_layers:
        shape, n_seen, slots = layer.keys.shape[:3], layer.seen, torch.arange(layer.keys.shape[2])
        live = torch.ones(shape, dtype=torch.bool) if layer.live is None else layer.live
        if layer.held is not None and not layer.is_fixed:
            live = live & (slots >= layer.held.front[:, None, None] * layer.is_evicted)
        sets = torch.zeros(*shape[:2], n_seen + 1, dtype=torch.bool)
        pos = slots.expand(shape) if layer.pos is None else layer.pos
        sets = sets.scatter_(2, torch.where(live, pos, n_seen), True)[..., :n_seen]
        assert torch.equal(sets.sum(-1), live.sum(-1)), f"layer {layer.index} holds a token twice"
        out.append(sets)
    return out


def positions_of(real):
    """Positions as ``generate`` counts them."""
    return (real.long().cumsum(-1) - 1).clamp(min=0)


@dataclass
class Shadow:
    """One cache and what is known of it.

    ``tokens``, ``real`` and ``positions`` are (B, T), ``visible`` bool (B, H, T, T) per layer: what the query of each
    token could see. ``settings``: the wrap's; None of a cache that was loaded.
    """

    cache: KeptCache
    settings: dict | None
    tokens: torch.Tensor
    real: torch.Tensor
    positions: torch.Tensor
    visible: list[torch.Tensor]
    n_prompt: int
    spans: list | None = None
    is_fixed: bool = False

    @classmethod
    def of_prompt(cls, cache, settings, tokens, real, spans=None):
        n = tokens.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        visible = [causal.expand(len(tokens), layer.keys.shape[1], n, n) for layer in cache.kept_layers]
        return cls(cache, settings, tokens, real, positions_of(real), visible, n, spans)

    @property
    def shape(self):
        return tuple(self.tokens.shape)

    def of(self, cache, **changes):
        """The same of a copy."""
        return replace(self, cache=cache, **changes)

    def rows(self, order):
        for name in ("tokens", "real", "positions"):
            setattr(self, name, getattr(self, name)[order])
        self.visible = [x[order] for x in self.visible]
        self.spans = None if self.spans is None else [self.spans[row] for row in order]

    def cut(self, n):
        """Down to ``n`` tokens."""
        self.tokens, self.real, self.positions = self.tokens[:, :n], self.real[:, :n], self.positions[:, :n]
        self.visible = [x[:, :, :n, :n] for x in self.visible]
        self.n_prompt = min(self.n_prompt, n)

    def extend(self, tokens, real, held):
        """By tokens that came while these were held."""
        n_new, n = tokens.shape[1], self.shape[1]
        for i, (seen, before) in enumerate(zip(self.visible, held, strict=True)):
            new = torch.ones(n_new, n_new, dtype=torch.bool).tril().expand(*seen.shape[:2], -1, -1)
            new = torch.cat([before[:, :, None].expand(-1, -1, n_new, -1), new], -1)
            self.visible[i : i + 1] = [torch.cat([torch.nn.functional.pad(seen, (0, n_new)), new], 2)]
        self.tokens, self.real = torch.cat([self.tokens, tokens], 1), torch.cat([self.real, real], 1)
        self.positions = torch.cat([self.positions, positions_of(self.real)[:, n:]], 1)

    @torch.no_grad()
    def logits(self, plain):
        """Of a model that was never wrapped, over all tokens at once: it is shown what each of them could see."""
        modules, hooks = attention_modules(plain), []
        diagonal = torch.eye(self.shape[1], dtype=torch.bool)  # padding sees itself, so that nothing is no number
        for layer, visible in zip(self.cache.kept_layers, self.visible, strict=True):
            shown = visible & self.real[:, None, None] | diagonal
            shown = shown.repeat_interleave(plain.config.num_attention_heads // shown.shape[1], 1)
            mask = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
            hook = functools.partial(_shown, mask=mask)
            hooks.append(modules[layer.index].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            mask = {"attention_mask": self.real.long(), "position_ids": self.positions}
            return plain(self.tokens, use_cache=False, **mask).logits
        finally:
            for hook in hooks:
                hook.remove()

    def check(self):
        """What the cache says of itself."""
        cache, (n_row, n), sets = self.cache, self.shape, held_sets(self.cache)
        assert [cache.n_seen, cache.get_seq_length(), cache.n_prompt] == [n, n, self.n_prompt]
        assert [layer.get_seq_length() for layer in cache.kept_layers] == [n] * len(sets)
        assert torch.equal(cache.tokens[self.real], self.tokens[self.real])
        of_prompt = [x[..., : self.n_prompt] & self.real[:, None, : self.n_prompt] for x in sets]
        report = cache.report()
        assert report["n_tokens"] == self.n_prompt
        for layer, wanted, told in zip(cache.kept_layers, of_prompt, report["layers"], strict=True):
            positions = torch.from_numpy(cache.positions(layer.index).copy()).long()
            marked = torch.zeros(*wanted.shape[:2], self.n_prompt + 1, dtype=torch.bool)
            marked.scatter_(2, positions.where(positions >= 0, self.n_prompt), True)
            assert torch.equal(marked[..., :-1], wanted)
            assert told["kept"] == wanted.sum(-1).tolist()
        for row, of_row in enumerate(self.spans or []):
            for name, (begin, end) in of_row.items():
                shares = torch.stack([x[row, :, begin:end].sum(-1) / (end - begin) for x in of_prompt])
                torch.testing.assert_close(torch.from_numpy(cache.kept(name, row)).float(), shares)
        n_later = n - self.n_prompt
        assert (f", {n_later} later, " in repr(cache)) == (n_later > 0) and n_row == len(cache.valid)


def _shown(module, args, kwargs, mask):
    return args, {**kwargs, "attention_mask": mask}


@functools.cache
def plain_model(family):
    """A model that nobody wraps."""
    return build(family).requires_grad_(False)


def everything_of(cache):
    """All that a cache is made of, to be compared: what was refused has changed none of it."""
    told = {name: getattr(cache, name) for name in ("valid", "spans", "is_half_filled", "n_prompt", "tokens")}
    for i, layer in enumerate(cache.layers):
        fields = vars(layer) | {f"held {name}": x for name, x in vars(getattr(layer, "held", None) or layer).items()}
        told |= {
            f"{i} {name}": x for name, x in fields.items() if isinstance(x, (torch.Tensor, int, tuple, type(None)))
        }
    return {"class": type(cache)} | {name: _frozen(x) for name, x in told.items()}


def _frozen(x):
    """Bits, since a number that is none equals nothing."""
    return (x.shape, x.dtype, x.detach().clone().numpy().tobytes()) if isinstance(x, torch.Tensor) else x
