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


def forget_names(model):
    """PEFT's hooks stay on its layers when a call fails."""
    for module in model.modules():
        module._forward_pre_hooks.clear()


ROWS = [None, ("default", "default"), ("default", "second"), ("second", "default"), ("__base__", "second")]


@pytest.mark.parametrize("before", ROWS)
@torch.no_grad()
def test_a_cache_goes_on_with_the_adapters_of_each_of_its_rows(before, tmp_path):
    """In calls of generate and by hand, after rows moved; where the names differ, so would the numbers."""
    model, tokens = two(), ids(2)
    told = {} if before is None else {"adapter_names": list(before)}
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache, prompt = handle.new_cache(), tokens[:, :N_PROMPT]
        model(input_ids=prompt, **cache_argument(model, cache), **told)
        swapped, doubled = cache.copy(), cache.copy()
        swapped.batch_select_indices(torch.tensor([1, 0]))
        doubled.batch_repeat_interleave(2)
        meant = before or ("default", "default")
        for now in ROWS:
            names = now or ("default", "default")
            more = {} if now is None else {"adapter_names": list(now)}
            for kept, ours, order in ((cache, meant, [0, 1]), (swapped, meant[::-1], [1, 0])):
                asked = {"input_ids": tokens[order], "attention_mask": torch.ones_like(tokens), **GREEDY}
                calls = (
                    lambda x, asked=asked, more=more: model.generate(**asked, **cache_argument(model, x), **more),
                    lambda x, asked=asked, more=more: model(
                        input_ids=asked["input_ids"][:, N_PROMPT:], **cache_argument(model, x), **more
                    ),
                )
                for call in calls:
                    if names == ours:
                        call(kept.copy())
                        continue
                    with pytest.raises(ValueError, match=r"filled with the adapters .*, but now .* is active"):
                        call(kept.copy())
                    forget_names(model)
        asked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **GREEDY, "num_beams": 2}
        model.generate(**asked, **cache_argument(model, doubled), **told)
        if len(set(meant)) > 1:
            with pytest.raises(ValueError, match=r"filled with the adapters (default|second|none); .* now default is"):
                cache.save(tmp_path / "cache")


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


@pytest.mark.parametrize("fair", [False, True])
@torch.no_grad()
def test_a_forward_of_a_prompt_tuned_model_is_one_of_embeddings_whose_learned_ones_are_tokens_too(fair):
    """Around a model that is wrapped; marked spans begin after them."""
    inside, tokens, n_learned = build("llama"), ids(2)[:, :N_PROMPT], 4
    model = peft.get_peft_model(inside, peft.PromptTuningConfig(**TASK, num_virtual_tokens=n_learned)).eval()
    embeds = torch.cat([model.get_prompt(batch_size=2), inside.get_input_embeddings()(tokens)], 1)
    spans = {"a": (n_learned, 12), "b": (12, n_learned + N_PROMPT)}
    with kvp.wrap(inside, "h2o", compression_ratio=0.5, fair=fair) as handle:
        ours, wanted = handle.new_cache(spans=spans), handle.new_cache(spans=spans)
        model(input_ids=tokens, **cache_argument(inside, ours))
        inside(inputs_embeds=embeds, **cache_argument(inside, wanted))
    assert ours.n_seen == n_learned + N_PROMPT and ours.tokens is None
    for layer, other in zip(ours.kept_layers, wanted.kept_layers, strict=True):
        assert layer.kept_positions.tolist() == other.kept_positions.tolist()
        torch.testing.assert_close(layer.keys, other.keys, rtol=0, atol=1e-6)
