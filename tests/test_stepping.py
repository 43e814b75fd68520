"""A growing cache has a fixed size while ``generate`` runs its steps, and nobody can tell afterwards but by the clock.

On a CPU no step is captured, and the exchange of the layers is the same; on a GPU the same tests run with CUDA graphs.
"""

import contextlib
import copy
import gc
import threading
import warnings

import pytest
import torch
from test_fixed import DEVICES, N_PROMPT, prompt
from tiny_models import build, chunks_of_generate, feed, ids
from tiny_policies import EVERY
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import kvpitfalls as kvp
from kvpitfalls.hf import step_graph, stepping
from kvpitfalls.hf.arguments import cache_argument

N_NEW, SPANS = 40, {"first": (2, 9), "second": (12, 18)}


@pytest.fixture(scope="module", params=DEVICES)
def llama(request):
    return build("llama").to(request.param)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On a CPU, too; and an answer needs several rooms."""
    monkeypatch.setattr(stepping, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(stepping, "ROOM", 16)


@pytest.fixture
def taken(monkeypatch):
    """How often a cache was taken: a test in which it never is would test nothing."""
    count, take = [], stepping.SteppingCache.take.__func__

    def noted(cls, cache, n_room, mask):
        count.append(n_room)
        take(cls, cache, n_room, mask)

    monkeypatch.setattr(stepping.SteppingCache, "take", classmethod(noted))
    return count


class Watch(StoppingCriteria):
    """Calls a function between two steps; stops nothing."""

    def __init__(self, function):
        self.function, self.n_call = function, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.n_call += 1
        self.function(self.n_call)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class StopAt(StoppingCriteria):
    """Ends an answer that could have been longer."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.length, device=input_ids.device)


def answer(model, tokens, mask, cache=None, watch=None, **options):
    """Tokens and logits of an answer; the same draw each time."""
    torch.manual_seed(0)
    given = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False} | options
    given |= {} if cache is None else cache_argument(model, cache)
    given |= {} if watch is None else {"stopping_criteria": StoppingCriteriaList([Watch(watch)])}
    given |= {"attention_mask": mask.to(model.device), "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(tokens.to(model.device), **given)
    return out.sequences, torch.stack(out.logits), out.past_key_values


def with_question(tokens, mask, holes: bool):
    """Three tokens more; with ``holes`` the first row's begin with padding."""
    more = torch.ones(len(tokens), 3, dtype=mask.dtype)
    more[0, : 2 * holes] = 0
    return torch.cat([tokens, ids(len(tokens), 3, seed=5)], 1), torch.cat([mask, more], 1)


def assert_alike(one, other):
    """Tokens, logits, and all that a cache says and holds."""
    assert torch.equal(one[0], other[0])
    assert (one[1] - other[1]).abs().max() <= 1e-5
    mine, theirs = one[2], other[2]
    assert type(mine) is type(theirs) is kvp.KeptCache and mine.report() == theirs.report()
    assert repr(mine) == repr(theirs) and torch.equal(mine.tokens, theirs.tokens)
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert type(a) is type(b) and set(vars(a)) == set(vars(b)) and a.seen == b.seen
        assert a.keys.shape == b.keys.shape and (a.keys - b.keys).abs().max() <= 1e-5
        assert (a.pos is None) == (b.pos is None) and (a.pos is None or torch.equal(a.pos, b.pos))
        assert (a.live is None) == (b.live is None) and (a.live is None or torch.equal(a.live, b.live))


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_an_answer_and_its_cache_are_those_of_a_growing_one(llama, policy, fair, padding, taken):
    tokens, mask = prompt(padding)
    begins = [int(row.nonzero()[0]) for row in mask]
    spans = [{name: (max(a, begin), b) for name, (a, b) in SPANS.items()} for begin in begins]
    asked = with_question(tokens, mask, padding == "left")
    both = []
    for use_graph in (True, False):
        with kvp.wrap(llama, policy, compression_ratio=0.5, fair=fair, use_graph=use_graph) as handle:
            cache = handle.compress(tokens, mask, spans)
            both.append(answer(llama, *asked, cache.copy()))
        assert len(taken) == 3  # 40 tokens, the first two of them not in rooms of 16
    assert_alike(*both)


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"min_new_tokens": None, "max_new_tokens": None, "max_length": N_PROMPT + N_NEW},
        pytest.param({"prefill_chunk_size": 7}, marks=chunks_of_generate),
    ],
    ids=str,
)
def test_a_prompt_without_a_cache_of_ones_own(llama, options, ratio, taken):
    both = []
    for use_graph in (True, False):
        with kvp.wrap(llama, "snapkv", compression_ratio=ratio, use_graph=use_graph) as handle:
            # transformers 4 counts padding in the positions of chunks
            both.append(answer(llama, *prompt(None if "prefill_chunk_size" in options else "left"), **options))
            assert handle.report() == both[-1][2].report()
    assert_alike(*both)
    assert taken


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize("device", DEVICES)
def test_other_families(device, family, taken):
    model, both = build(family).to(device), []
    for use_graph in (True, False):
        with kvp.wrap(model, "knorm", compression_ratio=0.5, use_graph=use_graph):
            both.append(answer(model, *prompt("left")))
    assert_alike(*both)
    assert taken


def test_later_turns_copies_and_crops_go_on(llama, taken):
    tokens, mask = prompt(None)
    for ratio in (0, 0.5):
        caches = []
        for use_graph in (True, False):
            with kvp.wrap(llama, "tova", compression_ratio=ratio, use_graph=use_graph) as handle:
                cache = handle.compress(tokens, mask)
                told, _, _ = answer(llama, *with_question(tokens, mask, False), cache)
                cache.crop(-5)
                again = torch.cat([told[:, : cache.n_seen], ids(3, 4, seed=9).to(told.device)], 1)
                caches.append(answer(llama, again, torch.ones_like(again), cache.copy()))
        assert_alike(*caches)
    assert taken


def test_a_cache_that_comes_back_takes_no_more_memory_than_a_growing_one(llama, monkeypatch, taken):
    """Nor does a copy or a pickle of it."""
    monkeypatch.setattr(stepping, "ROOM", 512)
    sizes = []
    for use_graph in (True, False):
        with kvp.wrap(llama, "knorm", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache = handle.compress(ids(1, N_PROMPT))
            asked = with_question(*prompt(None, 1), False)
            early = StoppingCriteriaList([StopAt(asked[0].shape[1] + 8)])
            answer(llama, *asked, cache, max_new_tokens=400, min_new_tokens=400, stopping_criteria=early)
            sizes.append(max(x.keys.untyped_storage().nbytes() for x in cache.layers))
    assert taken == [398] and sizes[0] <= sizes[1]


@pytest.mark.parametrize("place", ["between", "while the layers are exchanged", "inside a step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_however_a_call_ends_the_cache_grows_again(llama, place, error, monkeypatch, taken):
    """With all rows that it would hold; what was broken off inside a step is refused afterwards, as ever."""
    tokens, mask = prompt("left")
    asked = with_question(tokens, mask, True)
    n_call, last = [], llama.model.layers[-1]

    def stop_at(n):
        n_call.append(1)
        if len(n_call) >= n:  # also where a step that cannot be captured is run again
            raise error

    visible, update = stepping.real_slots, stepping.SteppingLayer.update
    if place == "while the layers are exchanged":
        monkeypatch.setattr(stepping, "real_slots", lambda *given: (stop_at(5), visible(*given))[1])
    if place == "inside a step":
        index = last.self_attn.layer_idx
        monkeypatch.setattr(
            stepping.SteppingLayer,
            "update",
            lambda layer, *given, **options: (
                stop_at(2) if layer.index == index else None,
                update(layer, *given, **options),
            )[1],
        )
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens, mask)
        seen = []

        def watch(n):
            seen.append(cache.n_seen)
            if place == "between" and n == 9:
                raise error

        with pytest.raises(error), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* cannot be captured")  # before it is run again by Python
            answer(llama, *asked, cache, watch)
        assert taken and type(cache) is kvp.KeptCache and all(type(x) is kvp.hf.layer.KeptLayer for x in cache.layers)
        if place == "inside a step":
            with pytest.raises(ValueError, match="was broken off"):
                feed(llama, ids(3, 4), [1], cache)
            return
        assert cache.n_seen == seen[-1] == cache.layers[0].keys.shape[2] - cache.positions(0).shape[2] + N_PROMPT
        monkeypatch.setattr(stepping, "real_slots", visible)
        wanted = handle.compress(tokens, mask)
        answer(llama, *asked, wanted, max_new_tokens=len(seen), min_new_tokens=len(seen))
        n = cache.layers[0].keys.shape[2]
        assert all(
            (a.keys - b.keys[:, :, :n]).abs().max() <= 1e-5 for a, b in zip(cache.layers, wanted.layers, strict=True)
        )


def test_whoever_watches_may_change_the_cache(llama, taken):
    """What it does is done to the growing cache, and the rest of the answer is of that."""
    tokens, mask = prompt("left")
    order, both, n_taken = torch.tensor([2, 0, 1]), [], []
    for use_graph in (True, False):
        with kvp.wrap(llama, "snapkv", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache = handle.compress(tokens, mask)

            def watch(n, cache=cache):
                if n == 6:
                    cache.batch_select_indices(order)
                    assert type(cache) is kvp.KeptCache

            both.append(answer(llama, *with_question(tokens, mask, False), cache, watch))
        n_taken.append(len(taken))
    assert_alike(*both)
    assert n_taken == [1, 1]


def test_whoever_watches_sees_the_growing_cache(llama, taken):
    """Positions, shares, a copy that goes on."""
    tokens, mask = prompt("left")
    both: list[list] = []
    for use_graph in (True, False):
        with kvp.wrap(llama, "snapkv", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache, notes = handle.compress(tokens, mask, [{"second": (12, 18)}] * 3), []

            def watch(n, cache=cache, notes=notes):
                twin = copy.deepcopy(cache)
                notes.append((cache.n_seen, cache.positions(1).tolist(), cache.kept("second", 1).tolist()))
                if n in (3, 7):
                    with torch.no_grad():
                        logits = llama(ids(3, 1, seed=3).to(llama.device), **cache_argument(llama, twin)).logits
                    notes.append(logits.flatten().tolist())
                    assert type(twin) is kvp.KeptCache

            answer(llama, *with_question(tokens, mask, False), cache, watch, max_new_tokens=12, min_new_tokens=12)
            both.append(notes)
    assert taken
    for mine, theirs in zip(*both, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5) if isinstance(mine, list) else mine == theirs


def test_the_model_may_be_run_on_other_caches_meanwhile(llama, taken):
    """As contrastive logits do: only the cache of the call itself is taken."""
    tokens, mask = prompt(None)

    class Other(LogitsProcessor):
        def __init__(self):
            self.cache = None

        def __call__(self, input_ids, scores):
            if self.cache is None:
                self.cache = llama(input_ids, use_cache=True).past_key_values
                return scores
            logits = llama(input_ids[:, -1:], **cache_argument(llama, self.cache)).logits[:, -1]
            assert type(self.cache) is kvp.KeptCache
            return scores - 0.5 * logits

    both = []
    for use_graph in (True, False):
        with kvp.wrap(llama, "snapkv", compression_ratio=0.5, use_graph=use_graph):
            both.append(answer(llama, tokens, mask, logits_processor=LogitsProcessorList([Other()])))
    assert_alike(*both)
    assert len(taken) == 3


def hook(model):
    handle = model.model.layers[0].register_forward_hook(lambda *given: None)
    return handle.remove


def own_forward(model):
    module = model.model.layers[0].mlp
    forward = module.forward
    module.forward = lambda x: forward(x)
    return lambda: vars(module).pop("forward")


def config_asks(model):
    model.config.output_hidden_states = True
    return lambda: setattr(model.config, "output_hidden_states", False)


@pytest.mark.parametrize(
    "why",
    [
        {"use_graph": False},
        {"when": "decode"},
        {"options": {"num_beams": 2}},
        {"options": {"max_new_tokens": 5, "min_new_tokens": 5}},
        {"options": {"output_hidden_states": True}},
        {"change": hook},
        {"change": own_forward},
        {"change": config_asks},
        {"autocast": True},
    ],
    ids=lambda why: " ".join(getattr(x, "__name__", str(x)) for x in next(iter(why.items()))),
)
def test_where_it_would_do_something_else_or_not_pay_a_cache_grows(llama, why, taken):
    settings = {name: why[name] for name in ("use_graph", "when") if name in why}
    policy = "tova"
    undo = why["change"](llama) if "change" in why else None
    try:
        with (
            kvp.wrap(llama, policy, compression_ratio=0.5, **settings),
            torch.autocast(llama.device.type, dtype=torch.bfloat16, enabled="autocast" in why),
        ):
            answer(llama, *prompt(None), **why.get("options", {}))
    finally:
        if undo is not None:
            undo()
    assert not taken
    with kvp.wrap(llama, policy, compression_ratio=0.5):
        answer(llama, *prompt(None))
    assert taken


def test_use_graph_is_true_or_false(llama):
    with pytest.raises(ValueError, match="use_graph is 'no'; expected True or False"):
        kvp.wrap(llama, "knorm", compression_ratio=0.5, use_graph="no")


def test_no_memory_for_rooms_is_said_and_the_cache_grows(llama, monkeypatch, taken):
    room = stepping.SteppingCache._room_for
    n_call = []

    def full(cache, *given):
        n_call.append(1)
        if len(n_call) == 2:
            raise torch.OutOfMemoryError("a full GPU")
        return room(cache, *given)

    monkeypatch.setattr(stepping.SteppingCache, "_room_for", full)
    with kvp.wrap(llama, "knorm", compression_ratio=0.5):
        with pytest.warns(UserWarning, match=r"no room for steps as a CUDA graph \(a full GPU\)"):
            one = answer(llama, *prompt("left"))
        other = answer(llama, *prompt("left"))
    assert_alike(one, other)


def test_threads_with_caches_of_their_own(llama, taken):
    tokens, mask = prompt("left")
    told: dict[int, tuple] = {}
    with kvp.wrap(llama, "snapkv", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens, mask)
        asked = with_question(tokens, mask, False)

        def run(i):
            told[i] = answer(llama, *asked, cache.copy())

        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted = answer(llama, *asked, cache.copy())
    for i in range(3):
        assert_alike(told[i], wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("is_captured", [True, False])
def test_steps_on_a_gpu_are_captured_and_what_cannot_be_is_said(is_captured, monkeypatch):
    """A module that waits for the GPU cannot be captured."""
    model, replays = build("llama").cuda(), []
    graph = stepping.FixedCache.run

    def noted(cache, *given):
        out = graph(cache, *given)
        replays.append(cache.graph is not None)
        return out

    monkeypatch.setattr(stepping.FixedCache, "run", noted)
    if not is_captured:
        kind = type(model.model.layers[0].mlp)
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda mlp, x: forward(mlp, x) * float(x.abs().max() >= 0))
    both = []
    for use_graph in (True, False):
        with kvp.wrap(model, "snapkv", compression_ratio=0.5, use_graph=use_graph):
            if use_graph and not is_captured:
                with pytest.warns(UserWarning, match="cannot be captured"):
                    both.append(answer(model, *prompt("left")))
            else:
                both.append(answer(model, *prompt("left")))
    assert_alike(*both)
    assert replays.count(True) >= (N_NEW // 2 if is_captured else 0) and any(replays) == is_captured


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("collects", [True, False])
def test_a_capture_is_on_the_models_gpu_and_alone_and_leaves_the_collector_as_it_was(monkeypatch, error, collects):
    """By stand-ins for torch's: what breaks a capture off, or makes it hold nothing, seldom shows on a GPU."""
    log: list[tuple] = []

    def noted(name):
        @contextlib.contextmanager
        def block(*given, **options):
            log.append((name, *given, options))
            yield

        return block

    monkeypatch.setattr(torch.cuda, "device", noted("device"))
    monkeypatch.setattr(torch.cuda, "graph", noted("graph"))
    monkeypatch.setattr(step_graph, "_stream", lambda device: f"stream of {device}")
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        raised = contextlib.nullcontext() if error is None else pytest.raises(error)
        with raised, step_graph._captured("a graph", torch.device("cuda:1")):
            assert not gc.isenabled() and step_graph._lock._is_owned()
            if error is not None:
                raise error
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
    assert not step_graph._lock._is_owned()
    options = {"stream": "stream of cuda:1", "capture_error_mode": "thread_local"}
    assert log == [("device", torch.device("cuda:1"), {}), ("graph", "a graph", options)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_steps_of_a_model_on_another_gpu_than_the_current_one():
    model, both = build("llama").to("cuda:1"), []
    for use_graph in (True, False):
        with kvp.wrap(model, "snapkv", compression_ratio=0.5, use_graph=use_graph) as handle:
            cache = handle.compress(*prompt("left"))
            asked = with_question(*prompt("left"), True)
            both.append(answer(model, *asked, cache.copy()))
            both.append(answer(model, *asked, cache.fixed(N_NEW + 3, use_graph=use_graph)))
    assert_alike(both[0], both[2])
    assert torch.equal(both[1][0], both[3][0]) and (both[1][1] - both[3][1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "register",
    [
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_hooks_of_all_modules_are_seen(register):
    decoder = build("llama").model
    assert step_graph.why_not(decoder) is None
    hook = register(lambda *args: None)
    try:
        assert step_graph.why_not(decoder) == "modules have hooks, which a replay would not call"
    finally:
        hook.remove()
    assert step_graph.why_not(decoder) is None
