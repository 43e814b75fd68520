"""No causal-LM type of transformers is silently uncompressed: each is exact, refused by name, or, of earlier releases,
listed as not built here."""

import pytest
import torch
import transformers
from model_sweep import PAGE, TYPES, Outcome, build, exact, examine, listed, not_refused, page, page_version
from tiny_models import ids
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import kvpitfalls as kvp

OUTCOMES: dict[str, Outcome] = {}


@pytest.mark.parametrize("model_type", TYPES)
def test_type(model_type):
    expected = listed()
    outcome = OUTCOMES[model_type] = examine(model_type)
    if transformers.__version__ == page_version():
        assert model_type in expected, f"{model_type} is new: run python tests/model_sweep.py, and look at what it says"
        assert outcome.status == expected[model_type]
    elif (
        outcome.status != "not built"
    ):  # other releases may hold a type's cache in a way that must be refused, but nothing else
        assert outcome.status in (expected.get(model_type, "exact"), "refused"), outcome


def test_page_is_what_the_sweep_found():
    if len(OUTCOMES) < len(TYPES):  # this test was picked alone
        OUTCOMES.update({name: examine(name) for name in TYPES if name not in OUTCOMES})
    n_exact = sum(outcome.status == "exact" for outcome in OUTCOMES.values())
    assert n_exact >= 60
    if transformers.__version__ == page_version():
        assert n_exact >= 75
        assert PAGE.read_text() == page(OUTCOMES)


@pytest.mark.parametrize("family", not_refused("dory"))
@pytest.mark.parametrize("n_loops", [1, 2, 3])
def test_layers_that_run_several_times_over_are_compressed_each_time(family, n_loops):
    model = build(family, n_recurrent_loops=n_loops)
    assert exact(model) == "DynamicSlidingWindowLayer left as they are"
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(2, 12), cache=plain)
    with kvp.wrap(model, "h2o", compression_ratio=0.5) as handle:
        cache = handle.compress(ids(2, 12))
    assert len(cache.layers) == len(plain.layers) == model.config.num_hidden_layers + 2 * (n_loops - 1)
    assert [x.index for x in cache.kept_layers] == [i for i, x in enumerate(plain.layers) if type(x) is DynamicLayer]
    whole = build(family, n_recurrent_loops=n_loops, layer_types=["full_attention"] * 4)
    with kvp.wrap(whole, "h2o", compression_ratio=0.5) as handle:
        cache = handle.compress(ids(2, 12))
        if n_loops == 1:
            cache.fixed(4)
        else:
            with pytest.raises(ValueError, match=r"^the model runs some layers several times over, so that"):
                cache.copy().fixed(4)
    model.config.recurrent_kv_cache_mode = "last_loop"
    with pytest.raises(
        kvp.UnsupportedModelError, match="has recurrent_kv_cache_mode='last_loop', by which its earlier"
    ):
        kvp.wrap(model, "h2o", compression_ratio=0.5)
