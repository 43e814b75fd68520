"""Random models of a few thousand weights, one per architecture, and what to feed them."""

import functools
import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.parts import attention_modules
from kvpitfalls.prompts.prompt import Prompt

# What generate hands down with prefill_chunk_size is refused there (tests/test_chunks.py).
IS_MISPLACED = Version("5") <= Version(transformers.__version__) < Version("5.5")
chunks_of_generate = pytest.mark.skipif(
    IS_MISPLACED, reason="generate of transformers 5.0 to 5.4 gives each chunk the last one's positions"
)
_SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT2_SIZE = {
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "vocab_size": 128,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_CONFIGS = {
    "llama": _SIZE,
    "qwen2": _SIZE,
    "qwen3": _SIZE,
    "gemma3_text": {
        **_SIZE,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "phi3": {**_SIZE, "sliding_window": None},
    "gpt2": _GPT2_SIZE,
    "gpt_neox": {**_SIZE, "num_key_value_heads": 4},
}


def build(family: str, attention: str = "sdpa", **changes):
    """A random model in eval mode."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**_CONFIGS.get(family, _SIZE), **changes})
    return far_from_uniform(AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval())


def far_from_uniform(model):
    """The same model; weights of its decoder are larger than the usual initial ones, so that attention prefers some
    tokens."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not any(part in name for part in ("embed", "wte", "vis")):
                weight.mul_(4.0)
            elif "k_norm" in name:  # else all normalized keys have one norm, but for rounding
                weight.copy_(torch.rand_like(weight))
    return model


def of_many_heads(**changes):
    """A random Llama whose layers have 2, 4 and 1 key heads."""
    model = build("llama", **changes)
    for layer, n_head in zip(model.model.layers[1:], (4, 1), strict=True):
        attention = layer.self_attn
        attention.k_proj, attention.v_proj = (torch.nn.Linear(64, 16 * n_head, bias=False) for _ in "kv")
        attention.num_key_value_groups = 4 // n_head
    return model.requires_grad_(False)


def ids(n_row: int = 2, n_token: int = 30, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special and none twice in a row: equal tokens have keys of equal norm, but for
    rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([3 + torch.randperm(125, generator=generator)[:n_token] for _ in range(n_row)])


def longrope(n_short: int):
    """A Phi-3 whose longrope turns by other angles beyond so many positions."""
    factors = {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [4.0] * 8}  # in words of all releases
    return build("phi3", max_position_embeddings=64, rope_scaling=factors, original_max_position_embeddings=n_short)


def tiny_prompt() -> Prompt:
    """A prompt of 30 tokens in a vocabulary of the tiny model's size."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = [f"w{i}" for i in ids(1)[0].tolist()]
    parts = {"a": " ".join(words[2:14]), "b": " ".join(words[14:28])}
    return Prompt.from_text(PreTrainedTokenizerFast(tokenizer_object=tokenizer), " ".join(words), parts)


@torch.no_grad()
def feed(model, tokens, chunks, cache, mask=None, start=0):
    """Logits of the tokens, fed in chunks after ``start`` that the cache has seen; positions as ``generate`` would give
    them."""
    mask = torch.ones_like(tokens) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes = inspect.signature(model.forward).parameters  # on transformers 4 some count for themselves, such as BART
    counts = "position_ids" not in takes and all(p.kind is not p.VAR_KEYWORD for p in takes.values())
    out = []
    for n in chunks:
        new = slice(start, start + n)
        call = {"attention_mask": mask[:, : start + n], **cache_argument(model, cache)} | (
            {} if counts else {"position_ids": positions[:, new]}
        )
        out.append(model(tokens[:, new], use_cache=True, **call).logits)
        start += n
    return torch.cat(out, 1)


class masked_like:
    """Hide from an unwrapped model, layer by layer and head by head, the prompt tokens that a compressed cache
    evicted."""

    def __init__(self, model, cache: KeptCache, n_prompt: int):
        self.model, self.cache, self.n_prompt, self.hooks = model, cache, n_prompt, []

    def __enter__(self):
        compressed = {layer.index for layer in self.cache.kept_layers}
        for index, module in attention_modules(self.model).items():
            source = self._source(index, module)
            if source in compressed:
                hook = functools.partial(self._hide, source=source, is_own=source == index)
                self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _source(self, index, module):
        """The layer whose keys this one uses: the last of its kind that has keys of its own, or itself."""
        if not getattr(module, "is_kv_shared_layer", False):
            return index
        kinds = self.model.config.get_text_config(decoder=True).layer_types
        own = [
            i for i, other in attention_modules(self.model).items() if not getattr(other, "is_kv_shared_layer", False)
        ]
        return max(i for i in own if kinds[i] == kinds[index])

    def _hide(self, module, args, kwargs, source, is_own):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        source += bound.get("cache_offset", 0)  # of a layer that runs several times over
        hidden = bound["hidden_states"] if "hidden_states" in bound else bound["q"]  # ctrl
        cache = next(
            c
            for name in ("cache", "past_key_values", "past_key_value", "layer_past")
            if (c := bound.get(name)) is not None
        )
        n_row, n_new = hidden.shape[:2]
        n_past = cache.get_seq_length(source) - (0 if is_own else n_new)
        if (visible := self._visible(source, n_row, n_past, n_new)) is None:
            return None
        n_query_head = visible.shape[1]
        causal = torch.arange(n_past, n_past + n_new)[:, None] >= torch.arange(n_past + n_new)
        mask = torch.zeros(n_row, n_query_head, n_new, n_past + n_new).masked_fill(
            ~(visible[:, :, None] & causal), torch.finfo(torch.float32).min
        )
        if "attention_mask" not in names:  # ctrl calls it mask, and passes it by position
            place = names.index("mask")
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        given = bound.get("attention_mask")  # zaya's is two
        kwargs["attention_mask"] = {**given, "causal": mask} if isinstance(given, dict) else mask
        return args, kwargs

    def _visible(self, source, n_row, n_past, n_new):
        """Bool (B, Hq, T): the tokens that a layer did not evict; None before any was."""
        if n_past < self.n_prompt:
            return None
        return self._seen_at(self.cache.positions(source), n_row, self.n_prompt, n_past + n_new)

    def _seen_at(self, held, n_row, n_prompt, n_token):
        positions = torch.from_numpy(held.copy()).long()
        n_query_head = self.model.config.get_text_config(decoder=True).num_attention_heads
        positions = positions.repeat_interleave(n_query_head // positions.shape[1], 1)
        visible = torch.zeros(n_row, n_query_head, n_token + 1, dtype=torch.bool)
        visible.scatter_(
            2, torch.where(positions < 0, n_token, positions), True
        )  # the spare last column takes the padding
        visible = visible[..., :-1]
        visible[..., n_prompt:] = True
        return visible
