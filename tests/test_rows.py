"""A row of a batch is what it is alone, whatever layers a model has beside those that are compressed, and however long
the other rows' prompts and questions are."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_configs import tiny_config
from tiny_models import far_from_uniform
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import kvpitfalls as kvp
from kvpitfalls import Fair
from kvpitfalls.experiments.probe import answer_logprobs
from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.evict import Evict
from kvpitfalls.hf.fork import compress_each
from kvpitfalls.hf.generate import answers, batches, logits_after
from kvpitfalls.hf.model import attached
from kvpitfalls.hf.rows import taken
from kvpitfalls.policies import get_policy

# Full attention alone; windows and chunks.
FAMILIES = ["llama", "gemma3_text", "gpt_oss", "llama4_text"]
# States, and the release from which on: before 5.5 hybrids are refused by name, for a cache class of their own, and
# lfm2's own code failed where a batch goes on under a mask.
HYBRIDS = {"qwen3_next": "5.13", "granitemoehybrid": "5.13", "lfm2": "5.17", "falcon_h1": "5.13", "zamba2": "5.17"}
LENGTHS = {"a": (9, 8), "b": (14, 3), "c": (5, 11)}  # of prompts' two instructions
SAID = (2, 7)  # and of what is said after them


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w0")


def built(family: str, **changes):
    if Version(transformers.__version__) < Version(since := {**HYBRIDS, "jamba": "5.5"}.get(family, "0")):
        pytest.skip(f"{family} before transformers {since}")
    torch.manual_seed(1)
    config = tiny_config(family)
    for name, value in {"eos_token_id": None, **changes}.items():
        setattr(config, name, value)
    return far_from_uniform(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


@pytest.fixture(params=[*FAMILIES, *HYBRIDS])
def model(request):
    return built(request.param)


def words(generator, n: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, 128, (n,), generator=generator).tolist())


def prompts_of(tokenizer):
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for sizes in LENGTHS.values():
        parts = {name: words(generator, n) for name, n in zip("xy", sizes, strict=True)}
        prompts.append(kvp.Prompt.from_text(tokenizer, " ".join(parts.values()), parts))
    said = [[f" {words(generator, n)}" for n in SAID] for _ in prompts]
    return prompts, said


def test_answers_and_logits_in_a_batch_are_those_of_a_row_alone(model, tokenizer):
    prompts, said = prompts_of(tokenizer)
    settings = [Evict(get_policy(name), Fair.parse(fair), 0.5, None) for name, fair in (("knorm", True), ("tova", 0))]
    with attached(model):
        cache = KeptCache.join(compress_each(model, prompts, settings))
        cache.batch_repeat_interleave(len(SAID))
        rows = [(setting, prompt, text) for setting in settings for i, prompt in enumerate(prompts) for text in said[i]]
        contexts = [prompt for _, prompt, _ in rows]
        conversations = [prompt.followed_by(text)[0].tolist() for _, prompt, text in rows]
        together = answers(model, contexts, conversations, copy.deepcopy(cache), 6)
        logits = logits_after(model, contexts, conversations, cache, 1)
        for (setting, prompt, _), ids, answer, of_row in zip(rows, conversations, together, logits, strict=True):
            (alone,) = compress_each(model, [prompt], [setting])
            (expected,) = logits_after(model, [prompt], [ids], copy.deepcopy(alone), 1)
            torch.testing.assert_close(of_row[-1], expected[-1], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            assert answer == answers(model, [prompt], [ids], alone, 6)[0]


def test_answers_of_other_lengths_are_forced_as_alone(model, tokenizer):
    (prompt, *_), _ = prompts_of(tokenizer)
    asked, forced = prompt.followed_by(" w5 w9")[0].tolist(), [[7, 8, 9, 10, 11], [12], [13, 14]]
    with kvp.wrap(model, "streaming_llm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompt)
        alone = [answer_logprobs(model, [prompt], [asked], [ids], cache.copy())[0] for ids in forced]
        cache.batch_repeat_interleave(len(forced))
        together = answer_logprobs(model, [prompt] * len(forced), [asked] * len(forced), forced, cache)
    assert together == pytest.approx(alone, rel=1e-4)


def test_rows_are_selected_and_a_copy_of_some_leaves_the_others(model, tokenizer):
    """Rows that are run apart write nothing into the cache that they come from."""
    prompts, _ = prompts_of(tokenizer)
    said = " w5 w9 w17"
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompts)
        conversations = [prompt.followed_by(said)[0].tolist() for prompt in prompts]
        before = logits_after(model, prompts, conversations, cache.copy(), 1)
        moved = cache.copy()
        moved.batch_select_indices(torch.tensor([2, 0, 2]))
        order = [prompts[2], prompts[0], prompts[2]]
        after = logits_after(model, order, [conversations[2], conversations[0], conversations[2]], moved, 1)
        wanted = [before[2], before[0], before[2]]
        longer = [prompt.followed_by(f"{said} w{i}" * (i + 1))[0].tolist() for i, prompt in enumerate(prompts)]
        answers(model, prompts, longer, taken(cache, range(len(prompts))), 4)
        again = logits_after(model, prompts, conversations, cache, 1)
    for row, same in zip([*after, *again], [*wanted, *before], strict=True):
        torch.testing.assert_close(row[-1], same[-1], rtol=1e-4, atol=1e-4 * float(same.abs().max()))


def test_layers_that_read_anothers_cache_keep_no_rows_apart(tokenizer):
    """Gemma 3n's last layers hold nothing: where all fits the window, rows are run together, and are what they are
    alone."""
    model = built("gemma3n_text", sliding_window=64)
    prompts, said = prompts_of(tokenizer)
    conversations = [
        prompt.followed_by(texts[i % 2])[0].tolist()
        for i, (prompt, texts) in enumerate(zip(prompts, said, strict=True))
    ]
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompts)
        (batch,) = batches(prompts, conversations, cache, 0)
        assert list(batch.rows) == [0, 1, 2]
        together = logits_after(model, prompts, conversations, cache, 1)
        for prompt, ids, logits in zip(prompts, conversations, together, strict=True):
            (alone,) = logits_after(model, [prompt], [ids], handle.compress(prompt), 1)
            torch.testing.assert_close(logits[-1], alone[-1], rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_a_state_that_is_forgotten_is_refused(tokenizer):
    """Jamba's starts anew with every forward of several tokens: what it says after a prompt in a cache would depend on
    no token of it. One token after the other is what all at once, without a cache, are."""
    model = built("jamba")
    (prompt, *_), _ = prompts_of(tokenizer)
    ids = prompt.followed_by(" w5 w9 w17")
    with kvp.wrap(model, "knorm", compression_ratio=0.0) as handle, torch.no_grad():
        cache = handle.compress(prompt)
        with pytest.raises(kvp.UnsupportedModelError, match=r"forgets what came before .* and 3 follow what the cache"):
            model.generate(ids, past_key_values=cache.copy(), max_new_tokens=2)
        steps = [model(new, past_key_values=cache).logits[0, -1] for new in ids[:, len(prompt) :].split(1, 1)]
        whole = model(ids, use_cache=False).logits[0, len(prompt) :]
        torch.testing.assert_close(torch.stack(steps), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
        assert handle.verify() <= 1e-4


def test_states_are_given_no_padding(tokenizer):
    model = built("qwen3_next")
    prompts, _ = prompts_of(tokenizer)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompts)
        n = cache.n_prompt
        mask = torch.zeros(len(prompts), n + 4, dtype=torch.long)
        for row, (begin, end) in enumerate(cache.valid):
            mask[row, begin:end] = mask[row, n:] = 1
        mask[0, n] = 0
        before = cache.copy()
        with pytest.raises(kvp.UnsupportedModelError, match="what follows the prompts is padded, and layers of linear"):
            model(torch.full((len(prompts), 4), 5), attention_mask=mask, past_key_values=cache)
        mask[0, n] = 1
        ids = torch.full((len(prompts), 4), 5)
        same = [model(ids, attention_mask=mask, past_key_values=x).logits for x in (cache, before)]
        assert torch.equal(*same), "nothing was written before it was refused"
