"""Prompts with images: they go through the model around the decoder, and each cache goes on at the positions of its own
prompt."""

import copy
import inspect

import pytest
import torch
from tiny_models import ids, masked_like
from tiny_multimodal import FAMILIES, OF_GRIDS, OF_TEXT, build, followed_by, image_prompt
from transformers import BatchFeature, DynamicCache

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
CLOSE = {"rtol": 0, "atol": 1e-4}
QUESTION = ids(1, 4, 9)
CASES = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]


TEXT_CASES = [(family, attention) for family in OF_TEXT for attention in ("sdpa", "eager")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    return build(*request.param), request.param[0]


@pytest.fixture(scope="module", params=TEXT_CASES, ids="-".join)
def text_case(request):
    return build(*request.param)


def answer(model, tokens, cache=None, **given):
    """The logits of an answer, (B, 5, V), from new tokens that follow what the cache has seen."""
    given = {
        "attention_mask": torch.ones_like(tokens),
        **given,
        **({} if cache is None else cache_argument(model, cache)),
    }
    out = model.generate(tokens, **{**GREEDY, **given}, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1)


def after(model, given) -> DynamicCache:
    """The model's own cache after a prompt."""
    whole = DynamicCache(config=model.config)
    model.generate(**given, max_new_tokens=1, do_sample=False, pad_token_id=0, **cache_argument(model, whole))
    return whole


def other_prompts(model, family, handle):
    """What leaves other positions behind."""
    with handle.paused():
        answer(model, **_tokens(image_prompt(model, family, 20, side=12)))
    handle.compress(ids(2, 15), spans={"all": (0, 15)})
    handle.compress(image_prompt(model, family, 30, side=4, n_row=2), spans={"all": (0, 10)})


def test_with_nothing_evicted_an_image_prompt_is_answered_as_by_the_model_alone(case):
    model, family = case
    inputs = image_prompt(model, family)
    longer = followed_by(inputs, QUESTION)
    tokens = longer.pop("input_ids")
    wanted = answer(model, tokens, **longer)
    with kvp.wrap(model, "knorm", compression_ratio=0) as handle:
        assert torch.allclose(answer(model, tokens, **longer), wanted, **CLOSE)
        cache = handle.compress(BatchFeature(inputs))
        other_prompts(model, family, handle)
        ours = answer(model, tokens, cache)
    # in two steps, too: transformers 5.2 (Qwen2-VL) and 5.5 (Qwen2.5-VL) count positions after an image otherwise when
    # they come in one
    assert torch.allclose(ours, answer(model, tokens, after(model, inputs)), **CLOSE)


@pytest.mark.parametrize("policy", ["knorm", "snapkv"])
def test_an_evicted_image_prompt_is_answered_as_under_a_mask(case, policy):
    model, family = case
    inputs = image_prompt(model, family)
    tokens = torch.cat([inputs["input_ids"], QUESTION], 1)
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=True) as handle:
        cache = handle.compress(**inputs, spans={"image": (6, 22), "text": (23, 32)})
        kept = copy.deepcopy(cache)
        assert cache.report()["kept_share"] == 0.5 and torch.equal(cache.tokens, inputs["input_ids"])
        other_prompts(model, family, handle)
        ours = answer(model, tokens, cache)
    with masked_like(model, kept, inputs["input_ids"].shape[1]):
        wanted = answer(model, tokens, after(model, inputs))
    assert torch.allclose(ours, wanted, **CLOSE)
    assert not torch.allclose(ours, answer(model, **_tokens(followed_by(inputs, QUESTION))), **CLOSE), (
        "eviction changes something"
    )


def _tokens(given: dict) -> dict:
    return {"tokens": given["input_ids"], **{name: x for name, x in given.items() if name != "input_ids"}}


@pytest.mark.parametrize("prompt", ["text", "image"])
def test_a_forward_by_hand_goes_on_at_the_positions_of_its_own_prompt(case, prompt):
    model, family = case
    inputs = image_prompt(model, family) if prompt == "image" else {"input_ids": ids(1, 20)}
    n_prompt = inputs["input_ids"].shape[1]
    place = {"cache_position": torch.arange(n_prompt, n_prompt + 4)}  # transformers 4 counts from 0 without it
    place = {name: x for name, x in place.items() if name in inspect.signature(model.forward).parameters}
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle, torch.no_grad():
        cache = handle.compress(inputs)
        by_generate = answer(model, torch.cat([inputs["input_ids"], QUESTION], 1), cache.copy())[:, 0]
        other_prompts(model, family, handle)
        by_hand = model(QUESTION, **place, **cache_argument(model, cache)).logits[:, -1]
    assert torch.allclose(by_hand, by_generate, **CLOSE)


def test_padded_texts_are_answered_as_each_alone(case):
    model, family = case
    texts = [ids(1, 20), ids(1, 17, 5)]
    rows = torch.stack([texts[0][0], torch.nn.functional.pad(texts[1][0], (3, 0))])
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    question = QUESTION.expand(2, -1)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(rows, attention_mask=mask)
        other_prompts(model, family, handle)
        mask = torch.cat([mask, torch.ones_like(question)], 1)
        both = answer(model, torch.cat([rows, question], 1), cache, attention_mask=mask)
        for row, text in enumerate(texts):
            assert torch.allclose(
                answer(model, torch.cat([text, QUESTION], 1), handle.compress(text)), both[row], **CLOSE
            )


def test_rows_of_images_are_those_of_each_alone(case):
    model, family = case
    inputs = image_prompt(model, family, n_row=2)
    tokens = torch.cat([inputs["input_ids"], QUESTION.expand(2, -1)], 1)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(inputs)
        both = answer(model, tokens, cache.copy())
        one = cache.copy()
        one.batch_select_indices(torch.tensor([1]))
        assert torch.allclose(answer(model, tokens[1:], one.copy()), both[1:], **CLOSE)
        one.batch_repeat_interleave(2)
        assert torch.allclose(
            answer(model, tokens[1:], one, num_return_sequences=2, do_sample=True, top_k=1),
            both[1:].expand(2, -1, -1),
            **CLOSE,
        )


def test_what_stands_for_an_image_needs_the_image(case, tmp_path):
    model, family = case
    inputs = image_prompt(model, family)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        with pytest.raises(
            ValueError, match=r"holds token 150, in whose place .* puts an image, .* expected all that the processor"
        ):
            handle.compress(inputs["input_ids"])
        cache = handle.compress(inputs)
        other = ids(1, 40, 7)
        with pytest.raises(ValueError, match="generate was given another prompt than the cache has seen"):
            answer(model, other, cache.copy())
        if family in OF_GRIDS and model.model.rope_deltas.any():  # transformers 5.2 has none for Qwen2-VL
            with pytest.raises(ValueError, match="the cache's prompt has images, whose positions a file cannot hold"):
                cache.save(tmp_path / "x.safetensors")
        text = handle.compress(ids(1, 20))
        text.save(tmp_path / "text.safetensors")
        longer = torch.cat([ids(1, 20), QUESTION], 1)
        wanted = answer(model, longer, text)
        handle.compress(inputs)
        assert torch.equal(answer(model, longer, kvp.load_cache(tmp_path / "text.safetensors", model)), wanted)


def test_paligemma_whose_prefix_attends_both_ways_is_refused():
    with pytest.raises(kvp.UnsupportedModelError, match="its prompts attend both ways"):
        kvp.wrap(build("paligemma"), "knorm", compression_ratio=0.5)


def test_an_image_that_attends_both_ways_is_refused_by_the_first_forward():
    model = build("gemma3")
    inputs = image_prompt(model, "gemma3")
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        with pytest.raises(kvp.UnsupportedModelError, match="Gemma3Model lets tokens attend to later ones, such as"):
            handle.compress(**inputs)
        for n_before, cache in ((0, handle.new_cache()), (20, handle.compress(ids(1, 20)))):
            before = torch.ones(1, n_before, dtype=torch.long)
            inputs["attention_mask"] = torch.cat([before, torch.ones_like(inputs["input_ids"])], 1)
            inputs["token_type_ids"] = torch.cat([0 * before, inputs["token_type_ids"]], 1)
            with pytest.raises(kvp.UnsupportedModelError, match="expected a prompt of text alone"):
                model(**inputs, use_cache=True, **cache_argument(model, cache))


@pytest.mark.parametrize("policy", ["knorm", "h2o"])
@pytest.mark.parametrize("padded", [False, True])
def test_text_alone_is_answered_as_under_a_mask(text_case, policy, padded):
    model, tokens = text_case, ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, : 3 * padded] = 0
    kinds = {"attention_mask": mask}
    with kvp.wrap(model, policy, compression_ratio=0) as handle:
        same = answer(model, tokens, handle.new_cache(), **kinds)
    assert torch.equal(same, answer(model, tokens, **kinds))
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :20], attention_mask=mask[:, :20])
        kept = copy.deepcopy(cache)
        ours = answer(model, tokens, cache, **kinds)
    with masked_like(model, kept, 20):
        whole = after(model, {"input_ids": tokens[:, :20], "attention_mask": mask[:, :20]})
        wanted = answer(model, tokens, whole, **kinds)
    assert torch.allclose(ours[1], wanted[1], **CLOSE)  # what hides tokens here knows no padding
    assert padded or torch.allclose(ours, wanted, **CLOSE)
