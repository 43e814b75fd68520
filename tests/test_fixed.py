"""Caches of fixed size: whatever is generated on one is what the growing cache generates; what they cannot do is
refused by name.

On a GPU the same tests run with captured steps.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, feed, ids
from tiny_policies import EVERY as POLICIES
from transformers import TextIteratorStreamer

import kvpitfalls as kvp
from kvpitfalls.hf import one_token
from kvpitfalls.hf.fixed import FixedCache

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]
N_PROMPT, SPANS = 24, {"first": (2, 9), "second": (12, 20)}


@pytest.fixture(scope="module", params=DEVICES)
def llama(request):
    return build("llama").to(request.param)


def prompt(padding: str | None, n_row: int = 3):
    """Tokens and mask on the CPU; padding on one side, but for the last row."""
    tokens = ids(n_row, N_PROMPT)
    mask = torch.ones_like(tokens)
    for row in range(n_row - 1) if padding else ():
        mask[row, slice(0, 4 * row + 2) if padding == "left" else slice(N_PROMPT - 4 * row - 2, None)] = 0
    return tokens, mask


def answer(model, cache, tokens, mask, n_new=40, **options):
    """Tokens and logits of a greedy answer to three tokens of question."""
    question = ids(len(tokens), 3, seed=5)
    asked, seen = (
        torch.cat([tokens, question], 1).to(model.device),
        torch.cat([mask, torch.ones_like(question)], 1).to(model.device),
    )
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False} | options
    out = model.generate(
        asked, attention_mask=seen, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences[:, asked.shape[1] :], torch.stack(out.logits)


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert (one[1] - other[1]).abs().max() <= 1e-5


@pytest.mark.parametrize(("fair", "padding"), [(False, None), (True, None), (False, "left"), (False, "right")])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_answers_are_those_of_the_growing_cache(llama, policy, fair, padding):
    tokens, mask = prompt(padding)
    spans = [SPANS] * 3 if padding is None else None
    with kvp.wrap(llama, policy, compression_ratio=0.5, fair=fair, protect="sinks") as handle:
        cache = handle.compress(tokens, None if padding is None else mask, spans)
        fixed = cache.fixed(43)
        before = cache.report()
        assert_same(answer(llama, copy.deepcopy(cache), tokens, mask), answer(llama, fixed, tokens, mask))
        assert cache.report() == before, "the cache it was made from stays as it is"
        assert fixed.report()["kept_share"] == before["kept_share"] and fixed.report()["spans"] == before["spans"]
        assert all((fixed.positions(i) == cache.positions(i)).all() for i in range(3))
    assert (fixed.graph is not None) == (llama.device.type == "cuda")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "gpt2"])
@pytest.mark.parametrize("device", DEVICES)
def test_other_families(family, implementation, device):
    model = build(family, implementation).to(device)
    tokens, mask = prompt("left")
    with kvp.wrap(model, "knorm", compression_ratio=0.4) as handle:
        cache = handle.compress(tokens, mask)
        assert_same(
            answer(model, copy.deepcopy(cache), tokens, mask, 20), answer(model, cache.fixed(30), tokens, mask, 20)
        )


def test_nothing_evicted(llama):
    tokens, mask = prompt("left")
    with kvp.wrap(llama, "h2o", compression_ratio=0.0) as handle:
        cache = handle.compress(tokens, mask)
        assert_same(answer(llama, copy.deepcopy(cache), tokens, mask), answer(llama, cache.fixed(43), tokens, mask))


@pytest.mark.parametrize("other", [0, 1])
def test_a_layer_may_be_of_another_dtype(other):
    """What hides slots is added to its logits, so it is of the dtype of these."""
    model = build("llama")
    layer = model.model.layers[other].bfloat16()
    take, give = layer.forward, torch.bfloat16

    def forward(hidden, position_embeddings, **others):
        turned = tuple(x.to(give) for x in position_embeddings)
        return take(hidden.to(give), position_embeddings=turned, **others).float()

    layer.forward = forward
    tokens, mask = prompt("left")
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens, mask)
        fixed = cache.fixed(43)
        assert [x.slots.bias.dtype for x in fixed.layers] == [x.keys.dtype for x in cache.layers]
        (_, growing), (_, same) = (answer(model, x, tokens, mask, n_new=3) for x in (cache, fixed))
        assert (growing[0] - same[0]).abs().max() <= 2**-7 * growing[0].abs().max()  # bfloat16's roundings


def test_a_fixed_cache_answers_again_after_a_copy_or_a_crop(llama):
    tokens, mask = prompt("left")
    with kvp.wrap(llama, "tova", compression_ratio=0.5) as handle:
        fixed = handle.compress(tokens, mask).fixed(50)
        first = answer(llama, copy.deepcopy(fixed), tokens, mask)
        assert_same(first, answer(llama, fixed, tokens, mask))
        fixed.crop(-(fixed.get_seq_length() - N_PROMPT))
        assert fixed.get_seq_length() == N_PROMPT and fixed.n_free == 50
        assert_same(first, answer(llama, fixed, tokens, mask))
        with pytest.raises(ValueError, match="crop would drop 43 tokens, but only the newest 42 came after eviction"):
            fixed.crop(-43)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}],
)
def test_beams_and_several_sequences(llama, options):
    tokens, mask = prompt(None)

    def run(cache):
        torch.manual_seed(0)
        return answer(llama, cache, tokens, mask, 12, **options)[0]

    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens)
        n = options.get("num_beams", 1) if "num_beams" in options else options["num_return_sequences"]
        for each in (several := [copy.deepcopy(cache), cache.fixed(20)]):
            each.batch_repeat_interleave(n)
        assert torch.equal(*map(run, several))


def test_a_streamer_gets_every_token(llama):
    class Letters:
        def decode(self, tokens, **kwargs):
            return "".join(f"{int(token)} " for token in tokens)

    tokens, mask = prompt(None, 1)
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
        out, _ = answer(llama, handle.compress(tokens).fixed(20), tokens, mask, 9, streamer=streamer)
    assert "".join(streamer).split() == [str(token) for token in out[0].tolist()]


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=6), ratio=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_tokens_may_come_in_any_chunks(llama, chunks, ratio, seed):
    tokens = ids(2, N_PROMPT + sum(chunks), seed=seed)
    with kvp.wrap(llama, "knorm", compression_ratio=ratio) as handle:
        cache = handle.compress(tokens[:, :N_PROMPT])
        growing, fixed = (
            feed(llama, tokens.to(llama.device), chunks, each, start=N_PROMPT)
            for each in (copy.deepcopy(cache), cache.fixed(24))
        )
    assert (growing - fixed).abs().max() <= 1e-5


@pytest.mark.parametrize("when", ["prefill", "always"])
@pytest.mark.parametrize("nothing", [[], torch.tensor([]), torch.zeros(3, dtype=torch.bool)], ids=repr)
def test_a_cache_of_no_row_is_refused_and_the_cache_stays(llama, when, nothing):
    tokens, mask = prompt(None)
    with kvp.wrap(llama, "tova", compression_ratio=0.5, when=when) as handle:
        cache = handle.compress(tokens)
        wanted = answer(llama, cache.copy(), tokens, mask, 9)
        for each in (cache.copy(), cache.fixed(12)):
            with pytest.raises(ValueError, match="batch_select_indices was given no row; expected at least one"):
                each.batch_select_indices(nothing)
            assert_same(wanted, answer(llama, each, tokens, mask, 9))


@pytest.mark.parametrize("size", [1, 40], ids=["logits near 0", "logits to hundreds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 3, 37, 64), (8, 8, 4, 512, 128), (1, 2, 1, 33, 80), (2, 2, 4, 64, 256)])
@pytest.mark.parametrize("device", DEVICES)
def test_attention_of_one_token_is_that_with_repeated_keys(device, shape, dtype, size):
    n_row, n_head, n_group, n_slot, n_dim = shape
    make = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(n_row, n, m, n_dim, generator=make).to(device)
        for n, m in ((n_head * n_group, 1), (n_head, n_slot), (n_head, n_slot))
    )
    query, key, value = (
        (size * query).to(dtype),
        (size * key).to(dtype),
        value.to(dtype),
    )  # products beyond float16 before they are scaled
    scaling = n_dim**-0.5 / size
    visible = (torch.rand(n_row, n_head, 1, n_slot, generator=make) < 0.7).to(device)
    visible[..., -1] = True
    bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
    for mask in (visible, visible[:, :1], bias, bias[:, :1], None):
        whole = [x.double().repeat_interleave(n_group, 1) for x in (key, value)]
        logits = query.double() @ whole[0].transpose(-1, -2) * scaling
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask == 0
            logits = logits.masked_fill(~seen.expand(-1, n_head, -1, -1).repeat_interleave(n_group, 1), -torch.inf)
        wanted = (logits.softmax(-1) @ whole[1]).transpose(1, 2)
        out, _ = one_token.attend(query, key, value, mask, scaling)
        assert out.shape == wanted.shape and out.dtype == dtype
        # Logits to hundreds are rounded to 2 ** -16 in float32; the results of the others have 8 or 11 bits.
        rounding = {torch.float32: 5e-6 * size, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert (out.double() - wanted).abs().max() <= rounding


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_answers_as_the_cache_does(llama, way):
    tokens, mask = prompt("left")
    with kvp.wrap(llama, "h2o", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens, mask)
        wanted = answer(llama, cache.copy(), tokens, mask)
        fixed = cache.fixed(43)
        assert_same(wanted, answer(llama, way(fixed), tokens, mask))
    if way is not copy.copy:  # which shares the memory
        assert fixed.n_free == 43 and fixed.graph is None


def test_a_call_that_is_refused_changes_nothing(llama):
    tokens, mask = prompt("left")
    other = mask.clone()
    other[0, 2:8] = 0
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens, mask)
        wanted, fixed = answer(llama, cache.copy(), tokens, mask), cache.fixed(42)
        for call, message in (
            (lambda: answer(llama, fixed, tokens, other), "attention_mask hides other tokens of the prompt"),
            (
                lambda: llama(ids(3, 50).to(llama.device), past_key_values=fixed),
                "50 new tokens were given to a fixed cache with room for 42",
            ),
            (lambda: type(cache).join([fixed, fixed]), "a fixed cache was to be joined"),
        ):
            with torch.no_grad(), pytest.raises(ValueError, match=message):
                call()
            assert fixed.n_free == 42
        assert_same(wanted, answer(llama, fixed, tokens, mask))


def test_a_fixed_cache_says_how_its_steps_are_run(llama):
    tokens, mask = prompt(None)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens)
        assert "room for 43 of 43 more; steps are run by Python: none came yet" in repr(cache.fixed(43))
        for fixed, on_cpu in (
            (cache.fixed(43), "it has no token ids on a GPU"),
            (cache.fixed(43, use_graph=False), "use_graph is False"),
        ):
            answer(llama, fixed, tokens, mask)
            by_python = llama.device.type == "cpu" or not fixed.use_graph
            assert (
                "room for 1 of 43 more; "
                f"{f'steps are run by Python: {on_cpu}' if by_python else 'a step is a CUDA graph'}>" in repr(fixed)
            )


def test_what_a_fixed_cache_refuses(llama):
    tokens, mask = prompt("left")
    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens, mask)
        for n in (0, -1, 1.0, True, None):
            with pytest.raises(ValueError, match=r"max_new_tokens is .*; expected a whole number, at least 1"):
                cache.fixed(n)
        with pytest.raises(ValueError, match="the cache is empty"):
            handle.new_cache().fixed(4)
        with pytest.raises(ValueError, match="1 new token was given to a fixed cache with room for 0 of 41"):
            answer(llama, cache.fixed(41), tokens, mask)
        other = mask.clone()
        other[0, 2:8] = 0
        with pytest.raises(ValueError, match="attention_mask hides other tokens of the prompt than its prefill did"):
            answer(llama, cache.fixed(43), tokens, other)
        for call, name in (
            (lambda x: x.save("/nowhere"), "save"),
            (lambda x: x.reset(), "reset"),
            (lambda x: x.fixed(3), "fixed"),
        ):
            with pytest.raises(ValueError, match=f"{name} was called on a"):
                call(cache.fixed(3))
        with pytest.raises(ValueError, match="crop was called on a layer"):
            cache.fixed(3).layers[0].crop(-1)
        answer(llama, cache, tokens, mask, 4)
        with pytest.raises(ValueError, match="has seen tokens after its prompt"):
            cache.fixed(3)
    with pytest.raises(kvp.NotInterceptedError, match="not wrapped"):
        llama(tokens[:, :1].to(llama.device), past_key_values=FixedCache(handle_cache(llama, tokens), 4, True))
    sliding = build("gemma3_text").to(llama.device)
    with (
        kvp.wrap(sliding, "knorm", compression_ratio=0.5) as handle,
        pytest.raises(ValueError, match=r"layers \[0.*are not compressed"),
    ):
        handle.compress(tokens).fixed(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0, 2])),
    ],
    ids=["crop", "repeat", "select", "reorder"],
)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_what_came_after_a_prompt_is_not_forgotten_when_rows_or_tokens_go(llama, change, ratio):
    """Else it would be taken for padding, and hidden."""
    tokens, _ = prompt(None)
    with kvp.wrap(llama, "knorm", compression_ratio=ratio) as handle, torch.no_grad():
        cache = handle.compress(tokens)
        llama(ids(3, 5).to(llama.device), past_key_values=cache)
        change(cache)
        with pytest.raises(ValueError, match="has seen tokens after its prompt"):
            cache.fixed(3)


def test_a_prompt_in_chunks_whose_last_one_stays_whole_is_a_prompt(llama):
    tokens, mask = prompt(None)
    spans = {"first": (0, 18), "last": (18, N_PROMPT)}
    with kvp.wrap(llama, "snapkv", budget=12, fair=kvp.Fair(weights={"last": 1e3})) as handle:
        cache = handle.compress(tokens, spans=spans, prefill_chunk_size=[18, 6])
        assert cache.report()["spans"]["last"] == 1, "the last chunk was cut, so this says nothing"
        assert_same(answer(llama, cache.fixed(43), tokens, mask), answer(llama, cache, tokens, mask))


def handle_cache(model, tokens):
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        return handle.compress(tokens)


def change_in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)


def replace_weight(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(-linear.weight.detach().clone())


def replace_module(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False, device=model.device)


def add_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: -out)


def change_attention(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [change_in_place, replace_weight, replace_module, add_hook, change_attention])
@pytest.mark.parametrize("device", DEVICES)
def test_between_two_answers_a_model_may_change(device, change):
    """What was captured is not replayed for a model that no longer does it: the second answer is the growing cache's,
    too."""
    model, (tokens, mask) = build("llama").to(device), prompt("left")
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        growing = handle.compress(tokens, mask)
        fixed = growing.fixed(90)
        first = [answer(model, cache, tokens, mask, 10)[0] for cache in (growing, fixed)]
        assert torch.equal(*first)
        change(model)
        asked = torch.cat([tokens.to(device), ids(3, 3, seed=5).to(device), first[0]], 1)
        longer = torch.cat([mask, torch.ones(3, 13, dtype=torch.long)], 1)
        assert_same(*(answer(model, cache, asked.cpu(), longer, 20) for cache in (growing, fixed)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_is_not_captured_runs_all_the_same():
    """Hooks are called; another attention function is captured anew; use_graph=False never captures."""
    model, (tokens, mask) = build("llama").cuda(), prompt(None)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache, called = handle.compress(tokens), []
        wanted = answer(model, copy.deepcopy(cache), tokens, mask)
        plain = cache.fixed(43, use_graph=False)
        assert_same(wanted, answer(model, plain, tokens, mask))
        assert plain.graph is None
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: called.append(1))
        hooked = cache.fixed(43)
        assert_same(wanted, answer(model, hooked, tokens, mask))
        hook.remove()
        assert len(called) == 40 and hooked.graph is None
