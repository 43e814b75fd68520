"""A wrap refuses continuous batching, whose paged cache is its own and is filled by another thread."""

import contextlib

import pytest
from tiny_models import build, ids
from transformers import GenerationConfig

import kvpitfalls as kvp


@pytest.fixture
def llama():
    return build("llama")


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_continuous_batching_is_refused(llama, ratio):
    assert hasattr(llama, "generate_batch"), "every release that is tried has it"
    config = GenerationConfig(max_new_tokens=2, eos_token_id=2, pad_token_id=0)
    with kvp.wrap(llama, "knorm", compression_ratio=ratio) as handle:
        for within in (contextlib.nullcontext, handle.paused):  # its forwards are another thread's, which is not paused
            with within(), pytest.raises(kvp.UnsupportedModelError, match=r"continuous batching .* outside the wrap"):
                llama.generate_batch([ids(1)[0].tolist()], generation_config=config)
    assert "init_continuous_batching" not in vars(llama)


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("way", ["argument", "config", "the model's config"])
def test_a_paged_cache_is_refused_as_continuous_batching(llama, way, ratio):
    """It is what generate makes of it; the wrap's own stopping criterion would be what it cannot have."""
    config, paged = GenerationConfig(max_new_tokens=2), {"cache_implementation": "paged"}
    given = {"argument": paged, "config": {"generation_config": config}, "the model's config": {}}[way]
    for one in {"config": [config], "the model's config": [llama.generation_config]}.get(way, []):
        one.cache_implementation = "paged"
    with (
        kvp.wrap(llama, "knorm", compression_ratio=ratio),
        pytest.raises(kvp.UnsupportedModelError, match=r"continuous batching .*'paged'.* outside the wrap"),
    ):
        llama.generate(ids(1), **given)
