"""A held budget on a cache of fixed size: it keeps what the growing cache keeps, token by token, and answers alike.

On a GPU the same tests run with captured steps.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fixed import DEVICES, answer, assert_same
from tiny_models import build, feed, ids
from tiny_policies import HELD

import kvpitfalls as kvp
from kvpitfalls.hf.forward import AttentionCall
from kvpitfalls.hf.held_room import attention_weights

POLICIES = [kvp.StreamingLLM(n_sink=2), kvp.TOVA(), kvp.H2O()]
N_PROMPT = 14
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


@pytest.fixture(scope="module", params=DEVICES)
def llama(request):
    return build("llama").to(request.param)


def live_positions(cache):
    """What every layer, row and head holds, ascending, -1 first where it holds less than another."""
    out = []
    for layer in cache.kept_layers:
        slots, pos, live = torch.arange(layer.keys.shape[2], device=layer.keys.device), layer.pos, layer.live
        if pos is None:
            pos = slots.expand(layer.keys.shape[:3])
        if live is None:  # of a growing layer, whose empty slots stand first
            live = (slots >= layer.held.front.to(slots.device)[:, None, None]).expand(pos.shape)
        n_most = int(live.sum(-1).max())
        out.append(pos.masked_fill(~live, -1).sort(-1).values[..., -n_most:].cpu())
    return torch.stack(out)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@each_policy
def test_every_step_keeps_what_the_growing_cache_keeps(llama, policy, data):
    """Drawn rows, padding before the prompt and of new tokens, protected tokens, budgets, and tokens at once."""
    n_row = data.draw(st.integers(1, 3))
    chunks = data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 5]), min_size=1, max_size=14))
    mask = torch.ones(n_row, N_PROMPT + sum(chunks), dtype=torch.long)
    for row in range(n_row):
        mask[row, : data.draw(st.integers(0, 5))] = 0
        for place in data.draw(st.lists(st.integers(N_PROMPT, mask.shape[1] - 1), max_size=4)):
            mask[row, place] = 0
    protect = data.draw(st.sampled_from([None, [6], [7, 9, 13], "boundary"]))
    budget = data.draw(st.integers(5, 30))
    tokens = ids(n_row, mask.shape[1], seed=data.draw(st.integers(0, 9))).to(llama.device)
    seen = mask.to(llama.device)
    with torch.no_grad(), kvp.wrap(llama, policy, budget=budget, protect=protect, when="always") as handle:
        growing = handle.compress(tokens[:, :N_PROMPT], seen[:, :N_PROMPT])
        fixed, start = growing.fixed(sum(chunks)), N_PROMPT
        shielded = growing.kept_layers[0].held.layout.mask
        for n in [0, *chunks]:
            if n:
                a, b = (feed(llama, tokens[:, : start + n], [n], x, seen, start) for x in (growing, fixed))
                is_real = seen[:, start : start + n].bool()
                torch.testing.assert_close(b[is_real], a[is_real], rtol=0, atol=1e-5)
            start += n
            assert torch.equal(live_positions(growing), live_positions(fixed)), start
            assert int(fixed.kept_layers[0].live.sum(-1).max()) <= budget
            for row, of_row in enumerate([] if shielded is None else shielded):
                for position in of_row.nonzero()[0]:
                    assert all((layer.pos[row] == position).any(-1).all() for layer in fixed.kept_layers)
        assert fixed.report()["kept_share"] == growing.report()["kept_share"]


@pytest.mark.parametrize("n_sink", range(8, 16))
def test_sinks_may_come_after_the_prompt(llama, n_sink):
    """Fewer tokens than sinks at first; then the budget is above, at or below the sinks."""
    tokens = ids(2, 24).to(llama.device)
    with torch.no_grad(), kvp.wrap(llama, kvp.StreamingLLM(n_sink), budget=13, when="always") as handle:
        growing = handle.compress(tokens[:, :9])
        fixed = growing.fixed(15)
        for start in range(9, 24):
            for cache in (growing, fixed):
                feed(llama, tokens, [1], cache, start=start)
            assert torch.equal(live_positions(growing), live_positions(fixed))


@each_policy
@pytest.mark.parametrize("family, implementation", [("qwen3", "eager"), ("gpt_neox", "sdpa"), ("llama", "eager")])
@pytest.mark.parametrize("device", DEVICES)
def test_answers_are_those_of_the_growing_cache(device, family, implementation, policy):
    """Greedy, from a padded batch, over many times the budget; then once more, from a copy and from a pickle."""
    model, tokens = build(family, implementation).to(device), ids(3, N_PROMPT)
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, :1] = 0
    with kvp.wrap(model, policy, budget=8, protect="sinks", when="always") as handle:
        growing = handle.compress(tokens, mask)
        fixed = growing.fixed(40)
        twins = [copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))]
        wanted = answer(model, growing, tokens, mask, 30)
        for each in (fixed, *twins):
            assert_same(wanted, answer(model, each, tokens, mask, 30))
            assert torch.equal(live_positions(growing), live_positions(each))
    assert (fixed.graph is not None) == (device == "cuda")


@each_policy
def test_no_step_takes_other_memory(llama, policy):
    """A captured step writes where it wrote, whatever came between, and its slots are one more than the budget at
    most."""
    tokens = ids(2, 60).to(llama.device)
    with torch.no_grad(), kvp.wrap(llama, policy, budget=9, when="always") as handle:
        fixed = handle.compress(tokens[:, :N_PROMPT]).fixed(46)
        before = _memory(fixed)
        feed(llama, tokens, [3, *[1] * 20, 5, *[1] * 18], fixed, start=N_PROMPT)
        assert _memory(fixed) == before and len(before) > 8
        assert {layer.keys.shape[2] for layer in fixed.layers} == {16}
    with kvp.wrap(llama, policy, budget=500, when="always") as handle:
        assert {layer.keys.shape[2] for layer in handle.compress(tokens[:, :N_PROMPT]).fixed(4).layers} == {32}


def _memory(cache):
    """Where its tensors are."""
    holders = [*cache.layers, *cache.rooms, *[room.judge for room in cache.rooms]]
    return [x.data_ptr() for each in holders for x in vars(each).values() if isinstance(x, torch.Tensor)]


def test_padding_that_is_no_number_is_not_remembered(llama):
    """Of a row without a token in a step, whose own query and key are NaN."""
    tokens = ids(2, 24).to(llama.device)
    mask = torch.ones_like(tokens)
    mask[0, N_PROMPT + 2] = 0
    is_padding = (mask == 0)[..., None]
    with torch.no_grad(), kvp.wrap(llama, "h2o", budget=9, when="always") as handle:
        fixed = handle.compress(tokens[:, :N_PROMPT]).fixed(10)
        growing, start = handle.compress(tokens[:, :N_PROMPT]), N_PROMPT
        for _ in range(10):
            feed(llama, tokens, [1], growing, mask, start)
            hooks = [
                part.register_forward_hook(
                    lambda _, given, out, at=start: out.masked_fill(is_padding[:, at : at + 1], torch.nan)
                )
                for layer in llama.model.layers
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
            ]
            feed(llama, tokens, [1], fixed, mask, start)
            for hook in hooks:
                hook.remove()
            start += 1
            assert torch.equal(live_positions(growing), live_positions(fixed)), start


@each_policy
def test_rows_that_move_go_on_as_they_did(llama, policy):
    """Chosen, repeated, and swapped in place, as beams are."""
    tokens = ids(3, 40).to(llama.device)
    with torch.no_grad(), kvp.wrap(llama, policy, budget=9, protect=[5], when="always") as handle:
        growing = handle.compress(tokens[:, :N_PROMPT])
        fixed, start = growing.fixed(26), N_PROMPT
        feed(llama, tokens, [2, 1, 1, 1], fixed, start=start)
        feed(llama, tokens, [2, 1, 1, 1], growing, start=start)
        for cache in (growing, fixed):
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_repeat_interleave(2)
        tokens, start = tokens[[2, 2, 0, 0]], start + 5
        for order in ([0, 1, 2, 3], [2, 0, 3, 0], [1, 1, 2, 0]):
            for cache in (growing, fixed):
                cache.reorder_cache(torch.tensor(order))
            a, b = (feed(llama, tokens, [1, 1, 2, 1], cache, start=start) for cache in (growing, fixed))
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
            assert torch.equal(live_positions(growing), live_positions(fixed))
            start += 5


def test_what_cannot_be_held_on_a_fixed_cache_is_refused_by_name(llama):
    tokens, served = ids(1).to(llama.device), {type(policy) for policy in POLICIES}
    for policy in HELD:
        with kvp.wrap(llama, policy, budget=9, when="always") as handle:
            cache = handle.compress(tokens)
            if type(policy) in served:
                assert cache.fixed(3).n_free == 3
                continue
            with pytest.raises(ValueError, match=f"policy is '{policy.name}'; a fixed cache .* expects one of 'stream"):
                cache.fixed(3)
    for options, message in (
        ({"when": "decode"}, "when is 'decode'; .* expects 'always'"),
        ({"when": "always", "fair": True}, "fair is True; .* expects False"),
        ({"when": "always", "fair": "floor=2"}, "fair is 'floor=2'; .* expects False"),
    ):
        with kvp.wrap(llama, "h2o", budget=9, **options) as handle, pytest.raises(ValueError, match=message):
            handle.compress(tokens, spans={"a": (1, 5)}).fixed(3)
    with torch.no_grad(), kvp.wrap(llama, "tova", budget=9, when="always") as handle:
        cache = handle.compress(tokens)
        with pytest.raises(ValueError, match="crop was called on a cache that holds its budget"):
            cache.fixed(3).crop(-1)
        with pytest.raises(ValueError, match="2 new tokens were given to a fixed cache with room for 1 of 1"):
            llama(tokens[:, :2], past_key_values=cache.fixed(1))
        llama(tokens[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="has seen tokens after its prompt"):
            cache.fixed(3)
    with kvp.wrap(llama, "tova", budget=9, when="always") as handle:
        cache = handle.compress(tokens)
        cache.kept_layers[1].shared = True  # as of latents
        with pytest.raises(ValueError, match=r"layers \[1\] make one choice for all heads"):
            cache.fixed(3)
    one = torch.zeros(1, 1, 1, 4)
    for more in ({"softcap": 2.0}, {"sinks": torch.zeros(1)}):
        call = AttentionCall(one, one, one, valid=[(0, 1)], **more)
        with pytest.raises(kvp.UnsupportedModelError, match="attention with a softcap or with sinks"):
            attention_weights(call, torch.zeros(1, 1, 1))
