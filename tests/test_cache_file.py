"""A saved cache is the cache: it goes on as the original would, and is refused where it does not belong."""

import copy
import os
import pickle

import pytest
import torch
from model_sweep import build as build_type
from model_sweep import mixed, not_refused
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import build, chunks_of_generate, feed, ids

import kvpitfalls as kvp
from kvpitfalls.hf import save

N_PROMPT, CHUNKS = 20, [1, 1, 5, 1]


@pytest.mark.parametrize(
    "family", [*not_refused("llama", "gemma3_text", "qwen3_next", "deepseek_v3", "gpt2", "gemma3n_text"), *mixed()]
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_loaded_cache_goes_on_as_the_original(family, padded, tmp_path):
    model, tokens, path = build_type(family), ids(), tmp_path / "prompt.safetensors"
    mask = torch.ones_like(tokens)
    mask[0, : 3 * padded] = 0
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with kvp.wrap(model, "snapkv", compression_ratio=0.6, fair=True) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT], spans={"a": (4, 10), "b": (10, 18)})
        for layer in cache.layers:  # states of linear attention may be strided, as some kernels want them
            states = getattr(layer, "conv_states", None)
            for n, x in states.items() if isinstance(states, dict) else ():
                states[n] = x.transpose(1, 2).contiguous().transpose(1, 2)
        cache.save(path)
        loaded = kvp.load_cache(path, model)
        assert loaded.report() == cache.report() and loaded.valid == cache.valid
        wanted = feed(model, tokens, CHUNKS, copy.deepcopy(cache), mask, start=N_PROMPT)
        assert torch.equal(feed(model, tokens, CHUNKS, copy.deepcopy(loaded), mask, start=N_PROMPT), wanted)
        first, second = (
            model.generate(tokens, attention_mask=mask, past_key_values=copy.deepcopy(c), **greedy)
            for c in (cache, loaded)
        )
        assert torch.equal(first, second)
    assert os.listdir(tmp_path) == [path.name]


def test_files_that_do_not_belong_are_refused(tmp_path):
    model, path = build("llama"), tmp_path / "prompt.safetensors"
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        with pytest.raises(ValueError, match="the cache is empty"):
            handle.new_cache().save(path)
        assert not path.exists()
        handle.compress(ids()).save(path)
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="holds the cache of another model; expected one that LlamaForCausalLM filled"):
        kvp.load_cache(path, other)
    with pytest.raises(ValueError, match="another model"):
        kvp.load_cache(path, build("qwen3"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        kvp.load_cache(tmp_path / "nothing", model)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for version, message in (
        ("3", "has version 3; expected at most 2"),
        ("1", "has version 1, of an older kvpitfalls; expected 2"),
    ):
        save_file(tensors, tmp_path / "other", {**metadata, "version": version})
        with pytest.raises(ValueError, match=message):
            kvp.load_cache(tmp_path / "other", model)
    save_file(tensors, tmp_path / "foreign")
    with pytest.raises(ValueError, match="is not a cache of this package"):
        kvp.load_cache(tmp_path / "foreign", model)
    without = {
        "tag only": (tensors, {"format": "kvpitfalls.cache"}),
        "no content": (tensors, {"format": "kvpitfalls.cache", "version": "2"}),
        "no checksum": (tensors, {name: text for name, text in metadata.items() if name != "sha256"}),
        "version zero": (tensors, {**metadata, "version": "0"}),
    }
    for name, (some, about) in without.items():
        save_file(some, tmp_path / name, about)
        with pytest.raises(
            ValueError, match=f"{name} has the tag of a cache but not its content; expected a file saved by"
        ):
            kvp.load_cache(tmp_path / name, model)
    (tmp_path / "broken").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is broken"):
        kvp.load_cache(tmp_path / "broken", model)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = build("llama"), tmp_path / "prompt.safetensors"
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        handle.compress(ids()).save(path)
        before = path.read_bytes()
        monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            handle.compress(ids(seed=1)).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


class Float8Linear(torch.nn.Module):
    """As a checkpoint in float8 has them: cast when they are used."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


class Halves(torch.Tensor):
    """A tensor subclass made of two tensors, without operations of its own, as quantized weights are."""

    @staticmethod
    def __new__(cls, whole):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype, device=whole.device)

    def __init__(self, whole):
        self.first, self.second = whole.detach().clone().chunk(2)

    def __tensor_flatten__(self):
        return ["first", "second"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        whole = [torch.cat([x.first, x.second]) if isinstance(x, cls) else x for x in args]
        return args[0] if "detach" in str(function) else function(*whole, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["float8", "subclass", "buffer"])
def test_weights_of_every_kind_tell_models_apart(kind, tmp_path):
    def changed(factor):
        model = build("llama")
        mlp = model.model.layers[1].mlp
        with torch.no_grad():
            mlp.up_proj.weight.mul_(factor)
        if kind == "float8":
            mlp.up_proj = Float8Linear(mlp.up_proj)
        elif kind == "subclass":
            mlp.up_proj.weight = torch.nn.Parameter(Halves(mlp.up_proj.weight), requires_grad=False)
        else:
            mlp.register_buffer("scale", torch.tensor([factor]))
            del mlp.up_proj.weight
            mlp.up_proj.register_buffer("weight", torch.ones(96, 64) * factor)
        return model

    model, path = changed(1.0), tmp_path / "prompt.safetensors"
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        handle.compress(ids()).save(path)
    same = changed(1.0)
    kvp.load_cache(path, same).save(tmp_path / "again")
    with pytest.raises(ValueError, match="another model"):
        kvp.load_cache(path, changed(1.5))


def test_a_cache_is_saved_with_the_weights_and_the_adapters_that_filled_it(tmp_path):
    model, other, path = build("llama"), build("llama", initializer_range=0.5), tmp_path / "prompt.safetensors"
    old = {name: x.clone() for name, x in model.state_dict().items()}
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        before = handle.compress(ids())
        model.load_state_dict(other.state_dict())
        handle.compress(ids()).save(path)
        with pytest.raises(ValueError, match="weights were changed since the cache was filled; expected save"):
            before.save(tmp_path / "late")
        with pytest.raises(ValueError, match="gone, or the cache was pickled"):
            pickle.loads(pickle.dumps(before)).save(tmp_path / "late")
    kvp.load_cache(path, model)
    model.model.layers[0].mlp.active_adapters = ["tuned"]
    with pytest.raises(ValueError, match="another model"):
        kvp.load_cache(path, model)
    model.load_state_dict(old)
    with pytest.raises(ValueError, match="another model"):
        kvp.load_cache(path, model)
    assert os.listdir(tmp_path) == [path.name]


def test_a_fingerprint_is_taken_when_a_cache_is_saved_or_loaded_and_at_no_other_time(tmp_path, monkeypatch):
    model, taken = build("llama"), []
    real = save.fingerprint
    monkeypatch.setattr(save, "fingerprint", lambda decoder: taken.append(decoder) or real(decoder))
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(ids())
        model.generate(torch.cat([ids(), ids(2, 3)], 1), past_key_values=cache.copy(), max_new_tokens=2)
        assert taken == []
        cache.save(tmp_path / "prompt")
        assert taken == [model.model]


@pytest.mark.parametrize("size", [None, pytest.param(7, marks=chunks_of_generate)])
@pytest.mark.parametrize("ratio", [0, 0.5])
def test_a_cache_whose_prefill_was_broken_off_is_not_saved(ratio, size, tmp_path):
    """It would be loaded as one of a shorter prompt."""
    model, calls = build_type("llama"), []

    def stop(*_):
        calls.append(1)
        if len(calls) == (1 if size is None else 3):
            raise KeyboardInterrupt

    with kvp.wrap(model, "knorm", compression_ratio=ratio) as handle:
        cache = handle.new_cache()
        hook = (model.model.norm if size is None else model.model).register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            chunks = {} if size is None else {"prefill_chunk_size": size}
            model.generate(ids(1, N_PROMPT), past_key_values=cache, max_new_tokens=2, **chunks)
        hook.remove()
        assert cache.n_seen and (cache.is_half_filled if size is None else cache.coming is not None)
        with pytest.raises(ValueError, match="was broken off; expected a cache as a whole"):
            cache.save(tmp_path / "cache.safetensors")
    assert not os.listdir(tmp_path)
