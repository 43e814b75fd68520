"""Evicting between the chunks of a prompt: against a model that is shown the same chunks and has each one's evicted
tokens hidden from it, and against one prefill."""

import math

import numpy as np
import pytest
import torch
import transformers
from model_sweep import build as build_type
from model_sweep import mixed, not_refused
from packaging.version import parse as release
from tiny_models import IS_MISPLACED, build, chunks_of_generate, feed, ids, masked_like
from tiny_policies import EVERY
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import kvpitfalls as kvp
from kvpitfalls.hf import masks
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.layer import Slots
from kvpitfalls.hf.parts import decoder_of
from kvpitfalls.hf.rows import TELLS_PADDING_ONCE

CLOSE = {"rtol": 0, "atol": 1e-5}
N_PROMPT, SIZE, AFTER = 26, 7, [1, 3, 1]
SPANS = {"first": (2, 9), "second": (9, 21)}
TAKEN = [policy for policy in EVERY if policy.in_chunks]
GREEDY = {"do_sample": False, "max_new_tokens": 4}
SPLITS_ALL = release(transformers.__version__) >= release("5")  # before, generate leaves the last token for a step


@pytest.fixture(scope="module", params=[("llama", "sdpa"), ("gemma3_text", "sdpa"), ("gpt2", "eager")], ids="-".join)
def model(request):
    return build(*request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def left_pad(n_token=30, n=10):
    mask = torch.ones(2, n_token, dtype=torch.long)
    mask[0, :n] = 0
    return mask


def in_chunks(model, handle, tokens, size=SIZE, **given):
    """The cache, and after each chunk how many tokens had come and what each layer held of them."""
    stages, seen = [], {}
    make = handle._caches.make

    def note(module, args, output):
        cache = seen["cache"]
        stages.append((cache.get_seq_length(), {x.index: held_in(x) for x in cache.kept_layers}))

    handle._caches.make = lambda *a, **changes: seen.setdefault("cache", make(*a, **changes))
    hook = decoder_of(model).register_forward_hook(note)
    try:
        return handle.compress(tokens, prefill_chunk_size=size, **given), stages
    finally:
        hook.remove()
        del handle._caches.make


def held_in(layer):
    """Tokens (B, H, K), -1 where a row holds fewer."""
    if layer.pos is None:
        return np.broadcast_to(np.arange(layer.seen), (*layer.keys.shape[:2], layer.seen))
    return (layer.pos if layer.live is None else layer.pos.masked_fill(~layer.live, -1)).numpy()


class masked_at(masked_like):
    """Hide, in each later forward, what was gone after the chunk before it; and padding."""

    def __init__(self, model, cache, stages, mask):
        super().__init__(model, cache, stages[-1][0])
        self.stages, self.mask = stages, mask

    def _visible(self, source, n_row, n_past, n_new):
        before = [stage for stage in self.stages if stage[0] <= n_past]
        n_seen, held = before[-1] if before else (0, {source: np.full((n_row, 1, 0), -1)})
        visible = self._seen_at(held[source], n_row, n_seen, n_past + n_new)
        real = self.mask[:, None, : n_past + n_new].bool()
        return visible & (real | ~real.any(-1, keepdim=True))  # a row of padding alone sees something


def settings(policy, fair):
    return {"policy": policy, "fair": fair, "compression_ratio": 0.5}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fair", [False, True, "floor=2"])
@pytest.mark.parametrize("policy", TAKEN, ids=str)
def test_evicting_between_chunks_equals_masking_in_the_same_chunks(model, policy, fair, padded):
    tokens, mask = ids(), left_pad() if padded else torch.ones(2, 30, dtype=torch.long)
    tokens = torch.cat([tokens, tokens[:, :3]], 1)
    mask = torch.cat([mask, mask[:, -3:]], 1)
    spans = [{"first": (12, 16), "second": (16, 25)}, SPANS] if padded else SPANS
    options = {"attention_mask": mask[:, :N_PROMPT], "spans": spans}
    with kvp.wrap(model, **settings(policy, fair)) as handle:
        cache, stages = in_chunks(model, handle, tokens[:, :N_PROMPT], **options)
        assert [n for n, _ in stages] == [7, 14, 21, 26]
        evicted = feed(model, tokens, AFTER, cache.copy(), mask, start=N_PROMPT)
    plain = DynamicCache(config=model.config)
    with masked_at(model, cache, stages, mask):
        feed(model, tokens, [7, 7, 7, 5], plain, mask)
        hidden = feed(model, tokens, AFTER, plain, mask, start=N_PROMPT)
    torch.testing.assert_close(evicted, hidden, **CLOSE)
    whole = feed(model, tokens, [N_PROMPT, *AFTER], DynamicCache(config=model.config), mask)[:, N_PROMPT:]
    assert not torch.allclose(evicted, whole, atol=1e-3), "eviction changed nothing, so the comparison says nothing"


class Sizes(TorchDispatchMode):
    """Shapes that were gathered from."""

    def __init__(self):
        super().__init__()
        self.gathered = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.gather.default:
            self.gathered.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_large_chunk_has_one_mask_for_all_heads(name, implementation, padded, monkeypatch):
    """Which is the mask that each head's would be, so answers are the same."""
    model, tokens, caches, gathered = build(name, implementation), ids(2, 30), [], []
    mask = left_pad() if padded else torch.ones(2, 30, dtype=torch.long)
    for large in (math.inf, 0):
        monkeypatch.setattr(masks, "_LARGE", large)
        with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle, Sizes() as sizes:
            cache = handle.compress(tokens[:, :N_PROMPT], mask[:, :N_PROMPT], prefill_chunk_size=SIZE)
            caches.append((cache, feed(model, tokens, [4], cache.copy(), mask, start=N_PROMPT)))
        gathered.append(sum(shape[2] > 1 and len(shape) == 4 and shape[3] > 16 for shape in sizes.gathered))
    assert torch.equal(*(logits for _, logits in caches))
    for one, other in zip(*(cache.kept_layers for cache, _ in caches), strict=True):
        assert torch.equal(one.pos, other.pos) and torch.equal(one.keys, other.keys)
    assert gathered[0] > 0 == gathered[1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_a_mask_for_all_heads_is_each_heads_own(kind, seed, monkeypatch):
    """Also where a token is hidden from some of a chunk, where windows slide, and where heads hold unequally many."""
    generator, n_new, n_old = torch.Generator().manual_seed(seed), 5, 12
    pos = torch.stack([torch.randperm(n_old, generator=generator)[:7] for _ in range(6)]).reshape(2, 3, 7)
    lives = [
        None,
        torch.ones(2, 3, 7, dtype=torch.bool),
        torch.rand(2, 1, 7, generator=generator).expand(2, 3, 7) < 0.7,
    ]
    lives.append(torch.rand(2, 3, 7, generator=generator) < 0.7)
    query = torch.zeros(2, 6, n_new, 4)
    causal = torch.ones(n_new, n_old + n_new).tril(n_old).bool()
    hidden = causal & (torch.rand(2, 1, n_new, n_old + n_new, generator=generator) < 0.9)
    for visible in [causal[None, None], causal.triu(n_old - 6)[None, None], hidden]:
        bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        mask = {"none": None, "bool": visible, "additive": bias}[kind]
        for live in lives:
            slots = Slots(pos, live, n_new, n_old + n_new)
            made = []
            for large in (math.inf, 0):
                monkeypatch.setattr(masks, "_LARGE", large)
                made.append(masks.physical_mask(slots, mask, query, "eager" if kind == "additive" else "sdpa"))
            assert torch.equal(made[1].expand_as(made[0]), made[0])


@pytest.mark.parametrize("protect", [None, "sinks", "second"])
@pytest.mark.parametrize("amount", [{"compression_ratio": 0.5}, {"budget": 14}], ids=str)
@pytest.mark.parametrize("fair", [False, True, kvp.Fair(weights={"second": 2.0}), "floor=2"])
def test_the_last_chunk_leaves_what_one_prefill_leaves(llama, fair, amount, protect):
    tokens, mask = ids(2, N_PROMPT), left_pad(N_PROMPT)
    spans = [{"first": (12, 16), "second": (16, 22)}, {"first": (2, 9), "second": (9, 15)}]
    for policy in TAKEN:
        if policy.allocation != "uniform" and protect:
            continue  # its upper layers have no room for them
        with kvp.wrap(llama, policy, fair=fair, protect=protect, **amount) as handle:
            options = {"attention_mask": mask, "spans": spans}
            try:
                once = handle.compress(tokens, **options)
            except kvp.BudgetError:
                with pytest.raises(kvp.BudgetError):
                    handle.compress(tokens, prefill_chunk_size=SIZE, **options)
                continue
            cache, stages = in_chunks(llama, handle, tokens, **options)
        said, wanted = cache.report(), once.report()
        assert [x["kept"] for x in said["layers"]] == [x["kept"] for x in wanted["layers"]], policy
        for what in ("n_tokens", "bytes_before", "bytes_after", "bytes_kept", "kept_share"):
            assert said[what] == wanted[what], (policy, what)
        assert said["peak_bytes"] < wanted["peak_bytes"] and all(x.partial is None for x in cache.layers)
        for row, of_row in enumerate(spans):
            for name in of_row:
                if fair not in (False, "floor=2"):
                    assert np.array_equal(cache.kept(name, row), once.kept(name, row)), (policy, name)
                if name == protect:
                    assert (cache.kept(name, row) == 1).all()
                    assert all(
                        np.isin(range(of_row[name][0], min(n, of_row[name][1])), head).all()
                        for n, held in stages
                        for layer in held.values()
                        for head in layer[row]
                    ), "a protected token went between chunks"


@pytest.mark.parametrize("fair", [False, True])
def test_a_policy_of_positions_keeps_the_tokens_that_one_prefill_keeps(llama, fair):
    tokens, spans = ids(2, N_PROMPT), {"first": (0, 11), "second": (11, 21)}  # the sinks fit the first one's quota
    with kvp.wrap(llama, "streaming_llm", compression_ratio=0.5, fair=fair) as handle:
        once = handle.compress(tokens, spans=spans)
        cache = handle.compress(tokens, spans=spans, prefill_chunk_size=SIZE)
    for layer in range(len(cache.layers)):
        assert np.array_equal(cache.positions(layer), once.positions(layer))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_a_layer_never_holds_more_than_its_share_and_one_chunk(llama, ratio):
    tokens = ids(1, N_PROMPT)
    row = 2 * 4 * llama.config.num_key_value_heads * llama.config.hidden_size // llama.config.num_attention_heads
    with kvp.wrap(llama, "knorm", compression_ratio=ratio) as handle:
        cache, stages = in_chunks(llama, handle, tokens)
    n_kept = [{x.shape[2] for x in held.values()} for _, held in stages]
    shares = [math.ceil(math.floor(N_PROMPT * (1 - ratio) + 1e-9) * n / N_PROMPT) for n, _ in stages]
    assert n_kept == [{n} for n in shares]
    assert all(n <= math.ceil((1 - ratio) * came) for n, (came, _) in zip(shares, stages, strict=True))
    before = [0, *shares]
    sizes = [n + came - past for n, came, past in zip(before, (7, 14, 21, 26), (0, 7, 14, 21), strict=False)]
    n_layer = len(cache.layers)
    # the last layer is cut last: the others have been by then
    most = max((n_layer - 1) * max(after, size) + size for after, size in zip(shares, sizes, strict=True))
    assert cache.report()["peak_bytes"] <= most * row


@pytest.mark.parametrize("policy", ["h2o", "knorm", "tova"])
def test_who_is_kept_after_each_chunk(policy):
    """By the attention weights of a model that has the evicted tokens hidden from it."""
    model = build("llama", "eager")
    tokens, mask = ids(1, N_PROMPT), torch.ones(1, N_PROMPT, dtype=torch.long)
    with kvp.wrap(model, policy, compression_ratio=0.5) as handle:
        cache, stages = in_chunks(model, handle, tokens)
    plain, start = DynamicCache(config=model.config), 0
    n_layer, n_head = len(cache.layers), model.config.num_key_value_heads
    sums = torch.zeros(n_layer, n_head, N_PROMPT, dtype=torch.float64)
    held = [[set() for _ in range(n_head)] for _ in range(n_layer)]
    with masked_at(model, cache, stages, mask), torch.no_grad():
        for n, now in stages:
            out = model(tokens[:, start:n], use_cache=True, output_attentions=True, **cache_argument(model, plain))
            for i, weights in enumerate(out.attentions):
                grouped = weights[0].double().unflatten(0, (n_head, -1)).mean(1)
                sums[i, :, :n] += grouped.sum(1)
                ages = n - torch.arange(n)
                scores = {
                    "h2o": sums[i, :, :n] / ages,
                    "tova": grouped[:, -1].mean(0, keepdim=True).expand(n_head, -1).clone(),
                    "knorm": -plain.layers[i].keys[0].norm(dim=-1),
                }[policy]
                if policy == "tova":
                    scores[:, n - 1] = 2
                for head in range(n_head):
                    there = sorted(held[i][head] | set(range(start, n)))
                    best = sorted(there, key=lambda t, s=scores[head]: -float(s[t]))[: now[i].shape[2]]
                    held[i][head] = set(best)
                    assert sorted(best) == now[i][0, head].tolist(), (n, i, head)
            start = n


def test_a_row_that_is_padded_by_whole_chunks_is_the_row_alone(llama):
    tokens, mask = ids(2, 28), left_pad(28, 2 * SIZE)
    spans = [{"a": (15, 20)}, {"a": (3, 20)}]
    for policy in TAKEN:
        for fair in (False, True):
            with kvp.wrap(
                llama, policy, budget=8, fair=fair, protect="a" if policy.name == "knorm" else None
            ) as handle:
                try:
                    both = handle.compress(tokens, attention_mask=mask, spans=spans, prefill_chunk_size=SIZE)
                except kvp.BudgetError:
                    continue
                alone = handle.compress(tokens[:1, 14:], spans={"a": (1, 6)}, prefill_chunk_size=SIZE)
            for layer in range(len(both.layers)):
                of_row = both.positions(layer)[0]
                of_row = of_row[of_row >= 0].reshape(len(of_row), -1) - 14
                assert np.array_equal(of_row, alone.positions(layer)[0]), (policy, fair)


@pytest.mark.parametrize("given", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_in_chunks_is_compress_in_chunks(llama, padded, given):
    tokens, mask = ids(2, N_PROMPT), left_pad(N_PROMPT) if padded else torch.ones(2, N_PROMPT, dtype=torch.long)
    options = {"attention_mask": mask, **GREEDY, **given, "return_dict_in_generate": True, "output_logits": True}
    n_run = max(given.get("num_beams", 1), given.get("num_return_sequences", 1))
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens, attention_mask=mask, prefill_chunk_size=SIZE)
        is_counted = padded and not SPLITS_ALL and "num_beams" not in given  # a beam search is not split there
        if is_counted or IS_MISPLACED:
            with pytest.raises(ValueError, match="positions that are not its tokens'"):
                llama.generate(tokens, prefill_chunk_size=SIZE, **options)
            return
        torch.manual_seed(0)
        answer = llama.generate(tokens, prefill_chunk_size=SIZE, **options)
        made = answer.past_key_values
        again = handle.report()
    assert isinstance(made, kvp.KeptCache) and made.coming is None
    assert made.get_seq_length() == N_PROMPT + 3 and again["kept_share"] == cache.report()["kept_share"]
    if SPLITS_ALL:
        cache.batch_repeat_interleave(n_run)
        if "num_beams" not in given:
            for layer in range(len(cache.layers)):
                assert np.array_equal(made.positions(layer), cache.positions(layer))


@chunks_of_generate
def test_generate_goes_on_as_a_cache_of_the_same_chunks_does(llama):
    tokens, n = ids(2, 29), 4 * SIZE + 1  # so that transformers 4 makes the same chunks
    with kvp.wrap(llama, "h2o", compression_ratio=0.5) as handle:
        new = handle.new_cache(spans=SPANS)
        options = {"attention_mask": torch.ones_like(tokens), **GREEDY}
        answer = llama.generate(tokens, prefill_chunk_size=SIZE, **cache_argument(llama, new), **options)
        cache = handle.compress(tokens, spans=SPANS, prefill_chunk_size=SIZE)
        wanted = feed(llama, answer, [1, 1, 1], cache, start=n).argmax(-1)
        assert torch.equal(answer[:, n + 1 :], wanted)
        assert new.report()["spans"].keys() == SPANS.keys()
        more = llama.generate(answer, **cache_argument(llama, new), **GREEDY)  # a second turn
    assert more.shape[1] == answer.shape[1] + 4


def test_a_prompt_of_one_chunk_is_as_without(llama):
    tokens = ids(2, N_PROMPT)
    for policy in ("snapkv", "h2o"):
        with kvp.wrap(llama, policy, compression_ratio=0.5) as handle:
            once, chunk = handle.compress(tokens), handle.compress(tokens, prefill_chunk_size=N_PROMPT)
        assert all(np.array_equal(once.positions(i), chunk.positions(i)) for i in range(len(once.layers)))


def test_chunks_of_one_size_are_the_same_told_one_by_one(llama):
    tokens = ids(2, N_PROMPT)
    for policy in TAKEN:
        with kvp.wrap(llama, policy, compression_ratio=0.5) as handle:
            told, said = (handle.compress(tokens, prefill_chunk_size=size) for size in ([7, 7, 7, 5], 7))
        assert all(np.array_equal(told.positions(i), said.positions(i)) for i in range(len(told.layers))), policy


@pytest.mark.parametrize("sizes", [[1, 25], [25, 1], [3, 11, 2, 10], [1] * N_PROMPT], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fair", [False, True, "floor=2"])
def test_chunks_of_any_sizes_keep_what_masking_keeps_and_as_much_as_one_prefill(llama, fair, padded, sizes):
    tokens, mask = ids(2, 30), left_pad() if padded else torch.ones(2, 30, dtype=torch.long)
    options = {"attention_mask": mask[:, :N_PROMPT]}
    options["spans"] = [{"first": (12, 16), "second": (16, 22)}, SPANS] if padded else SPANS
    for policy in ("h2o", "streaming_llm"):
        with kvp.wrap(llama, **settings(policy, fair)) as handle:
            cache, stages = in_chunks(llama, handle, tokens[:, :N_PROMPT], sizes, **options)
            once = handle.compress(tokens[:, :N_PROMPT], **options)
            evicted = feed(llama, tokens, [1, 3], cache.copy(), mask, start=N_PROMPT)
        assert [n for n, _ in stages] == np.cumsum(sizes).tolist()
        assert [x["kept"] for x in cache.report()["layers"]] == [x["kept"] for x in once.report()["layers"]]
        plain = DynamicCache(config=llama.config)
        with masked_at(llama, cache, stages, mask):
            feed(llama, tokens, sizes, plain, mask)
            hidden = feed(llama, tokens, [1, 3], plain, mask, start=N_PROMPT)
        torch.testing.assert_close(evicted, hidden, **CLOSE)


def test_nothing_is_evicted_where_all_may_stay(llama):
    tokens, mask = ids(2, N_PROMPT), left_pad(N_PROMPT)
    for amount in ({"compression_ratio": 0}, {"budget": 100}):
        with kvp.wrap(llama, "lagkv" if "budget" not in amount else "knorm", **amount) as handle:
            cache = handle.compress(tokens, attention_mask=mask, prefill_chunk_size=SIZE)
        assert not any(layer.is_evicted for layer in cache.layers) and cache.valid == [(10, 26), (0, 26)]
        assert cache.report()["kept_share"] == 1


def test_a_cache_of_chunks_is_saved_and_laid_out(llama, tmp_path):
    tokens, mask = ids(2, 30), left_pad()
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT], attention_mask=mask[:, :N_PROMPT], prefill_chunk_size=SIZE)
        cache.save(tmp_path / "cache.safetensors")
        wanted = feed(llama, tokens, [1, 2, 1], cache.copy(), mask, start=N_PROMPT)
        for other in (cache.fixed(8), kvp.load_cache(tmp_path / "cache.safetensors", llama)):
            torch.testing.assert_close(feed(llama, tokens, [1, 2, 1], other, mask, start=N_PROMPT), wanted, **CLOSE)


@pytest.mark.parametrize("how", ["compress", "generate"])
@pytest.mark.parametrize(
    ("wrapped", "error", "message"),
    [
        ({"policy": "lagkv"}, ValueError, "policy is 'lagkv', which judges a prompt that is whole; prefill_chunk_size"),
        ({"policy": "expected_attention"}, ValueError, "policy is 'expected_attention', which judges a prompt that is"),
        ({"policy": "kvzip"}, ValueError, "policy is 'kvzip', which judges a prompt that is whole; prefill_chunk_size"),
        ({"policy": "snapkv", "allocation": "ada"}, ValueError, "whose shares depend on the whole prompt"),
        ({"policy": "snapkv", "fair": 0.5}, ValueError, "fair is .*, whose quotas depend on the whole prompt"),
        ({"policy": "snapkv", "fair": "paper"}, ValueError, "fair is 'paper', whose quotas depend on the whole prompt"),
        ({"policy": "snapkv", "when": "always"}, ValueError, "when='always' takes a prompt as a whole"),
    ],
    ids=str,
)
def test_what_cannot_be_right_is_refused_by_name(llama, wrapped, error, message, how):
    tokens = ids(1, N_PROMPT)
    with kvp.wrap(llama, compression_ratio=0.5, **wrapped) as handle, pytest.raises(error, match=message):
        if how == "compress":
            handle.compress(tokens, spans={"a": (0, 9), "b": (9, 20)}, prefill_chunk_size=SIZE)
        else:
            llama.generate(tokens, prefill_chunk_size=SIZE, **GREEDY)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [1, SIZE, [1, 24, 1], [24, 1, 1]], ids=str)
@pytest.mark.parametrize(
    "family", [*not_refused("llama", "qwen3_next", "lfm2", "granitemoehybrid", "nemotron_h"), *mixed()]
)
def test_linear_attention_makes_of_chunks_what_it_makes_of_the_whole_or_is_refused(family, size, padded):
    model, tokens = build_type(family), ids()
    mask = left_pad() if padded else torch.ones_like(tokens)
    options = {"attention_mask": mask[:, :N_PROMPT]}
    with kvp.wrap(model, "knorm", compression_ratio=0) as handle:
        if family != "llama" and size in (1, [1, 24, 1]) and padded:
            with pytest.raises(ValueError, match="takes a token that comes alone for a real one, so expected at least"):
                handle.compress(tokens[:, :N_PROMPT], **options, prefill_chunk_size=size)
            return
        if family != "llama" and size == SIZE and padded and TELLS_PADDING_ONCE:
            with pytest.raises(ValueError, match=r"up to 10 tokens, .* begins with 7; .* a first chunk of at least 10"):
                handle.compress(tokens[:, :N_PROMPT], **options, prefill_chunk_size=size)
            size = [10, 16]
        cache = handle.compress(tokens[:, :N_PROMPT], **options, prefill_chunk_size=size)
        once = handle.compress(tokens[:, :N_PROMPT], **options)
        one, other = (feed(model, tokens, [1, 1], x, mask, start=N_PROMPT) for x in (cache, once))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", not_refused("jamba", "qwen3_next", "granitemoehybrid", forgetful=True))
def test_a_model_that_forgets_between_chunks_is_refused(family):
    model, tokens = build_type(family), ids()
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        with pytest.raises(kvp.UnsupportedModelError, match="forgets what came before a forward of several tokens"):
            handle.compress(tokens, prefill_chunk_size=SIZE)
        assert handle.compress(tokens, prefill_chunk_size=30).report()["kept_share"] == 0.5  # comes as a whole


def test_bad_sizes_padding_and_inputs_are_refused(llama):
    tokens, mask = ids(2, N_PROMPT), left_pad(N_PROMPT)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        for size in (0, -3, 2.0, True, "7"):
            with pytest.raises(ValueError, match=r"prefill_chunk_size is .*; expected a whole number, at least 1"):
                handle.compress(tokens, prefill_chunk_size=size)
        for sizes, message in (
            ([20, 0, 6], "prefill_chunk_size holds 0; expected whole numbers, at least 1"),
            ([20, 6.0], "prefill_chunk_size holds 6.0; expected whole numbers, at least 1"),
            ([20, True, 5], "prefill_chunk_size holds True; expected whole numbers, at least 1"),
            (["26"], "prefill_chunk_size holds '26'; expected whole numbers, at least 1"),
            ([20, 5], "holds 2 chunks of 25 tokens together; expected 26, as the prompt has, padding included"),
            ([], "holds 0 chunks of 0 tokens together; expected 26, as the prompt has, padding included"),
        ):
            with pytest.raises(ValueError, match=message):
                handle.compress(tokens, prefill_chunk_size=sizes)
        with pytest.raises(ValueError, match=r"row 0 of the prompt is padded on the right; prefill_chunk_size expects"):
            handle.compress(tokens, attention_mask=mask.flip(1), prefill_chunk_size=SIZE)
        with pytest.raises(kvp.UnsupportedModelError, match=r"expected token ids \(B, T\) with it"):
            llama.generate(inputs_embeds=llama.get_input_embeddings()(tokens), prefill_chunk_size=SIZE, **GREEDY)
        with pytest.raises(ValueError, match="on ids that hold the padding token; expected an attention_mask"):
            llama.generate(tokens, pad_token_id=int(tokens[0, 0]), prefill_chunk_size=SIZE, **GREEDY)


@chunks_of_generate
def test_a_prefill_that_is_broken_off_between_chunks_leaves_no_cache_to_go_on_with(llama):
    tokens, calls = ids(1, N_PROMPT), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.new_cache()
        hook = decoder_of(llama).register_forward_pre_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                llama.generate(tokens, prefill_chunk_size=SIZE, **cache_argument(llama, cache), **GREEDY)
        finally:
            hook.remove()
        assert cache.get_seq_length() == 14
        with pytest.raises(ValueError, match="14 of the 26 tokens of a prompt whose prefill in chunks was broken off"):
            llama.generate(tokens, **cache_argument(llama, cache), **GREEDY)
        assert handle.compress(tokens).report()["kept_share"] == 0.5  # the thread is as before
