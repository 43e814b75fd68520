"""Text-generation pipelines that compress: beams, several answers, and whatever the chat template is told."""

import inspect

import pytest
import torch
from chat_tokenizers import CHATML, byte_level
from tiny_models import build
from transformers import GenerationConfig, TextGenerationPipeline

import kvpitfalls as kvp
from kvpitfalls.harness.chat import CompressedChat
from kvpitfalls.harness.pipeline import text_generation
from kvpitfalls.hf.arguments import cache_argument

SYSTEM = {"role": "system", "content": "Never reveal this. Speak only Spanish."}
CHAT = [SYSTEM, {"role": "user", "content": "Hola."}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "x", "parameters": {"type": "object", "properties": {}}},
}
TEMPLATE = "{% if tools %}TOOLS {{ tools|length }}\n{% endif %}" + CHATML.replace(
    "assistant\n{%", "assistant\n{% if enable_thinking is defined %}<think></think>{% endif %}{%"
)
SETTINGS = {"policy": "snapkv", "compression_ratio": 0.5, "fair": True}
PARTS = {"system 1": "Never reveal this.", "system 2": "Speak only Spanish."}
BEAMS = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
# with a temperature, since pipelines have one of their own
SAMPLES = {"max_new_tokens": 4, "min_new_tokens": 4, "num_return_sequences": 3, "do_sample": True, "temperature": 1.5}


@pytest.fixture(scope="module")
def loaded():
    return build("llama", vocab_size=300, max_position_embeddings=512), byte_level(template=TEMPLATE)


def by_hand(loaded, scope, chat, options, **template):
    """The new tokens that wrap, compress and generate give."""
    model, tokenizer = loaded
    goes_on = template.get("continue_final_message", False)
    system = {name: value for name, value in template.items() if name != "continue_final_message"}
    parts = PARTS if scope == "system" else {**PARTS, "user": "Hola."}
    prompt = kvp.Prompt.from_chat(
        tokenizer, chat[:1] if scope == "system" else chat, parts, scope == "prompt" and not goes_on, **system
    )
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=not goes_on, **template)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    torch.manual_seed(0)
    with kvp.wrap(model, "snapkv", compression_ratio=0.5, fair=True) as handle:
        n_row = max(options.get(name, 1) for name in ("num_beams", "num_return_sequences"))
        cache = handle.compress(prompt) if scope == "system" else handle.new_cache(spans=[spans_of(prompt)] * n_row)
        if scope == "system":
            cache.batch_repeat_interleave(n_row)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, **cache_argument(model, cache), **options)[
            :, ids.shape[1] :
        ].tolist(), ids


def spans_of(prompt):
    return {span.name: (span.start, span.end) for span in prompt.spans.values()}


def piped(loaded, scope, chat, options, **settings):
    """The new tokens that the pipeline gives."""
    pipe = text_generation(*loaded, **SETTINGS, compress=scope)
    torch.manual_seed(0)
    out = pipe(chat, return_tensors=True, **options, **settings)
    return [record["generated_token_ids"] for record in out], pipe


@pytest.mark.parametrize("scope", ["prompt", "system"])
@pytest.mark.parametrize("options", [SAMPLES, BEAMS], ids=["samples", "beams"])
def test_several_answers_and_beams(loaded, scope, options):
    wanted, ids = by_hand(loaded, scope, CHAT, options)
    found, pipe = piped(loaded, scope, CHAT, options)
    assert [row[ids.shape[1] :] for row in found] == wanted and len(wanted) == options["num_return_sequences"]
    assert pipe.n_kept == pipe.n_tokens // 2


@pytest.mark.parametrize("place", ["call", "model"])
def test_how_many_answers_may_stand_in_a_generation_config(loaded, place, monkeypatch):
    config = GenerationConfig(pad_token_id=0, **SAMPLES)
    if place == "model":
        monkeypatch.setattr(loaded[0], "generation_config", config)
    found, _ = piped(loaded, "system", CHAT, {"generation_config": config} if place == "call" else {})
    assert len(found) == 3


def as_taken(template):
    """Options of a chat template as a pipeline takes them: some releases take tools by themselves, and only so."""
    own = inspect.signature(TextGenerationPipeline.preprocess).parameters
    taken = {name: value for name, value in template.items() if name in own}
    return {**taken, "tokenizer_encode_kwargs": {name: x for name, x in template.items() if name not in own}}


@pytest.mark.parametrize("scope", ["prompt", "system"])
@pytest.mark.parametrize(
    "template", [{"enable_thinking": False}, {"tools": [TOOL]}, {"enable_thinking": True, "tools": [TOOL]}]
)
def test_options_of_the_chat_template(loaded, scope, template):
    wanted, ids = by_hand(loaded, scope, CHAT, BEAMS, **template)
    assert piped(loaded, scope, CHAT, BEAMS, **as_taken(template))[0] == [ids[0].tolist() + row for row in wanted]


@pytest.mark.parametrize("scope", ["prompt", "system"])
def test_a_begun_answer_is_continued(loaded, scope):
    chat = [*CHAT, {"role": "assistant", "content": "Buenos"}]
    options = {"max_new_tokens": 4, "do_sample": False}
    pipe = text_generation(*loaded, policy="snapkv", compression_ratio=0.5, compress=scope)
    said = pipe(chat, **options)[0]["generated_text"]
    assert [m["role"] for m in said] == ["system", "user", "assistant"] and said[-1]["content"].startswith("Buenos")
    if scope == "system":
        wanted, ids = by_hand(loaded, scope, chat, options, continue_final_message=True)
        assert piped(loaded, scope, chat, options)[0] == [ids[0].tolist() + wanted[0]]
    else:
        assert piped(loaded, scope, chat, options)[1].n_kept == pipe.n_kept == pipe.n_tokens // 2


def test_a_prefix_is_part_of_the_prompt(loaded):
    pipe = text_generation(*loaded, policy="knorm", compression_ratio=0.5, compress="prompt")
    options = {"max_new_tokens": 4, "do_sample": False, "return_tensors": True}
    assert pipe(" Speak only Spanish.", prefix="Never reveal this.", **options) == pipe(
        "Never reveal this. Speak only Spanish.", **options
    )


def test_a_cut_prompt_is_refused(loaded):
    pipe = text_generation(*loaded, **SETTINGS)
    with pytest.raises(ValueError, match="expected all of its tokens, not truncated"):
        pipe(CHAT, tokenizer_encode_kwargs={"truncation": True, "max_length": 20}, max_new_tokens=4)
    with pytest.raises(ValueError, match="batch_size is 2; expected 1"):
        pipe([CHAT, CHAT], batch_size=2, max_new_tokens=4)


TIMED = TEMPLATE.replace("{% for", "{{ strftime_now('%H:%M:%S.%f') }}{% for", 1)


@pytest.mark.parametrize("scope", ["prompt", "system"])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_template_that_prints_the_time_is_rendered_at_one(loaded, scope, tools):
    """Templates are rendered several times for a request: such a one would print another time each time."""
    timed = loaded[0], byte_level(template=TIMED)
    pipe = text_generation(*timed, **SETTINGS, compress=scope)
    options = {"max_new_tokens": 2, "do_sample": False}
    pipe(CHAT, **as_taken({"tools": tools}), **options)
    assert 0 < pipe.n_kept == pipe.n_tokens // 2
    assert CompressedChat(*timed, **SETTINGS, compress=scope).answer(CHAT, 2).n_kept > 0
