"""A replayed step gives what the decoder gives, on every release of transformers: by a stand-in for CUDA's graphs that
runs the captured call again, since what Python does around a replay depends on no GPU."""

import contextlib
import functools

import pytest
import torch
from model_sweep import build, not_refused, why_not_built
from test_stepping import answer, everywhere, prompt
from tiny_models import ids

import kvpitfalls as kvp
from kvpitfalls.hf import fixed, step_graph
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.threads import local

__all__ = ["everywhere"]  # a fixture

FAMILIES = not_refused("llama", "gpt2", "gemma3_text", "gemma2", "lfm2", "mixtral", "opt")
if why_not_built("mllama") is None:
    FAMILIES += not_refused("mllama")  # whose decoder gives logits, not states
SETTINGS = [
    ("snapkv", {"compression_ratio": 0.5}),
    ("knorm", {"compression_ratio": 0.5}),
    ("tova", {"budget": 9, "when": "always"}),
]


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None:
        self.run()


def memory_of(cache) -> list[torch.Tensor]:
    """All that a step writes."""
    parts = [*cache.layers, *cache.rooms, *(room.judge for room in cache.rooms if hasattr(room, "judge"))]
    fields = [x for part in parts for x in vars(part).values()]
    fields += [x for field in fields if isinstance(field, dict) for x in field.values()]
    return [x for x in fields if isinstance(x, torch.Tensor)]


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """How many steps were replayed. What a capture computes is undone, since it computes nothing."""
    count: list[int] = []
    init = step_graph.StepGraph.__init__

    def captured(graph, decoder, forward, cache, record):
        memory = memory_of(cache)
        before = [x.clone() for x in memory]
        given: dict = {}

        def noted(**arguments):
            given.update(arguments)
            return forward(**arguments)

        init(graph, decoder, noted, cache, record)
        for x, old in zip(memory, before, strict=True):
            x.copy_(old)

        def run():
            outer, seen = local.forward, cache.n_seen  # none is running when a step begins ahead
            local.forward = of_call = record if outer is None else outer
            newest, of_call.newest = of_call.newest, graph.newest
            for name, x in forward(**given).items():
                if isinstance(x, torch.Tensor):
                    graph._output[name].copy_(x)
            of_call.newest, local.forward = newest, outer
            for layer in cache.fixed_layers:
                layer.seen = seen
            count.append(1)

        graph._graph.run = run

    monkeypatch.setattr(step_graph.StepGraph, "__init__", captured)
    monkeypatch.setattr(step_graph, "_captured", lambda graph, device: contextlib.nullcontext())
    monkeypatch.setattr(step_graph, "_beside", lambda device: contextlib.nullcontext())
    for name in ("_wait_for_steps", "_finish_steps"):
        monkeypatch.setattr(step_graph, name, lambda device: None)
    monkeypatch.setattr(fixed, "why_not_this", step_graph.why_not_arguments)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return count


@functools.cache
def model_of(family: str):
    return build(family)


@pytest.mark.parametrize(("policy", "settings"), SETTINGS, ids=[policy for policy, _ in SETTINGS])
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_generate(family, policy, settings, replays):
    model, both = model_of(family), []
    for use_graph in (True, False):
        with kvp.wrap(model, policy, use_graph=use_graph, **settings):
            both.append(answer(model, *prompt("left"), max_new_tokens=24, min_new_tokens=24))
        both[-1] = both[-1][:2]
    assert torch.equal(both[0][0], both[1][0]) and (both[0][1] - both[1][1]).abs().max() <= 1e-5
    held = "when" in settings and model.config._attn_implementation != "sdpa"
    assert bool(replays) != held  # an eager step under a held budget is the growing cache's


@pytest.mark.parametrize("family", not_refused("llama", "gpt2"))
def test_of_a_cache_that_is_fixed(family, replays):
    """What the model returns is of the kind, and has the fields, that it has without a graph."""
    model, outputs = model_of(family), []
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle, torch.no_grad():
        kept = handle.compress(ids(2, 12))
        for use_graph in (True, False):
            cache = kept.fixed(8, use_graph=use_graph)
            for place in range(4):
                given = {"position_ids": torch.full((2, 1), 12 + place), **cache_argument(model, cache)}
                outputs.append(model(ids(2, 1, seed=place), **given))
    assert len(replays) == 3
    for one, other in zip(outputs[:4], outputs[4:], strict=True):
        assert type(one) is type(other) and list(one.keys()) == list(other.keys())
        assert (one.logits - other.logits).abs().max() <= 1e-5
