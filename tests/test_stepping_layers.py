"""Steps of ``generate`` at a fixed size where layers differ: windows, states, layers without a cache, experts.

On a CPU no step is captured, and the exchange of the layers is the same; on a GPU the same tests run with CUDA graphs.
"""

import contextlib
import copy
import functools
import types
import warnings

import pytest
import torch
import transformers
from model_sweep import TYPES, build, not_refused, why_not_built
from test_fixed import DEVICES
from test_held_fixed import live_positions
from test_stepping import answer, everywhere, taken, with_question
from tiny_models import ids

import kvpitfalls as kvp
from kvpitfalls.hf import step_graph, stepping
from kvpitfalls.hf.arguments import cache_argument

__all__ = ["everywhere", "taken"]  # fixtures

WINDOWS = not_refused("gemma3_text", "cohere2", "olmo3", "exaone4", "gemma2", "gpt_oss")
STATES = not_refused("qwen3_next", "lfm2", "granitemoehybrid", "nemotron_h")
# transformers 4 asks a GPU which experts are hit, and loops over them, which no capture takes
OTHERS = not_refused("gemma4_text") + ["mixtral"] * (transformers.__version__ >= "5")
WINDOW = 8  # of all these types
SHORT = {"max_new_tokens": 24, "min_new_tokens": 24}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@functools.cache
def model_on(device: str, family: str):
    """One model for all tests, since building one takes longer than to use it."""
    return build(family).to(device)


def prompt(padding: str | None, n_token: int):
    tokens, mask = ids(2, n_token), torch.ones(2, n_token, dtype=torch.long)
    if padding is not None:
        mask[0, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    return tokens, mask


def same(one, other) -> bool:
    """Whether fields are equal, tensors to 1e-5."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        is_close = one.shape == other.shape and one.dtype == other.dtype
        return is_close and (one.numel() == 0 or bool((one.double() - other.double()).abs().max() <= 1e-5))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


def assert_alike(one, other) -> None:
    """Tokens, logits and what each layer says and holds."""
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() <= 1e-5
    mine, theirs = one[2], other[2]
    assert type(mine) is type(theirs) is kvp.KeptCache
    assert mine.report() == theirs.report() and repr(mine) == repr(theirs)
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys()
        for name, x in vars(a).items():
            assert name == "spare" or same(x, vars(b)[name]), (type(a).__name__, name)


ROWS = [(None, 5), ("left", 5), (None, WINDOW - 1), ("left", WINDOW), (None, 30), ("left", 30), ("right", 12)]
# The window fills meanwhile, with the first step, and before. Linear attention goes on from no padding on the right.
ANSWERS = [
    (family, *row) for family in WINDOWS + STATES + OTHERS for row in ROWS if row[0] != "right" or family not in STATES
]


@pytest.mark.parametrize("family, padding, n_token", ANSWERS)
def test_an_answer_and_its_cache_are_those_of_a_growing_one(device, family, padding, n_token, taken):
    model, both = model_on(device, family), []
    for use_graph in (True, False):
        with kvp.wrap(model, "knorm", compression_ratio=0.5, use_graph=use_graph):
            both.append(answer(model, *prompt(padding, n_token), **SHORT))
    assert_alike(*both)
    assert taken


@pytest.mark.parametrize("policy", ["streaming_llm", "tova", "h2o"])
@pytest.mark.parametrize("family", WINDOWS[:1] + STATES[:1])
def test_a_budget_is_held_beside_them(device, family, policy, taken):
    model, both = model_on(device, family), []
    for use_graph in (True, False):
        with kvp.wrap(model, policy, budget=7, when="always", use_graph=use_graph):
            both.append(answer(model, *prompt("left", 12), **SHORT))
    assert torch.equal(both[0][0], both[1][0]) and (both[0][1] - both[1][1]).abs().max() <= 1e-5
    assert torch.equal(live_positions(both[0][2]), live_positions(both[1][2]))
    assert taken


@pytest.mark.parametrize("family", WINDOWS[:2] + STATES[:2])
def test_later_turns_and_copies_go_on(device, family, taken):
    model, both = model_on(device, family), []
    tokens, mask = prompt("left", 20)
    for use_graph in (True, False):
        with kvp.wrap(model, "snapkv", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache = handle.compress(tokens, mask)
            told, _, _ = answer(model, *with_question(tokens, mask, False), cache, **SHORT)
            told = told[:, : cache.n_seen]
            more = torch.cat([mask, torch.ones(2, told.shape[1] - mask.shape[1] + 1, dtype=mask.dtype)], 1)
            again = torch.cat([told, ids(2, 1, seed=9).to(device)], 1)
            both.append(answer(model, again, more, cache.copy(), **SHORT))
    assert_alike(*both)
    assert taken


@pytest.mark.parametrize("n_step", [3, 9, 20])
@pytest.mark.parametrize("family", WINDOWS[:1] + STATES[:1])
def test_whoever_interrupts_or_changes_rows_finds_the_growing_cache(device, family, n_step, taken):
    model, tokens, mask = model_on(device, family), *prompt("left", 12)
    order, both = torch.tensor([1, 0]), []
    for use_graph in (True, False):
        with kvp.wrap(model, "knorm", compression_ratio=0.5, use_graph=use_graph) as handle:
            broken, moved = handle.compress(tokens, mask), handle.compress(tokens, mask)
            asked = with_question(tokens, mask, False)

            def stop(n):
                if n == n_step:
                    raise KeyboardInterrupt

            def move(n, cache=moved):
                twin = copy.deepcopy(cache)
                assert twin.n_seen == cache.n_seen
                if n == n_step:
                    cache.batch_select_indices(order)

            with pytest.raises(KeyboardInterrupt):
                answer(model, *asked, broken, stop, **SHORT)
            shown = torch.nn.functional.pad(mask, (0, broken.n_seen + 1 - mask.shape[1]), value=1).to(device)
            given = {"attention_mask": shown, **cache_argument(model, broken)}
            with torch.no_grad():
                logits = model(ids(2, 1, seed=4).to(device), **given).logits
            both.append((logits, answer(model, *asked, moved, move, **SHORT), broken))
    assert (both[0][0] - both[1][0]).abs().max() <= 1e-5
    assert_alike(both[0][1], both[1][1])
    assert both[0][2].report() == both[1][2].report()
    assert taken


@pytest.mark.parametrize("family", not_refused("llama4_text"))
def test_attention_to_chunks_is_no_window(device, family, taken):
    """transformers holds both in layers of one class; a chunk begins anew where a window would go on."""
    model, both = model_on(device, family), []
    for use_graph in (True, False):
        with kvp.wrap(model, "knorm", compression_ratio=0.5, use_graph=use_graph):
            both.append(answer(model, *prompt(None, 20), **SHORT))
    assert_alike(*both)
    assert not taken


@pytest.mark.parametrize("family", STATES[:1])
@pytest.mark.parametrize("how", ["new memory", "a count"])
def test_states_that_move_are_not_captured_and_stay_what_they_were(family, how, monkeypatch):
    """A replay would write where nobody reads. By stand-ins for torch's capture, which computes nothing."""
    model = build(family)
    monkeypatch.setattr(step_graph, "_captured", lambda graph, device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(*prompt(None, 12))
        stepping.SteppingCache.take(cache, 16, None)
        layer = next(x for x in cache.layers if type(x).__name__ == "LinearAttentionLayer")
        fields = {name: dict(x) if isinstance(x, dict) else x for name, x in vars(layer).items()}

        def forward(**given):
            if how == "new memory":
                layer.conv_states[0] = layer.conv_states[0] * 0
            else:
                layer.n_step = 1
            return {}

        record = types.SimpleNamespace(ids=ids(2, 1), newest=None)
        with pytest.raises(step_graph.NotCapturedError, match="LinearAttentionLayer other memory, or counts there"):
            step_graph.StepGraph(model.model, forward, cache, record)
        assert vars(layer).keys() == fields.keys() and layer.conv_states[0] is fields["conv_states"][0]
        cache.give_back()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_on_a_gpu(model_type):
    """Whether its steps are captured or, which is said, cannot be."""
    if (reason := why_not_built(model_type)) is not None:
        pytest.skip(f"not built: {reason}")
    model, both = build(model_type), []
    try:
        with kvp.wrap(model, "knorm", compression_ratio=0.5) as handle:
            handle.compress(ids(1, 30))
    except kvp.UnsupportedModelError as error:  # which types are is what test_models.py and docs/models.md say
        pytest.skip(f"refused: {error}")
    model = model.to("cuda")
    for use_graph in (True, False):
        with kvp.wrap(model, "knorm", compression_ratio=0.5, use_graph=use_graph), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* cannot be captured as a CUDA graph")
            both.append(answer(model, *prompt("left", 30), **SHORT)[:2])
    # 1e-5 of the largest: logits reach 12 (MiniCPM 3), where those of the types above are below 3
    assert torch.equal(both[0][0], both[1][0]) and (both[0][1] - both[1][1]).abs().max() <= 1e-4
