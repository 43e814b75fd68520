"""What must hold for every family of models, eager and sdpa: each behaviour against the unwrapped model or a second way
to get there."""

import copy
import re

import numpy as np
import pytest
import torch
import transformers
from model_sweep import SEVERAL, build, mixed, not_refused, release
from tiny_configs import tiny_config
from tiny_models import IS_MISPLACED, feed, ids, masked_like
from tiny_policies import EQUAL, EVERY, takes
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

import kvpitfalls as kvp
from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.evict import Action
from kvpitfalls.hf.forward import AttentionCall
from kvpitfalls.hf.hybrid import is_full_attention
from kvpitfalls.hf.model import attached
from kvpitfalls.hf.verify import Shuffle

CLOSE = {"rtol": 0, "atol": 1e-5}
N_PROMPT, CHUNKS, N_TOKEN = 12, [1, 1, 4], 18
POLICIES = [kvp.StreamingLLM(2), kvp.SnapKV(window_size=3, kernel_size=3), kvp.TOVA(), kvp.H2O(), kvp.KNorm()]
POLICIES += [policy for policy in EQUAL if type(policy) not in map(type, POLICIES)]
SPANS = {"a": (2, 6), "b": (6, 11)}
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
FAMILIES = [*not_refused(*SEVERAL, "mixtral", "qwen3_next"), *mixed()]
EAGER_ONLY = ("gemma2", "gpt_oss")  # transformers has no sdpa for soft-cap and sinks
CASES = [
    (f, attention) for f in FAMILIES for attention in ("eager", "sdpa") if attention == "eager" or f not in EAGER_ONLY
]


def holds_all(family):
    """Whether every cache layer is a full-attention one; transformers' sliding and linear layers crop and reset by
    rules of their own."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=tiny_config(family)).layers)


of_full_layers = pytest.mark.parametrize(
    "model", [case for case in CASES if holds_all(case[0])], indirect=True, ids="-".join
)


def built(*case):
    model = build(*case)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "k_norm" in name:  # or all keys would be equally long, and rounding would decide what K-norm keeps
                weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return model


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request):
    return built(*request.param)


class Ragged(Action):
    """A cache's action: keep a random number of random rows, another per layer, row and head; in place, or cut out."""

    evicts = True

    def __init__(self, in_place: bool):
        self.in_place = in_place

    def after_prefill(self, layer, call):
        n_row, n_head, n_token = layer.keys.shape[:3]
        draw = torch.Generator().manual_seed(layer.index)
        scores = torch.rand(n_row, 1 if call.share_heads else n_head, n_token, generator=draw)
        counts = torch.randint(3, 9, scores.shape[:2], generator=draw)
        kept = (scores.argsort(-1).argsort(-1) < counts[..., None]).expand(-1, n_head, -1)
        places = torch.where(kept, torch.arange(n_token), n_token).sort(-1).values[..., : int(counts.max())]
        cut_out = places.masked_fill(places == n_token, -1)
        positions = torch.where(kept, torch.arange(n_token), -1) if self.in_place else cut_out
        index = torch.arange(n_token).expand(n_row, n_head, -1) if self.in_place else cut_out.clamp(min=0)
        rows = [x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (layer.keys, layer.values)]
        layer.keep(*rows, positions.int(), full=False)


def left_padded():
    mask = torch.ones(2, N_TOKEN, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def after(model, action, tokens, mask=None):
    """Logits of what follows the prompt on a cache with this action, and the cache as it was after the prompt."""
    with attached(model):
        cache = KeptCache(model.config, action)
        feed(model, tokens, [N_PROMPT], cache, mask)
        kept = copy.deepcopy(cache)
        return feed(model, tokens, CHUNKS, cache, mask, start=N_PROMPT), kept


def masked(model, kept, tokens):
    """The same on the unwrapped model's full cache, with what was evicted hidden by a mask per head."""
    full = DynamicCache(config=model.config)
    feed(model, tokens, [N_PROMPT], full)
    with masked_like(model, kept, N_PROMPT):
        return feed(model, tokens, CHUNKS, full, start=N_PROMPT)


@pytest.mark.parametrize("padded", [False, True])
def test_ratio_0_gives_the_same_bits_and_shuffled_rows_the_same_logits(model, padded):
    tokens, mask = ids(2, N_TOKEN), left_padded() if padded else torch.ones(2, N_TOKEN, dtype=torch.long)
    plain = feed(model, tokens, [N_PROMPT, *CHUNKS], DynamicCache(config=model.config), mask)
    with kvp.wrap(model, "h2o", compression_ratio=0) as handle:
        same = feed(model, tokens, [N_PROMPT, *CHUNKS], handle.new_cache(), mask)
    assert torch.equal(same[mask.bool()], plain[mask.bool()])
    shuffled, _ = after(model, Shuffle(), tokens, mask)
    torch.testing.assert_close(shuffled, plain[:, N_PROMPT:], **CLOSE)


def test_evicting_equals_masking_whatever_each_layer_row_and_head_keeps(model):
    tokens = ids(2, N_TOKEN)
    cut_out, kept = after(model, Ragged(in_place=False), tokens)
    in_place, hidden = after(model, Ragged(in_place=True), tokens)
    for layer, other in zip(kept.kept_layers, hidden.kept_layers, strict=True):
        assert (
            np.array_equal(layer.kept_counts, other.kept_counts)
            and layer.keys.shape[2] < other.keys.shape[2] == N_PROMPT
        )
    torch.testing.assert_close(cut_out, in_place, **CLOSE)
    torch.testing.assert_close(cut_out, masked(model, kept, tokens), **CLOSE)
    whole = feed(model, tokens, [N_PROMPT, *CHUNKS], DynamicCache(config=model.config))[:, N_PROMPT:]
    assert not torch.allclose(cut_out, whole, atol=1e-3), "eviction changed nothing, so the comparison says nothing"


@pytest.mark.parametrize("fair", [False, True])
def test_padding_changes_nothing_for_any_policy(model, fair):
    tokens, mask = ids(2, N_TOKEN), left_padded()
    spans = [{"a": (5, 8), "b": (8, 11)}, SPANS]
    for policy in [policy for policy in POLICIES if takes(model, policy)]:
        with kvp.wrap(model, policy, compression_ratio=0.5, fair=fair) as handle:
            cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT], spans)
            first = handle.compress(tokens[:1, 3:N_PROMPT], spans={"a": (2, 5), "b": (5, 8)})
            second = handle.compress(tokens[1:, :N_PROMPT], spans=SPANS)
            kept = copy.deepcopy(second)
            for layer in cache.kept_layers:
                padded, short, long = (c.positions(layer.index) for c in (cache, first, second))
                assert np.array_equal(padded[0][padded[0] >= 0].reshape(short[0].shape) - 3, short[0])
                assert np.array_equal(padded[1], long[0])
            if policy is not POLICIES[2 * fair + 1]:
                continue
            together = feed(model, tokens, CHUNKS, cache, mask, start=N_PROMPT)
            torch.testing.assert_close(
                together[:1], feed(model, tokens[:1, 3:], CHUNKS, first, start=N_PROMPT - 3), **CLOSE
            )
            alone = feed(model, tokens[1:], CHUNKS, second, start=N_PROMPT)
            torch.testing.assert_close(together[1:], alone, **CLOSE)
        torch.testing.assert_close(alone, masked(model, kept, tokens[1:]), **CLOSE)


def by_hand(model, cache, tokens, n_new, mask=None):
    """Greedy, one forward after another."""
    mask = torch.ones_like(tokens) if mask is None else mask
    start = cache.get_seq_length(cache.kept_layers[0].index)
    logits = feed(model, tokens, [tokens.shape[1] - start], cache, mask, start)
    for _ in range(n_new):
        logits[:, -1, 2] = -torch.inf  # min_new_tokens forbids the end
        tokens, mask = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = feed(model, tokens, [1], cache, mask, tokens.shape[1] - 1)
    return tokens


def takes_new_tokens_alone():
    """Whether this transformers' generate goes on from a cache without being given its tokens again."""
    return release(transformers.__version__) >= release("5.3")


def test_generate_and_a_second_turn_are_a_loop_of_forwards(model):
    tokens, mask = ids(2, N_TOKEN), left_padded()
    with kvp.wrap(model, POLICIES[1], compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT])
        answered = copy.deepcopy(cache)
        answer = model.generate(tokens, attention_mask=mask, past_key_values=answered, **GREEDY)
        assert torch.equal(answer, by_hand(model, copy.deepcopy(cache), tokens, 4, mask))
        assert cache.get_seq_length(cache.kept_layers[0].index) == N_PROMPT, "a copy leaves the original as it was"
        question = ids(2, 3, seed=5)
        turn, longer = torch.cat([answer, question], 1), torch.nn.functional.pad(mask, (0, 7), value=1)
        wanted = by_hand(model, copy.deepcopy(answered), turn, 4, longer)
        again = copy.deepcopy(answered)
        assert torch.equal(model.generate(turn, attention_mask=longer, past_key_values=answered, **GREEDY), wanted)
        n_fed = turn.shape[1] - again.get_seq_length(
            again.kept_layers[0].index
        )  # the last answered token was never fed
        if takes_new_tokens_alone():
            new = model.generate(turn[:, -n_fed:], attention_mask=longer, past_key_values=again, **GREEDY)
            assert torch.equal(new[:, -4:], wanted[:, -4:])
        else:
            with pytest.raises((IndexError, ValueError)):
                model.generate(turn[:, -n_fed:], attention_mask=longer, past_key_values=again, **GREEDY)


def test_beam_search_keeps_the_beams_that_a_search_without_a_moving_cache_keeps(model):
    tokens, n_beam, n_new = ids(1, N_PROMPT), 3, 3
    with kvp.wrap(model, POLICIES[1], compression_ratio=0.5) as handle:
        options = {
            "num_beams": n_beam,
            "num_return_sequences": n_beam,
            "max_new_tokens": n_new,
            "min_new_tokens": n_new,
            "pad_token_id": 0,
        }
        answers = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **options)
        prompt = handle.new_cache()
        first = feed(model, tokens, [N_PROMPT], prompt)[:, -1]
        beams = [(0.0, tokens)]
        for _ in range(n_new):
            longer = []
            for score, text in beams:
                n_more = text.shape[1] - N_PROMPT
                logits = (
                    feed(model, text, [1] * n_more, copy.deepcopy(prompt), start=N_PROMPT)[:, -1] if n_more else first
                )
                chances = torch.log_softmax(logits[0].double(), -1)
                chances[2] = -torch.inf
                best = chances.topk(n_beam)
                longer += [(score + float(c), torch.cat([text, t.view(1, 1)], 1)) for c, t in zip(*best, strict=True)]
            beams = sorted(longer, key=lambda beam: -beam[0])[:n_beam]
    assert torch.equal(answers, torch.cat([text for _, text in beams]))


# Policies that a family's layers do not permit; gemmas and qwen3_next have one layer for PyramidKV to give a budget.
NOT_WITH = {
    "llama": set(),
    "gemma2": {"expected_attention", "pyramidkv"},
    "gemma3_text": {"pyramidkv"},
    "deepseek_v3": {"adakv", "defensivekv", "expected_attention"},
    "qwen3_next": {"defensivekv", "kvzip", "pyramidkv"},
}
IS_4 = transformers.__version__ < "5"  # whose generate counts positions from padding, and takes none in chunks
JUDGE_A_WHOLE_PROMPT = {"adakv", "chunkkv", "defensivekv", "expected_attention", "kvzip", "lagkv"}


@pytest.mark.parametrize("family", not_refused(*NOT_WITH))
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 7},
    ],
    ids=lambda mode: "-".join(mode) or "greedy",
)
@torch.no_grad()
def test_every_policy_answers_in_every_mode_what_each_row_alone_gets_or_says_why_not(family, mode):
    """Rows alone are in chunks of others, and draw other numbers: what they get is compared elsewhere."""
    model, tokens, mask = built(family), ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    same, rows = mode.keys() <= {"num_beams", "num_return_sequences"}, [tokens[:1, 5:], tokens[1:]]
    own_errors, in_chunks = (kvp.UnsupportedModelError, ValueError), "prefill_chunk_size" in mode
    for policy, when in [(p, when) for p in EVERY for when in ("prefill", "decode", "always")[: 1 + 2 * p.holds]]:
        given = {"compression_ratio": 0.5} if when == "prefill" else {"budget": 8}
        try:
            with kvp.wrap(model, policy, when=when, **given):
                both = model.generate(tokens, attention_mask=mask, **{**GREEDY, **mode})
                alone = [model.generate(x, attention_mask=x**0, **{**GREEDY, **mode}) for x in rows if same]
        except own_errors as error:
            of_chunks = in_chunks and (when != "prefill" or policy.name in JUDGE_A_WHOLE_PROMPT or IS_4 or IS_MISPLACED)
            assert "expect" in str(error) and (of_chunks or policy.name in NOT_WITH[family]), (policy.name, when)
            continue
        assert both.shape == (2 * mode.get("num_return_sequences", 1), 24)
        for of_row, own in zip(both.chunk(2), alone, strict=same):
            assert torch.equal(of_row[:, 20:], own[:, -4:]), (policy.name, when)


def test_copies_rows_and_what_comes_after(model):
    """Batch operations, crop and reset; a mask that is left out; another model of the same file; the model itself."""
    tokens = ids(1, N_TOKEN)
    config, names = model.config.to_json_string(), list(model.state_dict())
    plain = feed(model, tokens, [N_TOKEN], DynamicCache(config=model.config))
    stock = sum(map(is_full_attention, DynamicCache(config=model.config).layers))
    with kvp.wrap(model, POLICIES[3], compression_ratio=0.5) as handle:
        assert handle.verify() < 1e-5
        cache = handle.compress(tokens[:, :N_PROMPT])
        assert len(cache.kept_layers) == stock and all((layer.kept_counts == 6).all() for layer in cache.kept_layers)
        report = cache.report()
        sizes = [(row["bytes_before"], row["bytes_after"]) for row in report["layers"]]
        assert report["peak_bytes"] == max(sum(b for _, b in sizes[:i]) + sizes[i][0] for i in range(len(sizes)))
        after_it = feed(model, tokens, [6], copy.deepcopy(cache), start=N_PROMPT)
        without_mask = model(tokens[:, N_PROMPT:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
        torch.testing.assert_close(without_mask, after_it, **CLOSE)
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(3)
        twice.batch_select_indices(torch.tensor([2, 0]))
        both = feed(model, tokens.expand(2, -1), [6], twice, start=N_PROMPT)
        torch.testing.assert_close(both, after_it.expand_as(both), **CLOSE)
        assert not any(layer.is_croppable for layer in cache.kept_layers)
        with pytest.raises(ValueError, match="only the newest 0 came after eviction"):
            cache.crop(-1)
        assert torch.equal(feed(copy.deepcopy(model), tokens, [N_TOKEN], DynamicCache(config=model.config)), plain), (
            "a copy is not wrapped"
        )
        assert model.config.to_json_string() == config and list(model.state_dict()) == names
    assert torch.equal(feed(model, tokens, [N_TOKEN], DynamicCache(config=model.config)), plain)


@of_full_layers
def test_only_later_tokens_are_cropped_and_a_reset_cache_is_new(model):
    tokens = ids(1, N_TOKEN)
    with kvp.wrap(model, POLICIES[4], compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        wanted = feed(model, tokens, [6], copy.deepcopy(cache), start=N_PROMPT)
        feed(model, tokens, [6], cache, start=N_PROMPT)
        cache.crop(-6)
        assert torch.equal(feed(model, tokens, [6], cache, start=N_PROMPT), wanted)
        cache.reset()
        assert cache.report()["peak_bytes"] == cache.held_bytes == 0
        feed(model, tokens, [N_PROMPT], cache)
        assert torch.equal(feed(model, tokens, [6], cache, start=N_PROMPT), wanted)


@of_full_layers
def test_drafts_are_taken_back_where_nothing_is_evicted(model):
    tokens = ids(1, 6).repeat(1, 3)  # so that there is something to look up
    lookup = {"prompt_lookup_num_tokens": 3, "eos_token_id": 2, **GREEDY}
    wanted = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    with kvp.wrap(model, "knorm", compression_ratio=0):
        assert torch.equal(model.generate(tokens, attention_mask=torch.ones_like(tokens), **lookup), wanted)


@pytest.mark.parametrize("family", [*FAMILIES, *not_refused("jetmoe")])
def test_scores_are_of_the_attention_the_model_computes(family):
    """Soft-cap, attention sinks, logit scale, partial rotary, latents, mixed heads: against the eager model's own
    attention weights."""
    model, tokens = build(family, "eager"), ids(1, N_PROMPT)
    for name, module in model.named_modules():
        if family == "gpt_oss" and name.endswith("self_attn"):
            torch.nn.init.normal_(module.sinks, std=3.0)
        if family == "gemma2" and name.endswith("self_attn"):
            module.attn_logit_softcapping = 2.0
    with torch.no_grad():
        attentions = [a for a in model(tokens, output_attentions=True).attentions if a is not None]
    for policy in ("h2o", "tova"):
        with kvp.wrap(model, policy, budget=5) as handle:
            cache = handle.compress(tokens)
        one_each = len(attentions) == len(cache.layers)
        for i, layer in enumerate(cache.kept_layers):
            weights = attentions[layer.index if one_each else i][0].double()  # (Hq, T, T)
            n_head = 1 if layer.shared or policy == "tova" else layer.keys.shape[1]
            per_head = weights.unflatten(0, (n_head, -1)).mean(1)
            score = per_head[:, -1] if policy == "tova" else per_head.sum(1) / torch.arange(N_PROMPT, 0, -1)
            if policy == "tova":
                score[:, -1] = 2.0  # the last token is kept first
            wanted = score.topk(5).indices.sort(-1).values.expand(layer.keys.shape[1], -1)
            assert np.array_equal(cache.positions(layer.index)[0], wanted.numpy())


def test_the_probe_notices_a_choice_per_head_where_heads_are_mixed(monkeypatch):
    model = build("diffllama")
    if not not_refused("diffllama"):  # transformers 4 and 5.0 to 5.12 keep it off the attention interface
        with pytest.raises(kvp.UnsupportedModelError, match="code of its own"):
            kvp.wrap(model, "knorm", budget=5)
        return
    with kvp.wrap(model, "knorm", budget=5) as handle:
        assert handle.verify() < 1e-5
        monkeypatch.setattr(
            AttentionCall,
            "__getattribute__",
            lambda call, name: name != "share_heads" and object.__getattribute__(call, name),
        )
        with pytest.raises(kvp.UnsupportedModelError, match="shuffling cached rows changes its logits"):
            handle.verify()


@pytest.mark.parametrize("family", not_refused("bart", "marian", "whisper"))
@pytest.mark.parametrize(("n_encoder", "n_decoder"), [(4, 2), (2, 4)])
def test_a_decoder_that_is_longer_or_shorter_than_its_encoder_takes_what_the_refusal_says(family, n_encoder, n_decoder):
    config = tiny_config(family, encoder_layers=n_encoder, decoder_layers=n_decoder)
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), ids(1, N_TOKEN)
    told = rf"it has {n_decoder} layers, but num_hidden_layers .* encoder's, {n_encoder}; expected model.config.num_hi"
    try:
        kvp.wrap(model, "knorm", budget=5).remove()  # transformers 4.57 counts a shorter decoder's own
    except kvp.UnsupportedModelError as error:
        assert re.search(told, str(error))
        model.config.num_hidden_layers = n_decoder
    with kvp.wrap(model, "knorm", budget=5) as handle:
        assert len(handle.compress(tokens).kept_layers) == n_decoder and handle.verify() < 1e-5
