"""Adapters of PEFT's: a model that has some keeps and says what the model with their weights merged keeps and says."""

import peft
import pytest
import torch
from tiny_models import build, feed, ids, tiny_prompt

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.around import Around

N_PROMPT = 20
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
TASK = {"task_type": "CAUSAL_LM"}
LORA = {**TASK, "r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def adapted(config=None, seed=3):
    """A model with adapters whose weights are far from nothing."""
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(**LORA) if config is None else config)
    return drawn(model, seed)


def drawn(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "oft_")):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def found(model, handle):
    """What is kept, what follows it, and answers of both ways to go on."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    cache = handle.compress(tokens[:, :N_PROMPT])
    positions = [cache.positions(layer.index).tolist() for layer in cache.kept_layers]
    logits = feed(model, tokens, [1, 3], cache.copy(), start=N_PROMPT)
    given = {"input_ids": tokens, "attention_mask": mask, **GREEDY}
    answers = [model.generate(**given, **more).tolist() for more in ({}, cache_argument(model, cache))]
    return positions, answers, logits


def same(one, other):
    assert one[:2] == other[:2]
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=1e-4)


def wrapped(model, policy="knorm"):
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        return found(model, handle)


@pytest.mark.parametrize(
    "policy", ["knorm", "h2o", kvp.ExpectedAttention(n_sink=1), kvp.DefensiveKV(2), kvp.KVzip()], ids=str
)
def test_adapters_and_merged_weights_keep_and_say_the_same(policy):
    model, merged = adapted(), adapted().merge_and_unload()
    same(wrapped(model, policy), wrapped(merged, policy))
    prompt, settings = tiny_prompt(), {"policies": [policy], "compression_ratios": [0.5]}
    rows = [kvp.audit(each, prompt, **settings).rows for each in (model, merged)]
    for row, other in zip(*rows, strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    rows = [kvp.effects(x, prompt, "knorm", said=[" w3", " w5 w9 w4"], max_new_tokens=3).rows for x in (model, merged)]
    for row, other in zip(*rows, strict=True):
        assert row == pytest.approx(other, abs=1e-3)


CHANGES = {
    "merge": lambda model: model.merge_adapter(),
    "switch": lambda model: model.set_adapter("second"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "unload": lambda model: model.unload(),
    "merge and unload": lambda model: model.merge_and_unload(),
    "delete": lambda model: (model.set_adapter("second"), model.delete_adapter("default"))[0],
}


def two():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(**LORA))
    return drawn(model, 5)


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_that_change_inside_a_wrap_count_from_then_on(change):
    model, other = two(), two()
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        stale = handle.compress(ids()[:, :N_PROMPT])
        now = CHANGES[change](model) or model
        got = found(now, handle)
        if change == "switch":
            with pytest.raises(ValueError, match="filled with the adapters default, but now second is active"):
                now.generate(input_ids=ids(), **cache_argument(now, stale), **GREEDY)
    same(got, wrapped(CHANGES[change](other) or other))
    assert not any(isinstance(x, Around) for module in model.modules() for x in vars(module).values())


def test_adapters_that_come_to_a_wrapped_model():
    model = build("llama")
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        got = found(drawn(peft.get_peft_model(model, peft.LoraConfig(**LORA)), 3), handle)
    same(got, wrapped(adapted()))


def test_rows_with_adapters_of_their_own():
    model, tokens = two(), ids()[:, :N_PROMPT]
    mask = torch.ones_like(tokens)
    with kvp.wrap(model, "knorm", compression_ratio=0.5):
        both = model.generate(input_ids=tokens, attention_mask=mask, adapter_names=["default", "second"], **GREEDY)
        for row, name in enumerate(("default", "second")):
            model.set_adapter(name)
            alone = model.generate(input_ids=tokens[row : row + 1], attention_mask=mask[:1], **GREEDY)
            assert torch.equal(both[row : row + 1], alone)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "activated"])
def test_learned_and_activated_adapters_are_refused(kind):
    """Also around a model that is wrapped, where a compressed prompt would lack their tokens."""
    tokens = ids()
    if kind == "activated":
        config = peft.LoraConfig(**LORA, alora_invocation_tokens=[5])
    else:
        config = getattr(peft, kind)(**TASK, num_virtual_tokens=4)
    inside = build("llama")
    model = peft.get_peft_model(inside, config).eval()
    message = "has the (activated LoRA|adapter) 'default'"
    with pytest.raises(kvp.UnsupportedModelError, match=message):
        kvp.wrap(model, "knorm", compression_ratio=0.5)
    if kind == "activated":
        return
    with kvp.wrap(inside, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        for given in ({}, cache_argument(inside, cache)):
            with pytest.raises(kvp.UnsupportedModelError, match=message):
                model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **GREEDY, **given)
