"""Layers that hold keys and values and states of linear attention at once: no two caches write into one state."""

import copy

import pytest
import torch
from model_sweep import build, mixed
from tiny_models import feed, ids

import kvpitfalls as kvp
from kvpitfalls.hf.rows import taken

N_PROMPT, REST = 12, [1, 3, 1, 1]


@pytest.fixture(scope="module", params=mixed())
def model(request):
    return build(request.param)


def states_of(layer):
    """Before transformers 5.17 a layer has one state of a kind, and not several by their numbers."""
    kinds = (layer.conv_states, layer.recurrent_states)
    return [x for kind in kinds for x in (kind.values() if isinstance(kind, dict) else [kind])]


def after(model, cache, tokens):
    return feed(model, tokens, REST, cache, start=N_PROMPT)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda cache: taken(cache, [0, 1])])
def test_what_comes_to_a_twin_does_not_come_to_the_cache(model, twin):
    tokens = ids(2, N_PROMPT + sum(REST))
    with kvp.wrap(model, "h2o", budget=6) as handle:
        wanted = after(model, handle.compress(tokens[:, :N_PROMPT]), tokens)
        cache = handle.compress(tokens[:, :N_PROMPT])
        after(model, twin(cache), ids(2, N_PROMPT + sum(REST), seed=4))
        assert torch.equal(after(model, cache, tokens), wanted)
        for layer in cache.kept_layers:  # nor to a layer's own
            pairs = zip(states_of(layer), states_of(copy.copy(layer)), strict=True)
            assert all(torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in pairs)


def test_an_outline_holds_no_states(model):
    with kvp.wrap(model, "h2o", budget=6) as handle:
        cache = handle.compress(ids(2, N_PROMPT))
        for layer in cache.outline().layers:
            assert all(x.is_meta for x in states_of(layer))
        assert cache.outline().report() == cache.report()


def test_states_forget_no_token_and_have_no_fixed_size(model):
    tokens = ids(2, N_PROMPT + sum(REST))
    with kvp.wrap(model, "h2o", compression_ratio=0) as handle:
        wanted = after(model, handle.compress(tokens[:, :N_PROMPT]), tokens)
        cache = handle.compress(tokens[:, :N_PROMPT])
        with pytest.raises(ValueError, match=r"crop would drop 2 tokens of layer \d+, whose linear attention cannot"):
            cache.crop(-2)
        with pytest.raises(ValueError, match=r"are not compressed, or not as a whole \(\w+: its state has a fixed"):
            cache.fixed(4)
        assert torch.equal(after(model, cache, tokens), wanted)
        cache.reset()
        feed(model, tokens, [N_PROMPT], cache)
        assert torch.equal(after(model, cache, tokens), wanted)
