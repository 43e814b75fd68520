"""Room behind a growing cache's rows: a step writes one row instead of copying all, and nothing else is different."""

import copy
import pickle

import pytest
import torch
from tiny_models import build, feed, ids
from tiny_policies import EVERY
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

import kvpitfalls as kvp
from kvpitfalls.hf import layer as layers
from kvpitfalls.hf.arguments import cache_argument

N_PROMPT, N_NEW = 24, 40
SPANS = {"first": (2, 9), "second": (12, 20)}


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(autouse=True)
def pays_at_any_size(monkeypatch):
    monkeypatch.setattr(layers, "_SMALL", 0)
    monkeypatch.setattr(layers, "SPARE", 16)  # so that an answer finds it used up, too


def left_pad(n_token):
    mask = torch.ones(2, n_token, dtype=torch.long)
    mask[0, :5] = 0
    return mask


def written(cache):
    """Whether each layer's rows are the beginning of more memory."""
    return [x.spare is not None and x.spare.of is x.keys for x in cache.kept_layers]


def answer(model, cache, monkeypatch, n_spare, **options):
    """A greedy answer: tokens, logits of every step, and the cache."""
    monkeypatch.setattr(layers, "SPARE", n_spare)
    tokens = ids(2, N_PROMPT + 2)
    given = {"attention_mask": left_pad(N_PROMPT + 2), **cache_argument(model, cache)}
    given |= {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False} | options
    torch.manual_seed(0)
    out = model.generate(tokens, return_dict_in_generate=True, output_logits=True, **given)
    return out.sequences, torch.stack(out.logits), out.past_key_values


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", [policy for policy in EVERY if not policy.needs_rotary], ids=str)
def test_answers_are_the_same_bits(model, policy, fair, monkeypatch):
    tokens, mask = ids(2, N_PROMPT), left_pad(N_PROMPT)
    spans = [{name: (max(5, a), b) for name, (a, b) in SPANS.items()}, SPANS]
    with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair) as handle:
        cache = handle.compress(tokens, mask, spans)
        one = answer(model, cache.copy(), monkeypatch, 16)
        other = answer(model, cache.copy(), monkeypatch, 0)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert all(written(one[2])) and not any(written(other[2]))
    assert type(one[2]) is kvp.KeptCache and one[2].report() == other[2].report()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_sampling_several_sequences_and_beams(llama, options, monkeypatch):
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(ids(2, N_PROMPT), left_pad(N_PROMPT))
        cache.batch_repeat_interleave(max(options.get("num_beams", 1), options.get("num_return_sequences", 1)))
        one, other = (answer(llama, cache.copy(), monkeypatch, n, **options) for n in (16, 0))
    assert torch.equal(one[0], other[0])


def test_a_streamer_and_a_prompt_without_a_cache_of_ones_own(llama, monkeypatch):
    class Words:
        def decode(self, given, **_):
            return " ".join(map(str, given if isinstance(given, list) else [given]))

    class Noted(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            told.append(text)

    answers = []
    for n in (16, 0):
        monkeypatch.setattr(layers, "SPARE", n)
        told: list[str] = []
        with kvp.wrap(llama, "knorm", compression_ratio=0.5):
            given = {"max_new_tokens": 20, "do_sample": False, "streamer": Noted(Words(), skip_prompt=True)}
            answers.append((llama.generate(ids(1, N_PROMPT), **given).tolist(), told))
    assert answers[0] == answers[1] and answers[0][1]


def test_later_turns_copies_and_crops_go_on(llama):
    tokens = torch.cat([ids(2, 30), ids(2, 30, seed=4)], 1)
    with kvp.wrap(llama, "h2o", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        wanted = feed(llama, tokens, [1] * 30, cache.copy(), start=N_PROMPT)
        first = feed(llama, tokens, [1] * 10, cache, start=N_PROMPT)
        assert all(written(cache))
        shallow, deep, pickled = copy.copy(cache), cache.copy(), pickle.loads(pickle.dumps(cache))
        shallow.layers = [copy.copy(x) for x in cache.layers]
        others = [(torch.arange(60) % 90 + 5).expand(2, -1), tokens]
        feed(llama, others[0], [1] * 8, shallow, start=N_PROMPT + 10)  # beside, and must not write into the same rows
        feed(llama, others[0], [1] * 8, deep, start=N_PROMPT + 10)
        feed(llama, others[0], [1] * 8, pickled, start=N_PROMPT + 10)
        then = feed(llama, tokens, [1] * 12, cache, start=N_PROMPT + 10)
        cache.crop(-12)
        again = feed(llama, tokens, [1] * 12, cache, start=N_PROMPT + 10)
        several = feed(llama, tokens, [3, 1, 4], cache, start=N_PROMPT + 22)
    assert torch.equal(torch.cat([first, then], 1), wanted[:, :22]) and torch.equal(again, then)
    torch.testing.assert_close(several, wanted[:, 22:30], rtol=0, atol=1e-5)


def test_memory_of_inference_mode_is_not_written_outside_of_it(llama):
    tokens = ids(2, 40)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        with torch.inference_mode():
            cache = handle.compress(tokens[:, :N_PROMPT])
            feed(llama, tokens, [1, 1], cache, start=N_PROMPT)
            assert all(written(cache))
        before = cache.layers[0].spare
        feed(llama, tokens, [1, 1], cache, start=N_PROMPT + 2)  # without gradients, but not in that mode
        assert cache.layers[0].spare is not before and all(written(cache))


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_a_step_of_another_type_or_of_other_rows_is_not_written(model, ratio, monkeypatch):
    """Copying promotes to the wider type and refuses other rows; writing would round, and repeat a row."""

    def logits(n_spare):
        monkeypatch.setattr(layers, "SPARE", n_spare)
        with torch.autocast("cpu", torch.bfloat16):
            cache = handle.compress(tokens[:, :N_PROMPT])
            feed(model, tokens, [1, 1], cache, start=N_PROMPT)
        out = feed(model, tokens, [1, 1, 1], cache, start=N_PROMPT + 2)
        assert all(written(cache)) == bool(n_spare)
        with pytest.raises(ValueError, match="a forward brings 1 rows, but the cache holds 2"):
            feed(model, tokens[:1], [1], cache, start=N_PROMPT + 5)
        return out

    tokens = ids(2, 40)
    with kvp.wrap(model, "knorm", compression_ratio=ratio) as handle:
        assert torch.equal(logits(16), logits(0))


def test_a_cache_with_room_is_saved_without(model, tmp_path):
    tokens = ids(2, 30)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        feed(model, tokens, [1, 1], cache, start=N_PROMPT)
        assert all(written(cache))
        cache.save(tmp_path / "cache.safetensors")
        loaded = kvp.load_cache(tmp_path / "cache.safetensors", model)
        assert all(x.spare is None for x in loaded.kept_layers) and all(written(cache))
        assert torch.equal(
            feed(model, tokens, [1, 2, 1], loaded, start=N_PROMPT + 2),
            feed(model, tokens, [1, 2, 1], cache, start=N_PROMPT + 2),
        )


def test_no_room_under_gradients_or_a_held_budget_or_where_a_copy_is_small(llama, monkeypatch):
    tokens = ids(2, 40)
    with kvp.wrap(llama, "knorm", budget=10, when="always") as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        feed(llama, tokens, [1, 1], cache, start=N_PROMPT)
        assert not any(written(cache))
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        one = llama(tokens[:, 24:25], attention_mask=torch.ones(2, 25), **cache_argument(llama, cache)).logits
        assert not any(written(cache)) and one.requires_grad
        monkeypatch.setattr(layers, "_SMALL", 2**16)
        cache = handle.compress(tokens[:, :N_PROMPT])
        feed(llama, tokens, [1, 1], cache, start=N_PROMPT)
        assert not any(written(cache))


def test_what_is_left_of_a_cache_and_what_is_reported_has_no_room(llama):
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(ids(2, N_PROMPT))
        feed(llama, ids(2, 30), [1], cache, start=N_PROMPT)
        assert all(written(cache)) and all(x.spare is None for x in cache.outline().layers)
        row = cache.layers[0].keys.nbytes // cache.layers[0].keys.shape[2]
        assert cache.report()["layers"][0]["bytes_after"] == 2 * 13 * row


def test_where_the_rows_are_is_looked_at_in_each_step(llama):
    """Whatever gives a layer other rows, such as a stopping criterion that selects some, is seen."""

    class Swap(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            cache.batch_select_indices(torch.tensor([0, 1]))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    tokens = ids(2, N_PROMPT + 1)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        kept = handle.compress(tokens[:, :N_PROMPT])
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
        wanted = llama.generate(tokens, **options, **cache_argument(llama, kept.copy()))
        cache = kept.copy()
        options["stopping_criteria"] = StoppingCriteriaList([Swap()])
        assert torch.equal(llama.generate(tokens, **options, **cache_argument(llama, cache)), wanted)
