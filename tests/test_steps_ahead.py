"""A captured step may begin before ``generate`` asks for it, and nobody can tell but by the clock: on a CPU by a
stand-in for CUDA's graphs, on a GPU by themselves."""

import copy
import functools
import itertools

import pytest
import torch
import transformers
from model_sweep import build, not_refused
from test_fixed import DEVICES
from test_replayed_steps import replays
from test_stepping import N_NEW, StopAt, answer, assert_alike, everywhere, taken, with_question
from tiny_models import ids
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import kvpitfalls as kvp
from kvpitfalls.hf import step_graph
from kvpitfalls.hf.arguments import cache_argument

__all__ = ["everywhere", "replays", "taken"]  # fixtures
IS_TOLD_AFTER = transformers.__version__ >= "5"  # 4 tells a streamer of a token before a step of it could begin


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    if request.param == "cpu":
        request.getfixturevalue("replays")
    return request.param


@pytest.fixture
def counts(monkeypatch) -> dict[str, int]:
    """How many steps were asked for, had begun by then, and were taken back."""
    n = {"asked": 0, "begun": 0, "foreseen": 0, "taken back": 0}
    graph = step_graph.StepGraph
    call, begin, foreseen, take_back = graph.__call__, graph.begin_next, graph._is_foreseen, graph.take_back

    def noted(name, function, counted):
        def method(self, *given):
            before, out = self.is_ahead, function(self, *given)
            n[name] += bool(counted(self, before, out))
            return out

        return method

    monkeypatch.setattr(graph, "__call__", noted("asked", call, lambda *x: True))
    monkeypatch.setattr(graph, "begin_next", noted("begun", begin, lambda graph, before, out: graph.is_ahead))
    monkeypatch.setattr(graph, "_is_foreseen", noted("foreseen", foreseen, lambda graph, before, out: out))
    monkeypatch.setattr(graph, "take_back", noted("taken back", take_back, lambda graph, before, out: before))
    return n


class Streamer(BaseStreamer):
    """Calls a function with the number of each token; by then the next step has begun, in transformers 5."""

    def __init__(self, function):
        self.function, self.n_call = function, 0

    def put(self, value):
        self.n_call += 1
        self.function(self.n_call)

    def end(self):
        pass


def question(n_row: int = 3, n_token: int = 24, padding: bool = True):
    tokens, mask = ids(n_row, n_token), torch.ones(n_row, n_token, dtype=torch.long)
    mask[0, : 5 * padding] = 0
    return with_question(tokens, mask, False)


def both_ways(model, policy: str = "snapkv", streamer=None, setting=None, **options):
    """Answers with steps as a graph and by Python, each on a cache that ``streamer`` gets too."""
    out = []
    for use_graph in (True, False):
        with kvp.wrap(model, policy, use_graph=use_graph, **(setting or {"compression_ratio": 0.5})) as handle:
            tokens, mask = question()
            cache = handle.compress(tokens[:, :-3], mask[:, :-3])
            watch = {} if streamer is None else {"streamer": Streamer(lambda n, cache=cache: streamer(n, cache))}
            out.append(answer(model, tokens, mask, cache, **watch, **options))
    return out


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("family", not_refused("llama", "gemma3_text", "gemma2", "gpt2"))
def test_a_step_has_begun_when_it_is_asked_for(device, family, do_sample, counts):
    """All but the one that is captured, and the first of each room, which the one before it had no slot for."""
    one, other = both_ways(build(family).to(device), do_sample=do_sample)
    assert_alike_but_windows(one, other)
    n_room = 3
    assert counts["asked"] == N_NEW - 2 - n_room and counts["foreseen"] == counts["asked"] - n_room
    assert counts["begun"] == counts["foreseen"] and not counts["taken back"]


def assert_alike_but_windows(one, other):
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() <= 1e-5
    assert one[2].report() == other[2].report() and repr(one[2]) == repr(other[2])


@pytest.mark.parametrize(
    ("family", "setting"),
    [("llama", {"budget": 9, "when": "always"}), *((x, {"compression_ratio": 0.5}) for x in not_refused("lfm2"))],
)
def test_what_could_not_be_taken_back_does_not_begin_ahead(device, family, setting, counts):
    one, other = both_ways(build(family).to(device), "tova", setting=setting)
    assert torch.equal(one[0], other[0]) and counts["asked"] and not counts["begun"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_answer_that_ends_leaves_no_trace_of_the_step_that_had_begun(device, family, counts):
    """And rows that end before others are given padding, which was foreseen, too."""
    model = build(family).to(device)
    early = StoppingCriteriaList([StopAt(24 + 3 + 21)])
    assert_alike_but_windows(*both_ways(model, stopping_criteria=early))
    assert counts["begun"] == counts["foreseen"] + 1
    told = answer(model, *question())[0][:, 27:]
    ends = [int(row[4 + 3 * i]) for i, row in enumerate(told)]
    one, other = both_ways(model, min_new_tokens=None, eos_token_id=ends, pad_token_id=0)
    n_row_token = one[1].shape[0]
    assert torch.equal(one[0], other[0]) and one[2].report() == other[2].report() and n_row_token > 4
    assert not counts["taken back"]


def test_later_turns_go_on_after_a_step_that_nobody_asked_for(device, taken):
    model, both = build("gemma3_text").to(device), []
    tokens, mask = question(padding=False)
    for use_graph in (True, False):
        with kvp.wrap(model, "knorm", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache = handle.compress(tokens[:, :-3], mask[:, :-3])
            early = StoppingCriteriaList([StopAt(tokens.shape[1] + 9)])
            told, _, _ = answer(model, tokens, mask, cache, stopping_criteria=early)
            again = torch.cat([told, ids(3, 2, seed=9).to(told.device)], 1)
            both.append(answer(model, again, torch.ones_like(again), cache, max_new_tokens=12, min_new_tokens=12))
    assert_alike_but_windows(*both)
    assert taken


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("n", [5, 12, 22])
def test_another_token_than_the_one_that_was_chosen(device, family, n, counts, monkeypatch):
    """As a model's own preparation of inputs may ask for: the step is taken back, and no more begin ahead."""
    model = build(family).to(device)
    prepare, count = model.prepare_inputs_for_generation, itertools.count()

    @functools.wraps(prepare)
    def other_token(*given, **options):
        inputs = prepare(*given, **options)
        if next(count) == n:
            inputs["input_ids"] = (inputs["input_ids"] + 1) % 128
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", other_token)
    one = []
    for use_graph in (True, False):
        count = itertools.count()
        with kvp.wrap(model, "snapkv", compression_ratio=0.5, use_graph=use_graph):
            one.append(answer(model, *question()))
    assert_alike_but_windows(*one)
    assert counts["taken back"] == 1
    plain = answer(model, *question())
    assert not torch.equal(plain[0], one[0][0])


def test_whoever_streams_sees_the_growing_cache(device, taken):
    """Positions, shares, a report, copies that go on and a change of rows: while the next step has begun."""
    model, both = build("llama").to(device), []
    for use_graph in (True, False):
        notes: list = []

        def watch(n, cache, notes=notes):
            if n < 2:
                return  # the prompt's tokens, and the first one
            notes.append((cache.n_seen, cache.positions(1).tolist(), cache.report()["bytes_kept"]))
            if n in (6, 11):
                with torch.no_grad():
                    twin = copy.deepcopy(cache)
                    notes.append(model(ids(3, 1, seed=3).to(device), **cache_argument(model, twin)).logits)
            if n == 15:
                cache.batch_select_indices(torch.tensor([2, 0, 1]))

        tokens, mask = question(padding=False)
        with kvp.wrap(model, "snapkv", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache = handle.compress(tokens[:, :-3], mask[:, :-3])
            streamer = Streamer(lambda n, cache=cache: watch(n, cache))
            both.append((answer(model, tokens, mask, cache, streamer=streamer), notes))
    assert_alike(both[0][0], both[1][0])
    assert taken and len(both[0][1]) > N_NEW
    for mine, theirs in zip(both[0][1], both[1][1], strict=True):
        if isinstance(mine, torch.Tensor):
            assert (mine - theirs).abs().max() <= 1e-5
        else:
            assert mine == theirs


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("n", [4, 9, 30])
def test_an_interrupt_after_a_step_has_begun(device, error, n):
    model, both = build("llama").to(device), []
    tokens, mask = question()
    for use_graph in (True, False):
        with kvp.wrap(model, "snapkv", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache = handle.compress(tokens[:, :-3], mask[:, :-3])

            def stop(m):
                if m == n:
                    raise error

            with pytest.raises(error):
                answer(model, tokens, mask, cache, streamer=Streamer(stop))
            shown = torch.nn.functional.pad(mask, (0, cache.n_seen + 1 - mask.shape[1]), value=1).to(device)
            given = {"attention_mask": shown, **cache_argument(model, cache)}
            with torch.no_grad():
                both.append((model(ids(3, 1, seed=4).to(device), **given).logits, cache))
    assert (both[0][0] - both[1][0]).abs().max() <= 1e-5
    assert both[0][1].report() == both[1][1].report()


class Blunt(LogitsProcessor):
    """Makes scores whose greatest is not the model's."""

    def __call__(self, input_ids, scores):
        return torch.roll(scores, input_ids.shape[1] % 7, -1)


def test_what_chooses_tokens_and_what_stops_are_the_callers(device, counts):
    """Processors, criteria of one's own in a plain list or none, stop strings' kind: foreseen all the same."""
    model, options = build("llama").to(device), {"logits_processor": LogitsProcessorList([Blunt()])}
    for criteria in (StoppingCriteriaList([StopAt(44)]), [StopAt(44)], None):
        given = options if criteria is None else options | {"stopping_criteria": criteria}
        assert_alike(*both_ways(model, **given))
        assert criteria is None or len(criteria) == 1  # the caller's list is as it was
    assert counts["foreseen"] and not counts["taken back"]


@pytest.mark.parametrize("n_more", [0, 20])
def test_on_a_cache_that_is_fixed(device, n_more, counts):
    """Inside ``generate`` alone; what it did not ask for is taken back when it ends, be the room at an end or not."""
    model, out = build("llama").to(device), []
    tokens, mask = question()
    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:
        kept = handle.compress(tokens[:, :-3], mask[:, :-3])
        for use_graph in (True, False):
            cache = kept.fixed(N_NEW + 3 + n_more, use_graph=use_graph)
            early = StoppingCriteriaList([StopAt(tokens.shape[1] + 30)])
            told, logits, _ = answer(model, tokens, mask, cache, stopping_criteria=early)
            before = (cache.n_seen, cache.positions(0).tolist(), cache.layers[0].live.tolist())
            cache.crop(-2)
            again = torch.cat([told[:, : cache.n_seen], ids(3, 1, seed=9).to(told.device)], 1)
            shown = torch.nn.functional.pad(mask, (0, again.shape[1] - mask.shape[1]), value=1)
            n = 3 + n_more  # as many as there is room for: the last of them begins, and nothing behind it
            out.append((told, logits, before, answer(model, again, shown, cache, max_new_tokens=n, min_new_tokens=n)))
            assert cache.n_free == N_NEW + 3 + n_more - (cache.n_seen - kept.n_seen)
    one, other = out
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() <= 1e-5 and one[2] == other[2]
    assert torch.equal(one[3][0], other[3][0]) and (one[3][1] - other[3][1]).abs().max() <= 1e-5
    assert counts["foreseen"] > 20 and counts["taken back"] == 1


def test_a_later_turn_of_several_tokens(device, counts):
    """After it the positions of the last replay are long past."""
    model, out = build("llama").to(device), []
    tokens, mask = question()
    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:
        kept = handle.compress(tokens[:, :-3], mask[:, :-3])
        for use_graph in (True, False):
            cache = kept.fixed(80, use_graph=use_graph)
            told, _, _ = answer(model, tokens, mask, cache, max_new_tokens=20, min_new_tokens=20)
            again = torch.cat([told, ids(3, 4, seed=9).to(told.device)], 1)
            shown = torch.nn.functional.pad(mask, (0, again.shape[1] - mask.shape[1]), value=1)
            before = dict(counts)
            out.append(answer(model, again, shown, cache, max_new_tokens=20, min_new_tokens=20)[:2])
            if use_graph:
                assert counts["foreseen"] - before["foreseen"] >= 17 and not counts["taken back"]
    assert torch.equal(out[0][0], out[1][0]) and (out[0][1] - out[1][1]).abs().max() <= 1e-5


def change_rows(cache):
    cache.batch_select_indices(torch.tensor([2, 0, 1]))


def move_rows(cache):
    cache.reorder_cache(torch.tensor([1, 2, 0]))


def copy_it(cache):
    cache.other = copy.deepcopy(cache)


@pytest.mark.parametrize("change", [change_rows, move_rows, copy_it])
def test_whoever_streams_may_change_a_fixed_cache(device, change, counts):
    model, out = build("llama").to(device), []
    tokens, mask = question(padding=False)
    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:
        kept = handle.compress(tokens[:, :-3])
        for use_graph in (True, False):
            cache = kept.fixed(N_NEW + 3, use_graph=use_graph)
            streamer = Streamer(lambda n, cache=cache: change(cache) if n == 12 else None)
            told, logits, _ = answer(model, tokens, mask, cache, streamer=streamer)
            out.append((told, logits, cache.positions(1), cache.layers[1]))
    assert torch.equal(out[0][0], out[1][0]) and (out[0][1] - out[1][1]).abs().max() <= 1e-5
    assert (out[0][2] == out[1][2]).all() and torch.equal(out[0][3].live, out[1][3].live)
    assert counts["taken back"] == IS_TOLD_AFTER and counts["foreseen"] > 20


@pytest.mark.parametrize("place", ["before the step", "after it", "in a streamer"])
def test_an_interrupt_leaves_a_fixed_cache_that_goes_on(device, place, counts, monkeypatch):
    model, out = build("llama").to(device), []
    tokens, mask = question()
    begin = step_graph.StepGraph._begin

    def broken(graph, *given):
        if graph.is_ahead and counts["foreseen"] == 7:
            if place == "after it":
                begin(graph, *given)
            raise KeyboardInterrupt
        begin(graph, *given)

    def stop(n):
        if n == 12:
            raise KeyboardInterrupt

    with kvp.wrap(model, "snapkv", compression_ratio=0.5) as handle:
        kept = handle.compress(tokens[:, :-3], mask[:, :-3])
        cache = kept.fixed(N_NEW + 3)
        options = {"streamer": Streamer(stop)} if place == "in a streamer" else {}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if not options:
                patch.setattr(step_graph.StepGraph, "_begin", broken)
            answer(model, tokens, mask, cache, **options)
        told = answer(model, tokens, mask, kept.fixed(N_NEW + 3, use_graph=False))[0]
        again = told[:, : cache.n_seen + 1]
        shown = torch.nn.functional.pad(mask, (0, again.shape[1] - mask.shape[1]), value=1)
        for on in (cache, kept.fixed(N_NEW + 3, use_graph=False)):
            out.append(answer(model, again, shown, on, max_new_tokens=6, min_new_tokens=6)[:2])
    assert torch.equal(out[0][0], out[1][0]) and (out[0][1] - out[1][1]).abs().max() <= 1e-5
    assert counts["taken back"] >= (IS_TOLD_AFTER or place != "in a streamer")
