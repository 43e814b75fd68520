"""Gradients in eval mode (saliency, attacks by gradient, soft prompts): through a compressed cache flows what a mask
lets through."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from model_sweep import build, not_refused
from tiny_models import build as build_tiny
from tiny_models import feed, ids, masked_like
from tiny_policies import EQUAL, HELD, takes
from transformers import DynamicCache

import kvpitfalls as kvp

N_PROMPT, CHUNKS, N_TOKEN = 14, [1, 4], 19
POLICIES = [*EQUAL, "random"]
SPANS = {"a": (1, 6), "b": (7, 12)}
FAMILIES = not_refused("llama", "gpt2", "gemma3_text", "cohere2", "gpt_neox", "deepseek_v3", "phi3")
CASES = [*((family, "sdpa") for family in FAMILIES), ("llama", "eager"), ("gpt_oss", "eager")]
feed = feed.__wrapped__  # with gradients


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request):
    return build(*request.param)


def gradients(model, logits):
    """Of a loss over the answer, by the names of the weights it depends on; the prompt's embeddings are among them."""
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(logits.log_softmax(-1)[..., 5].sum(), weights, allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def check_same(got, wanted):
    assert got.keys() == wanted.keys()
    largest = max(float(x.abs().max()) for x in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def masked(model, kept, tokens, mask):
    """The answer's logits on the full cache, with what was evicted hidden by a mask per head."""
    full = DynamicCache(config=model.config)
    feed(model, tokens, [N_PROMPT], full, mask)
    with masked_like(model, kept, N_PROMPT):
        return feed(model, tokens, CHUNKS, full, mask, start=N_PROMPT)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("fair", [False, True])
def test_gradients_are_those_of_the_masked_model(model, policy, fair):
    if not takes(model, policy):
        pytest.skip("the model turns no queries by their positions, or in a way of its own")
    tokens, mask = ids(2, N_TOKEN), torch.ones(2, N_TOKEN, dtype=torch.long)
    mask[0, :3] = 0
    spans = [{"a": (4, 8), "b": (9, 13)}, SPANS]
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair) as handle:
        cache = handle.new_cache(spans=spans)
        feed(model, tokens, [N_PROMPT], cache, mask)
        kept = cache.copy()
        logits = feed(model, tokens, CHUNKS, cache, mask, start=N_PROMPT)
        of_copy = feed(model, tokens, CHUNKS, kept.copy(), mask, start=N_PROMPT)
    reference = masked(model, kept, tokens, mask)
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-4)
    wanted = gradients(model, reference)
    check_same(gradients(model, logits), wanted)
    check_same(gradients(model, of_copy), wanted)


def test_what_a_policy_sees_has_no_gradient(model):
    """Neither keys, nor weights such as the sinks of attention: what is kept is no function that has one."""
    seen = set()

    @dataclass(frozen=True)
    class Looks(kvp.Policy):
        name = "looks"
        listed: ClassVar[bool] = False
        needs_queries = needs_values = needs_output = True

        def score(self, inputs):
            tensors = {name: x for name, x in vars(inputs).items() if isinstance(x, torch.Tensor)}
            assert not [name for name, x in tensors.items() if x.requires_grad]
            seen.update(tensors)
            return inputs.keys.float().norm(dim=-1)

    with kvp.wrap(model, Looks(), compression_ratio=0.5) as handle:
        feed(model, ids(2, N_PROMPT), [N_PROMPT], handle.new_cache(), None)
    assert seen >= {"keys", "queries", "values"} and ("sinks" in seen) == (model.config.model_type == "gpt_oss")


@pytest.mark.parametrize("when", ["always", "decode"])
@pytest.mark.parametrize("policy", [*HELD, "random"], ids=str)
def test_a_held_budget_keeps_gradients(policy, when):
    model, tokens = build_tiny("llama"), ids(2, N_TOKEN)
    with kvp.wrap(model, policy, budget=8, when=when) as handle:
        cache = handle.new_cache()
        feed(model, tokens, [N_PROMPT, 2], cache)
        kept = [(layer.pos, layer.keys, layer.values) for layer in cache.kept_layers]
        full = DynamicCache(config=model.config)
    feed(model, tokens, [N_PROMPT, 2], full)
    for layer, (pos, *rows) in zip(full.layers, kept, strict=True):
        of_all = [x.gather(2, pos[..., None].expand(*pos.shape, x.shape[-1])) for x in (layer.keys, layer.values)]
        if layer is full.layers[0]:  # later layers' rows saw what had gone by then
            loss, wanted = (torch.stack([x.square().sum() for x in pair]).sum() for pair in (rows, of_all))
            check_same(
                *(
                    {"embeddings": torch.autograd.grad(x, model.get_input_embeddings().weight)[0]}
                    for x in (loss, wanted)
                )
            )
        assert all(x.requires_grad for x in rows)


def test_what_a_graph_recorded_is_not_in_the_way():
    model, tokens = build_tiny("llama"), ids(2, N_TOKEN)
    with kvp.wrap(model, "h2o", compression_ratio=0.5) as handle:
        cache, alone = handle.new_cache(), handle.compress(tokens[:, :N_PROMPT])
        feed(model, tokens, [N_PROMPT], cache)
        for same in (cache, copy.deepcopy(cache), cache.fixed(8)):
            with torch.no_grad():
                got = feed(model, tokens, CHUNKS, same, start=N_PROMPT)
                wanted = feed(model, tokens, CHUNKS, alone.copy(), start=N_PROMPT)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_a_fixed_cache_writes_over_nothing_that_a_gradient_needs():
    model, tokens = build_tiny("llama"), ids(2, N_TOKEN)
    with kvp.wrap(model, "h2o", compression_ratio=0.5) as handle:
        fixed = handle.compress(tokens[:, :N_PROMPT]).fixed(8)
        with pytest.raises(ValueError, match="gradients on"):
            feed(model, tokens, [2], fixed, start=N_PROMPT)
        model.requires_grad_(False)
        question = model.get_input_embeddings()(tokens[:, N_PROMPT:]).requires_grad_()
        with pytest.raises(ValueError, match="gradients on"):
            model(inputs_embeds=question, past_key_values=fixed)
        assert fixed.n_seen == N_PROMPT
        feed(model, tokens, [2], fixed, start=N_PROMPT)  # nothing is recorded where no weight wants a gradient
    assert fixed.n_seen == N_PROMPT + 2
