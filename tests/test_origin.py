"""A cache is used for nothing but what it stands for."""

import copy
import pickle

import pytest
import torch
from model_sweep import build as built
from model_sweep import not_refused
from tiny_models import build, ids
from transformers import DynamicCache

import kvpitfalls as kvp
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.cache import KeptCache

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
N_PROMPT = 20


@pytest.fixture
def llama():
    return build("llama")


def generate(model, tokens, **given):
    return model.generate(tokens, **{"attention_mask": torch.ones_like(tokens), **GREEDY, **given})


def test_a_compressed_cache_is_not_taken_for_its_keys_and_values(llama):
    ways = [list, lambda cache: DynamicCache(list(cache))]
    ways += (
        [lambda cache: cache.to_legacy_cache(), lambda cache: cache[0]]
        if hasattr(DynamicCache, "to_legacy_cache")
        else []
    )
    for way in ways:
        with (
            kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle,
            pytest.raises(ValueError, match="positions would be lost"),
        ):
            way(handle.compress(ids(1)))
        with kvp.wrap(llama, "knorm", compression_ratio=0) as handle:
            assert way(handle.compress(ids(1)))


def test_what_shares_its_layers_with_a_cache_does_not_go_on_for_it(llama):
    prompt = ids(1, N_PROMPT)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompt)
        used_by(llama, ids(1, 26), copy.copy(cache))
        with pytest.raises(
            ValueError, match=r"have seen 29 tokens, 9 of them through another cache .* expected cache\.copy"
        ):
            generate(llama, torch.cat([prompt, ids(1, 14, seed=8)], 1), past_key_values=cache)


def test_embeddings_are_compared_with_the_tokens_that_a_cache_has_seen(llama):
    embed, tokens = llama.get_input_embeddings(), ids(1, 26)

    def by_embeddings(of, cache, mask=None):
        mask = torch.ones_like(of) if mask is None else mask
        return llama.generate(inputs_embeds=embed(of), attention_mask=mask, **cache_argument(llama, cache), **GREEDY)

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        wanted = generate(llama, tokens, past_key_values=cache.copy())[:, 26:]
        assert torch.equal(by_embeddings(tokens, cache.copy()), wanted)
        for given, message in [
            (
                torch.cat([ids(1, N_PROMPT, seed=3), tokens[:, N_PROMPT:]], 1),
                r"another prompt than the cache has seen \(row 0, token 0",
            ),
            (tokens[:, N_PROMPT:], "was given 6 tokens that the cache's prompt of 20 does not begin with"),
            (tokens[:, :N_PROMPT], "20 tokens, all of which the cache has seen"),
            (tokens.expand(3, -1), r"runs 3 rows, but the cache holds 1; expected cache\.batch_repeat_interleave\(3\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                by_embeddings(given, cache.copy())


def test_a_cache_made_by_hand_or_emptied_is_compressed_by_the_wrap_it_comes_to(llama, tmp_path):
    tokens = ids(1, N_PROMPT)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5, fair=True) as handle:
        with_spans = handle.compress(tokens, spans={"a": (2, 9), "b": (9, 18)})
        with_spans.save(tmp_path / "prompt")
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        wanted = handle.compress(tokens)
        emptied, again = kvp.load_cache(tmp_path / "prompt", llama), with_spans.copy()
        emptied.reset()
        again.reset()
        for cache in (KeptCache(llama.config), emptied, again):
            generate(llama, tokens, past_key_values=cache)
            assert (cache.positions(1) == wanted.positions(1)).all() and list(cache.spans) == list(wanted.spans)


def test_unwrap_restores_a_model_whose_handle_is_lost(llama):
    tokens = ids(1)
    before = generate(llama, tokens)
    kvp.wrap(llama, "knorm", budget=5).compress(tokens)
    with pytest.raises(
        ValueError, match=r"wrapped already; expected handle\.remove\(\) or kvpitfalls\.unwrap\(model\) first"
    ):
        kvp.wrap(llama, "knorm", budget=5)
    kvp.unwrap(llama)
    kvp.unwrap(llama)
    assert torch.equal(generate(llama, tokens), before) and not {"generate", "forward"} & {
        *vars(llama),
        *vars(llama.model),
    }
    handle = kvp.wrap(llama, "knorm", budget=5)
    kvp.unwrap(llama)
    with kvp.wrap(llama, "knorm", budget=6) as other:
        handle.remove()  # not the other's
        assert handle.is_removed and not other.is_removed
        assert other.compress(tokens).report()["kept_share"] == pytest.approx(0.2)


@pytest.mark.parametrize("n_new", [1, 6])
def test_padding_is_what_it_was_when_the_prompt_was_compressed(llama, n_new):
    """Else new tokens stand at positions that do not follow the prompt's."""
    tokens, padded = ids(2, N_PROMPT + n_new), torch.ones(2, N_PROMPT + n_new, dtype=torch.long)
    padded[0, :3] = 0
    wrong = {
        "forgotten when compressing": (None, padded),
        "forgotten when generating": (padded, torch.ones_like(padded)),
    }
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        for of_prompt, later in wrong.values():
            cache = handle.compress(
                tokens[:, :N_PROMPT], attention_mask=None if of_prompt is None else of_prompt[:, :N_PROMPT]
            )
            message = r"hides other tokens of the prompt than its prefill did \(row 0, token 0\); expected the same"
            with pytest.raises(ValueError, match=message):
                generate(llama, tokens, past_key_values=cache.copy(), attention_mask=later)
            if n_new > 1:
                with pytest.raises(ValueError, match=message):
                    llama(tokens[:, N_PROMPT:], attention_mask=later, **cache_argument(llama, cache.copy()))
        with pytest.raises(ValueError, match="attention_mask has 1 rows; expected 2, as the ids have"):
            generate(llama, tokens, past_key_values=cache.copy(), attention_mask=padded[:1])
        for n_short in {1, n_new}:
            fault = f"attention_mask has {N_PROMPT + n_new - n_short} columns; expected {N_PROMPT + n_new}, as the ids"
            with pytest.raises(ValueError, match=fault):
                generate(llama, tokens, past_key_values=cache.copy(), attention_mask=padded[:, :-n_short])
        with pytest.raises(ValueError, match="the prompt has no rows; expected at least one"):
            handle.compress(tokens[:0])
        repeated = handle.compress(tokens[:1, :N_PROMPT], attention_mask=padded[:1, :N_PROMPT])
        repeated.batch_repeat_interleave(2)
        generate(llama, tokens[:1], past_key_values=repeated, attention_mask=padded[:1], num_beams=2)


def used_by(model, first, cache):
    generate(model, first, past_key_values=cache)
    return cache


def test_generate_refuses_ids_that_do_not_begin_with_what_the_cache_has_seen(llama):
    prompt, question = ids(1, N_PROMPT), ids(1, 6, seed=7)
    first = torch.cat([prompt, question], 1)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompt)
        for tokens, message in [
            (
                torch.cat([ids(1, N_PROMPT, seed=3), question], 1),
                r"another prompt than the cache has seen \(row 0, token 0 of 20\)",
            ),
            (question, "was given 6 tokens that the cache's prompt of 20 does not begin with"),
            (prompt, r"20 tokens, all of which the cache has seen; expected at least one more than its 20"),
            (prompt[:, :10], "10 tokens, all of which the cache has seen"),
            (first.expand(3, -1), r"runs 3 rows, but the cache holds 1; expected cache\.batch_repeat_interleave\(3\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                generate(llama, tokens, past_key_values=cache.copy())
        with pytest.raises(ValueError, match=r"runs 2 rows, .* expected cache\.batch_repeat_interleave\(2\)"):
            generate(llama, first, past_key_values=cache.copy(), num_beams=2)
        wanted = generate(llama, first, past_key_values=cache.copy())
        used = used_by(llama, first, cache.copy())  # has seen 20 + 6 + 3
        for n in (1, 5, 9, 10, 14):
            second = torch.cat([prompt, ids(1, n, seed=8)], 1)
            with pytest.raises(
                ValueError, match=r"than the cache has seen since its prompt .* or a copy made right after the prompt"
            ):
                generate(llama, second, past_key_values=used.copy())
        with pytest.raises(ValueError, match="all of which the cache has seen"):
            generate(llama, prompt, past_key_values=used.copy())
        assert torch.equal(generate(llama, first, past_key_values=cache.copy()), wanted), "a refusal changes no cache"
        used.crop(N_PROMPT)
        assert torch.equal(generate(llama, first, past_key_values=used), wanted)


def test_a_cache_of_several_rows_knows_each_rows_tokens(llama):
    prompts, question = ids(2, N_PROMPT), ids(2, 4, seed=7)
    both = torch.cat([prompts, question], 1)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompts)
        wanted = generate(llama, both, past_key_values=cache.copy())
        swapped = cache.copy()
        swapped.batch_select_indices(torch.tensor([1, 0]))
        assert torch.equal(generate(llama, both.flip(0), past_key_values=swapped.copy()), wanted.flip(0))
        with pytest.raises(ValueError, match="another prompt"):
            generate(llama, both, past_key_values=swapped)
        repeated = cache.copy()
        repeated.batch_repeat_interleave(3)
        generate(llama, both, past_key_values=repeated, num_beams=3)
        joined = KeptCache.join([handle.compress(prompts[:1]), handle.compress(prompts[1:])])
        assert torch.equal(joined.tokens, prompts) and torch.equal(
            generate(llama, both, past_key_values=joined), wanted
        )


def test_a_saved_and_a_pickled_cache_know_their_tokens(llama, tmp_path):
    prompt, other = ids(1, N_PROMPT), ids(1, 26, seed=5)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(prompt)
        cache.save(tmp_path / "prompt")
        for back in (kvp.load_cache(tmp_path / "prompt", llama), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(back.tokens, prompt)
            with pytest.raises(ValueError, match="another prompt than the cache has seen"):
                generate(llama, other, past_key_values=back)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_pickled_cache_is_of_the_weights_that_filled_it(fixed):
    """Whoever has them goes on with it; all others are refused, and so is a cache whose model nobody knows any more."""
    model, twin, other = build("llama"), build("llama"), build("llama", initializer_range=0.5)
    tokens = ids(1)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        wanted = generate(model, tokens, past_key_values=cache.copy())
        cache = cache.fixed(40) if fixed else cache
        kept = pickle.dumps(cache)
        assert torch.equal(generate(model, tokens, past_key_values=pickle.loads(kept)), wanted)
        again = pickle.loads(pickle.dumps(pickle.loads(kept)))  # before it met a model
        assert torch.equal(generate(model, tokens, past_key_values=again), wanted)
    with kvp.wrap(twin, "knorm", compression_ratio=0.5):
        assert torch.equal(generate(twin, tokens, past_key_values=pickle.loads(kept)), wanted), "with the same weights"
    with (
        kvp.wrap(other, "knorm", compression_ratio=0.5),
        pytest.raises(ValueError, match="was filled by another LlamaModel"),
    ):
        generate(other, tokens, past_key_values=pickle.loads(kept))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with (
        kvp.wrap(model, "knorm", compression_ratio=0.5),
        pytest.raises(ValueError, match=r"pickled when the model .* gone or changed"),
    ):
        generate(model, tokens, past_key_values=pickle.loads(pickle.dumps(cache)))


def test_a_cache_of_other_settings_or_of_another_model_is_refused(llama):
    tokens = ids(1)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        filled, empty = handle.compress(tokens[:, :N_PROMPT]), handle.new_cache()
    with kvp.wrap(llama, "h2o", compression_ratio=0.9):
        for cache in (filled, empty):
            with pytest.raises(
                ValueError, match=r"with other settings \(KNorm\(\), compression_ratio=0\.5.* expected one of this"
            ):
                generate(llama, tokens, past_key_values=cache.copy())
    with kvp.wrap(llama, "knorm", compression_ratio=0.5):
        generate(llama, tokens, past_key_values=filled.copy())
    twin = build("llama")
    with (
        kvp.wrap(twin, "knorm", compression_ratio=0.5),
        pytest.raises(ValueError, match="was filled by another LlamaModel"),
    ):
        generate(twin, tokens, past_key_values=filled)


def test_a_cache_of_another_adapter_is_refused(llama):
    class Tuned(torch.nn.Linear):
        """As PEFT's layers are: they know which adapters are on."""

    layer = llama.model.layers[0].mlp
    layer.gate_proj.__class__, layer.gate_proj.active_adapters = Tuned, ["first"]
    tokens = ids(1)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        generate(llama, tokens, past_key_values=cache.copy())
        layer.gate_proj.active_adapters = ["second"]
        with pytest.raises(
            ValueError, match="filled with the adapters first, but now second is active; expected the same"
        ):
            generate(llama, tokens, past_key_values=cache.copy())
        layer.gate_proj.disable_adapters = True
        with pytest.raises(ValueError, match="filled with the adapters first, but now none is active"):
            llama(tokens[:, N_PROMPT:], **cache_argument(llama, cache))
    other = build("llama")
    with (
        kvp.wrap(other, "knorm", compression_ratio=0.5),
        pytest.raises(ValueError, match="was filled by another LlamaModel"),
    ):
        generate(other, tokens, past_key_values=cache.copy())  # its adapters do not matter


@pytest.mark.parametrize("family", not_refused("bert"))
@torch.no_grad()
def test_kinds_of_tokens_are_those_that_the_cache_has_seen(family):
    """As BERT's tokenizer tells two texts apart."""
    model, tokens = built(family), ids(2)
    kinds, prompt = torch.ones_like(tokens), tokens[:, :N_PROMPT]
    before = kinds[:, :N_PROMPT]
    with kvp.wrap(model, "knorm", compression_ratio=0) as handle:
        with pytest.raises(ValueError, match=r"^prompt is a dict with token_type_ids other than 0, which Bert"):
            handle.compress({"input_ids": prompt, "token_type_ids": before})
        cache = handle.compress({"input_ids": prompt, "token_type_ids": 0 * before})
        with pytest.raises(
            ValueError, match=r"^generate was given token_type_ids other than 0 of tokens that the cache"
        ):
            generate(model, tokens, token_type_ids=kinds, **cache_argument(model, cache))
        later = torch.cat([0 * before, kinds[:, N_PROMPT:]], 1)
        told = handle.new_cache()
        model(prompt, token_type_ids=before, **cache_argument(model, told))
        for ours, named in ((cache, later), (cache, 0 * kinds), (told, kinds)):
            answer = generate(model, tokens, token_type_ids=named, **cache_argument(model, ours.copy()))
            with handle.paused():
                assert torch.equal(answer, generate(model, tokens, token_type_ids=named))


@pytest.mark.parametrize("where", ["prefill", "step"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_cache_whose_forward_was_broken_off_is_refused_until_it_is_reset(llama, where, layer):
    prompt, tokens = ids(1, N_PROMPT), ids(1)

    def break_off(*_):
        raise torch.OutOfMemoryError("out of memory")

    with kvp.wrap(llama, "h2o", compression_ratio=0.5) as handle:
        wanted = generate(llama, tokens)
        cache = handle.new_cache() if where == "prefill" else handle.compress(prompt)
        hook = llama.model.layers[layer].mlp.register_forward_pre_hook(break_off)
        with pytest.raises(torch.OutOfMemoryError):
            generate(llama, tokens, past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="an earlier forward on this cache was broken off"):
            llama(tokens[:, -1:], **cache_argument(llama, cache))
        cache.reset()
        assert torch.equal(generate(llama, tokens, past_key_values=cache), wanted)
