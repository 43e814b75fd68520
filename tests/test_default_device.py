"""What torch.set_default_device says is for tensors of the caller's: a wrap computes where its model is, or on the CPU.

The default is ``meta`` here, whose tensors have no values, so that whatever is made there by mistake is noticed; as a
GPU would be by a model on the CPU, and the CPU's by one on a GPU.
"""

import numpy as np
import pytest
import torch
from tiny_models import build, feed, ids, tiny_prompt
from tiny_policies import EVERY, HELD

import kvpitfalls as kvp
from kvpitfalls.eviction.allocation import Pyramid
from kvpitfalls.hf.generate import answers
from kvpitfalls.hf.layer import KeptLayer

SPANS = [{"a": (4, 10), "b": (10, 18)}, {"a": (0, 10), "b": (10, 18)}]


@pytest.fixture(scope="module")
def llama():
    return build("llama").requires_grad_(False)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 20 and 16 tokens, and four more each; their mask."""
    tokens = ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    return tokens, mask


def told(cache, logits) -> list:
    """What a cache holds and says, and what came of it."""
    kept = [cache.positions(layer.index) for layer in cache.kept_layers]
    return [*kept, *(layer.keys for layer in cache.kept_layers), logits]


def same_by_default(run) -> None:
    """Whether a call gives what it gives without a default device."""
    wanted = run()
    with torch.device("meta"):
        got = run()
    for x, y in zip(wanted, got, strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


def compressed(llama, policy, **settings):
    tokens, mask = padded()

    def run():
        with kvp.wrap(llama, policy, compression_ratio=0.5, **settings) as handle:
            cache = handle.compress(tokens[:, :20], mask[:, :20], spans=SPANS)
            twin = cache.copy()
            twin.batch_select_indices([1, 0])
            twin.batch_repeat_interleave(2)
            logits = feed(llama, tokens, [1, 2, 1], cache, mask, start=20)
        return told(cache, logits) + [x["b"] for x in cache.report()["spans_by_row"]]

    return run


@pytest.mark.parametrize("fair", [False, True, 0.5, "floor=2"])
@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_a_prompt_is_compressed_and_gone_on_with(llama, policy, fair):
    same_by_default(compressed(llama, policy, fair=fair))


@pytest.mark.parametrize("when", ["always", "decode"])
@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", HELD, ids=str)
def test_a_budget_is_held(llama, policy, fair, when):
    same_by_default(compressed(llama, policy, fair=fair, when=when))


@pytest.mark.parametrize("allocation", [Pyramid(beta=2), "ada"], ids=str)
def test_a_budget_is_shared_unequally(llama, allocation):
    same_by_default(compressed(llama, "snapkv", allocation=allocation, protect=[12, 17]))


@pytest.mark.parametrize("options", [{}, {"fair": True}, {"protect": "sinks"}])
@pytest.mark.parametrize("policy", ["snapkv", "h2o", "knorm", "streaming_llm", "tova"])
def test_a_prompt_comes_in_chunks(llama, policy, options):
    tokens, mask = padded()

    def run():
        with kvp.wrap(llama, policy, compression_ratio=0.5, **options) as handle:
            cache = handle.compress(tokens[:, :20], mask[:, :20], spans=SPANS, prefill_chunk_size=7)
            return told(cache, feed(llama, tokens, [1, 3], cache, mask, start=20))

    same_by_default(run)


@pytest.mark.parametrize("policy, when", [("snapkv", "prefill"), ("tova", "always"), ("h2o", "always")])
def test_a_cache_has_a_fixed_size_or_comes_from_a_file(llama, policy, when, tmp_path):
    tokens, mask = padded()

    def run():
        with kvp.wrap(llama, policy, compression_ratio=0.5, when=when) as handle:
            cache = handle.compress(tokens[:, :20], mask[:, :20])
            fixed = cache.fixed(9)
            out = feed(llama, tokens, [1, 1, 1, 1], fixed, mask, start=20)
            if when == "always":
                return [out]
            cache.save(tmp_path / "cache")
            loaded = kvp.load_cache(tmp_path / "cache", llama)
            return [out, *told(loaded, feed(llama, tokens, [4], loaded, mask, start=20))]

    same_by_default(run)


def test_prompts_of_their_own_lengths_are_answered_audited_and_probed(llama):
    prompt = tiny_prompt()
    full = [*prompt.token_ids, 5, 9, 7]

    def run():
        with kvp.wrap(llama, "snapkv", compression_ratio=0.5, protect="a") as handle:
            difference = handle.verify()
            cache = handle.compress([prompt, prompt])
            assert all(isinstance(layer, KeptLayer) for layer in cache.layers)
            said = answers(llama, [prompt, prompt], [full, full[:-1]], cache, 3)
        kept = [row["kept"] for row in kvp.audit(llama, prompt).rows]
        return [difference < 1e-4, [answer.text for answer in said], kept]

    same_by_default(run)
