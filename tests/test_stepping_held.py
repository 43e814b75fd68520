"""Steps of ``generate`` at a fixed size whose budget is held: what they leave is what a growing cache would hold.

On a CPU no step is captured, and the exchange of the layers is the same; on a GPU the same tests run with CUDA graphs.
"""

import copy

import pytest
import torch
from test_fixed import DEVICES
from test_held_fixed import POLICIES, each_policy, live_positions
from test_stepping import answer, everywhere, taken, with_question
from tiny_models import build, ids
from tiny_policies import HELD

import kvpitfalls as kvp

__all__ = ["everywhere", "taken"]  # fixtures

N_PROMPT = 14


@pytest.fixture(scope="module", params=DEVICES)
def llama(request):
    return build("llama").to(request.param)


def prompt(padding: str | None):
    tokens, mask = ids(3, N_PROMPT), torch.ones(3, N_PROMPT, dtype=torch.long)
    if padding == "left":
        mask[0, :4] = mask[2, :1] = 0
    return tokens, mask


def assert_alike(one, other) -> None:
    """Tokens, logits, and what each layer holds and remembers."""
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() <= 1e-5
    mine, theirs = one[2], other[2]
    assert type(mine) is type(theirs) is kvp.KeptCache
    facts, wanted = mine.report(), theirs.report()
    assert facts["peak_bytes"] >= wanted["peak_bytes"]  # slots of a fixed number are a few more
    assert facts["n_tokens"] == wanted["n_tokens"] and facts["kept_share"] == wanted["kept_share"]
    assert [x["kept"] for x in facts["layers"]] == [x["kept"] for x in wanted["layers"]]
    assert torch.equal(live_positions(mine), live_positions(theirs))
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys() and a.seen == b.seen
        assert (a.held.absent is None) == (b.held.absent is None)
        for row in range(len(a.keys)):
            for x, y in ((of_row(a, x, row), of_row(b, y, row)) for x, y in zip(rows_of(a), rows_of(b), strict=True)):
                close = 1e-5 if x.ndim == 3 else 1e-4  # what is carried is a sum over all queries so far
                assert x.shape == y.shape and (x - y).abs().max() <= close


def rows_of(layer) -> list[torch.Tensor]:
    """What it holds of each slot."""
    return [layer.keys, layer.values] + ([] if layer.held.carried is None else [layer.held.carried])


def of_row(layer, x: torch.Tensor, row: int) -> torch.Tensor:
    """Without the empty slots, which stand first."""
    return x[row, :, int(layer.held.front[row]) :]


@each_policy
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("protect", [None, [6, 9]])
@pytest.mark.parametrize("budget", [5, 13, 30, 200])  # of prompts of 14: the last is never full
def test_an_answer_and_its_cache_are_those_of_a_growing_one(llama, policy, padding, protect, budget, taken):
    both = []
    for use_graph in (True, False):
        with kvp.wrap(llama, policy, budget=budget, when="always", protect=protect, use_graph=use_graph):
            both.append(answer(llama, *prompt(padding)))
    assert_alike(*both)
    assert len(taken) > 1  # and each time goes on from what was held


@each_policy
def test_later_turns_go_on(llama, policy, taken):
    """A padded question, which leaves holes, and one after an answer that was at a fixed size."""
    tokens, mask = prompt("left")
    both = []
    for use_graph in (True, False):
        with kvp.wrap(llama, policy, budget=9, when="always", use_graph=use_graph) as handle:
            cache = handle.compress(tokens, mask)
            asked, shown = with_question(tokens, mask, True)
            told, _, _ = answer(llama, asked, shown, cache)
            more = torch.cat([shown, torch.ones(3, told.shape[1] - shown.shape[1] + 3, dtype=mask.dtype)], 1)
            again = torch.cat([told, ids(3, 3, seed=9).to(told.device)], 1)
            both.append(answer(llama, again, more, cache.copy()))
    assert_alike(*both)
    assert taken


@each_policy
@pytest.mark.parametrize("n_step", [3, 9, 20])
def test_whoever_interrupts_or_changes_rows_finds_the_growing_cache(llama, policy, n_step, taken):
    tokens, mask = prompt("left")
    order, both = torch.tensor([2, 0, 1]), []
    for use_graph in (True, False):
        with kvp.wrap(llama, policy, budget=9, when="always", use_graph=use_graph) as handle:
            broken, moved = handle.compress(tokens, mask), handle.compress(tokens, mask)

            def stop(n):
                if n == n_step:
                    raise KeyboardInterrupt

            def move(n, cache=moved):
                twin = copy.deepcopy(cache)
                assert torch.equal(twin.layers[1].pos.sort().values, cache.layers[1].pos.sort().values)
                if n == n_step:
                    cache.batch_select_indices(order)

            asked = with_question(tokens, mask, False)
            with pytest.raises(KeyboardInterrupt):
                answer(llama, *asked, broken, stop)
            both.append((broken, answer(llama, *asked, moved, move)))
    assert_alike(both[0][1], both[1][1])
    assert torch.equal(*(live_positions(cache) for cache, _ in both))
    assert taken


@pytest.mark.parametrize("policy", [policy for policy in HELD if type(policy) not in set(map(type, POLICIES))], ids=str)
def test_policies_that_nobody_judges_by_at_a_fixed_size_grow(llama, policy, taken):
    with kvp.wrap(llama, policy, budget=12, when="always"):
        answer(llama, *prompt(None))
    for settings in ({"fair": True}, {"when": "decode"}):
        with kvp.wrap(llama, "tova", **{"budget": 12, "when": "always"} | settings) as handle:
            cache = handle.compress(*prompt(None), [{"first": (2, 6)}] * 3)
            answer(llama, *with_question(*prompt(None), False), cache)
    assert not taken
