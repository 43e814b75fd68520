"""Operations on wraps and caches in any order: each is exactly right, by a model that was never wrapped, or refused and
changes nothing."""

import contextlib
import copy
import pickle
import tempfile
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from shadow import Shadow, everything_of, held_sets, plain_model, positions_of
from tiny_policies import EVERY, HELD
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import kvpitfalls as kvp
from kvpitfalls.hf import layer, stepping
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.cache import KeptCache
from kvpitfalls.hf.model import attachment_of
from kvpitfalls.hf.parts import attention_modules
from kvpitfalls.hf.threads import local

REFUSED = (ValueError, kvp.UnsupportedModelError, kvp.NotInterceptedError)
MOST = 100  # tokens of a cache: the models know 128 positions
which = st.integers(0, 3)  # of the caches


class Interrupt(BaseException):
    """What comes from outside, as KeyboardInterrupt does."""


class Watch(LogitsProcessor):
    """Calls a function with ids and logits; changes nothing."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores):
        self.function(input_ids, scores)
        return scores


class Stop(StoppingCriteria):
    """Calls a function between two steps; stops nothing."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores, **kwargs):
        self.function()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@st.composite
def wraps(draw):
    """Settings of a wrap."""
    when = draw(st.sampled_from(["prefill", "prefill", "always", "decode"]))
    of_prefill = when == "prefill"
    return {
        "policy": draw(st.sampled_from(EVERY if of_prefill else HELD)),
        "fair": draw(st.sampled_from([False, False, True, "floor=2", *([0.5] if of_prefill else [])])),
        "protect": draw(st.sampled_from([None, None, "sinks", [5]])),
        "when": when,
        "allocation": draw(st.sampled_from([None, None, "pyramid", "ada"])) if of_prefill else None,
        **draw(st.sampled_from([{"compression_ratio": r} for r in (0.5, 0.0, 0.75)] + [{"budget": 9}, {"budget": 30}])),
    }


@st.composite
def prompts(draw, sides=("none", "left", "right")):
    """Ids, which of them are real, and instructions, of one to three rows."""
    n_row, n = draw(st.integers(1, 3)), draw(st.integers(12, 24))
    tokens, real, spans = drawn_tokens(draw, n_row, n), torch.ones(n_row, n, dtype=torch.bool), []
    side = draw(st.sampled_from(sides))
    for row in range(n_row):
        n_pad = 0 if side == "none" else draw(st.integers(0, 4))
        begin, end = (n_pad, n) if side == "left" else (0, n - n_pad)
        real[row, :begin] = real[row, end:] = False
        spans.append({"first": (begin + 1, begin + 5), "second": (begin + 5, end)})
    return tokens.masked_fill(~real, 0), real, spans


def drawn_tokens(draw, n_row, n):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.stack([3 + torch.randperm(125, generator=generator)[:n] for _ in range(n_row)])


@st.composite
def continuations(draw):
    """What follows a prompt: how many tokens, whose first ones are padding in some rows, and a seed."""
    n = draw(st.integers(1, 4))
    return n, draw(st.lists(st.integers(0, n - 1), min_size=4, max_size=4)), draw(st.integers(0, 99))


def assert_near(made, wanted, real):
    scale = max(1.0, float(wanted[real].abs().max())) if real.any() else 1.0
    torch.testing.assert_close(made[real], wanted[real], rtol=0, atol=2e-4 * scale)


class Sequence(RuleBasedStateMachine):
    """A model, at most one wrap, and some caches with their shadows."""

    family: str

    @initialize(setting=wraps(), prompt=prompts(), thread=st.booleans())
    def begin(self, setting, prompt, thread):
        self.plain = plain_model(self.family)
        self.model = copy.deepcopy(self.plain)
        self.outside = [sorted(vars(module)) for module in self.model.modules()]
        self.caches, self.handle, self.setting = [], None, None
        self.wrap(setting)
        if self.is_wrapped():
            self.compress(prompt, thread, None)

    # What all rules have in common

    def taken(self, operation, *shadows, thread=False, must=None):
        """What it gives, in a tuple; None if it was refused, which has changed nothing. ``must``: whether it is to be
        taken, where that is known."""
        before = [everything_of(shadow.cache) for shadow in shadows]
        try:
            result = in_thread(operation) if thread else operation()
        except REFUSED as error:
            assert must is not True, f"refused: {error}"
            assert [everything_of(shadow.cache) for shadow in shadows] == before, f"changed, though refused: {error}"
            return None
        assert must is not False, "taken"
        return (result,)

    def goes_on(self, shadow):
        """Whether a forward on its cache is to be taken; None where that depends."""
        if self.handle is None:
            return False
        may = self.setting["when"] == "prefill" if shadow.settings is None else shadow.settings == self.setting
        return None if shadow.is_fixed and may else may

    def chosen(self, i):
        return self.caches[i % len(self.caches)]

    def add(self, shadow):
        self.caches = [*self.caches, shadow][-4:]

    def has_cache(self):
        return bool(self.caches)

    def is_wrapped(self):
        return self.handle is not None

    def prefilled(self, cache, tokens, real, spans, logits=None):
        """A cache that a prompt filled."""
        shadow = Shadow.of_prompt(cache, self.setting, tokens, real, spans)
        if logits is not None:
            assert_near(logits, shadow.logits(self.plain), real)
        self.add(shadow)

    # Wraps

    @rule(setting=wraps())
    def wrap(self, setting):
        made = self.taken(lambda: kvp.wrap(self.model, **setting), must=False if self.handle else None)
        if made:
            self.handle, self.setting = made[0], setting

    @precondition(lambda self: self.has_cache() and not self.is_wrapped())
    @rule(i=which)
    def wrap_as_before(self, i):
        if (setting := self.chosen(i).settings) is not None:
            self.handle, self.setting = kvp.wrap(self.model, **setting), setting

    @precondition(is_wrapped)
    @rule(way=st.sampled_from(["remove", "unwrap", "block"]), thread=st.booleans())
    def unwrap(self, way, thread):
        old, self.handle = self.handle, None
        end = {"remove": old.remove, "unwrap": lambda: kvp.unwrap(self.model), "block": lambda: old.__exit__()}[way]
        in_thread(end) if thread else end()
        assert old.is_removed
        for late in (old.__enter__, lambda: old.compress(torch.arange(3, 20)[None])):
            assert self.taken(late, must=False) is None

    # Caches

    @precondition(is_wrapped)
    @rule(prompt=prompts(), thread=st.booleans(), size=st.sampled_from([None, None, 5]))
    def compress(self, prompt, thread, size):
        tokens, real, spans = prompt
        made = self.taken(
            lambda: self.handle.compress(tokens, real.long(), spans, prefill_chunk_size=size), thread=thread
        )
        if made and size is None:
            self.prefilled(made[0], tokens, real, spans)
        if made:
            assert self.handle.report()["n_tokens"] == tokens.shape[1]

    @precondition(is_wrapped)
    @rule(prompt=prompts(), kind=st.sampled_from(["none", "plain", "new"]), thread=st.booleans())
    def prefill_by_hand(self, prompt, kind, thread):
        tokens, real, spans = prompt
        cache = {"none": None, "plain": DynamicCache(config=self.model.config)}.get(kind)
        cache = self.handle.new_cache(spans=spans) if kind == "new" else cache
        before = dict(vars(cache)) if kind == "plain" else {}
        given = {} if cache is None else cache_argument(self.model, cache)
        made = self.taken(lambda: run(self.model, tokens, real, positions_of(real), **given), thread=thread)
        if made:
            cache = made[0].past_key_values
            self.prefilled(cache, tokens, real, spans if kind == "new" else None, made[0].logits)
        elif kind == "plain":
            assert type(cache) is DynamicCache and vars(cache) == before

    @precondition(has_cache)
    @rule(i=which, coming=continuations(), thread=st.booleans(), paused=st.booleans(), gradients=st.booleans())
    def forward(self, i, coming, thread, paused, gradients):
        shadow = self.chosen(i)
        tokens, real = self.following(shadow, coming)
        if shadow.shape[1] + tokens.shape[1] > MOST:
            return
        seen, held = torch.cat([shadow.real, real], 1), held_sets(shadow.cache)
        given = {**cache_argument(self.model, shadow.cache), "gradients": gradients}
        positions = positions_of(seen)[:, shadow.shape[1] :]

        def operation():
            with self.handle.paused() if paused and self.handle else contextlib.nullcontext():
                return run(self.model, tokens, seen, positions, **given).logits

        if made := self.taken(operation, shadow, thread=thread, must=self.goes_on(shadow)):
            shadow.extend(tokens, real, held)
            assert_near(made[0], shadow.logits(self.plain)[:, -tokens.shape[1] :], real)

    def following(self, shadow, coming):
        n, pads, seed = coming
        tokens = drawn_tokens(lambda _: seed, len(shadow.tokens), n)
        real = torch.arange(n) >= torch.tensor(pads)[: len(tokens), None]
        return tokens.masked_fill(~real, 0), real

    @precondition(lambda self: self.has_cache() and self.is_wrapped())
    @rule(
        i=which,
        coming=continuations(),
        n_new=st.integers(1, 9),
        copied=st.booleans(),
        options=st.sampled_from([{}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}]),
        trouble=st.sampled_from([None, None, "processor", "criterion", "layer", "another"]),
        thread=st.booleans(),
    )
    def generate(self, i, coming, n_new, copied, options, trouble, thread):
        shadow = self.chosen(i)
        n_answer = options.get("num_return_sequences", 1)
        if copied or n_answer > 1:
            shadow = shadow.of(shadow.cache.copy(), visible=list(shadow.visible))
            shadow.cache.batch_repeat_interleave(n_answer)
        tokens, real = self.following(shadow, coming)
        if shadow.shape[1] + tokens.shape[1] + n_new > MOST:
            return
        ids, mask = torch.cat([shadow.tokens, tokens], 1), torch.cat([shadow.real, real], 1)
        shadow.rows([row for row in range(len(ids)) for _ in range(n_answer)])
        steps = Steps(self, shadow, trouble, at=1 + n_new // 2)
        given = {"attention_mask": mask.long(), "max_new_tokens": n_new, **{"do_sample": False, **options}}

        def operation():
            with steps:
                self.model.generate(ids, **given, **steps.watching, **cache_argument(self.model, shadow.cache))

        like_before = [] if shadow.is_fixed else [shadow]  # an answer may outgrow its room
        self.taken(operation, *like_before, thread=thread, must=self.goes_on(shadow))
        if steps.is_of_no_use:
            self.caches = [other for other in self.caches if other is not shadow]
            given = cache_argument(self.model, shadow.cache)
            assert self.taken(lambda: run(self.model, ids[:, :1], **given), shadow, must=False) is None
        else:
            steps.check(real.repeat_interleave(n_answer, 0))

    @precondition(has_cache)
    @rule(i=which, way=st.sampled_from(["copy", "pickle", "file", "fixed"]), room=st.integers(2, 20))
    def copy(self, i, way, room):
        shadow = self.chosen(i)
        made = self.taken(lambda: copies(shadow.cache, way, room, self.model), shadow)
        if made:
            changes = {"copy": {}, "file": {"settings": None}, "fixed": {"is_fixed": True}}.get(way, {})
            self.add(shadow.of(made[0], visible=list(shadow.visible), **changes))

    @precondition(has_cache)
    @rule(i=which, way=st.sampled_from(["repeat", "select", "reorder"]), order=st.lists(which, min_size=1, max_size=3))
    def move_rows(self, i, way, order):
        shadow = self.chosen(i)
        n_row = len(shadow.tokens)
        order = [row % n_row for row in order]
        if way == "repeat":
            order = [row for row in range(n_row) for _ in range(1 + (n_row < 3))]
            shadow.cache.batch_repeat_interleave(1 + (n_row < 3))
        elif way == "select":
            shadow.cache.batch_select_indices(torch.tensor(order))
        else:
            order = (order * n_row)[:n_row]
            shadow.cache.reorder_cache(torch.tensor(order))
        shadow.rows(order)

    @precondition(lambda self: self.has_cache() and "gemma" not in self.family)  # whose windows do not come back
    @rule(i=which, n=st.integers(1, 6))
    def crop(self, i, n):
        shadow = self.chosen(i)
        if n < shadow.shape[1] and self.taken(lambda: shadow.cache.crop(-n), shadow):
            shadow.cut(shadow.shape[1] - n)

    @precondition(has_cache)
    @rule(i=which, prompt=prompts())
    def reset(self, i, prompt):
        shadow = self.chosen(i)
        if self.taken(shadow.cache.reset, shadow):
            self.caches.remove(shadow)
            tokens, real, _ = prompt
            given = cache_argument(self.model, shadow.cache)
            made = self.taken(lambda: run(self.model, tokens, real, positions_of(real), **given))
            if made:
                self.prefilled(shadow.cache, tokens, real, None, made[0].logits)

    @precondition(is_wrapped)
    @rule(thread=st.booleans())
    def pause(self, thread):
        tokens = torch.arange(3, 23)[None]

        def operation():
            with self.handle.paused():
                return run(self.model, tokens)

        out = in_thread(operation) if thread else operation()
        assert not isinstance(out.past_key_values, KeptCache)
        torch.testing.assert_close(out.logits, run(self.plain, tokens).logits, rtol=0, atol=1e-5)

    # What always holds

    @invariant()
    def says_what_it_is(self):
        assert (local.forward, local.generating, local.coming, local.outer) == (None, (), None, None)
        for shadow in self.caches:
            shadow.check()

    @invariant()
    def leaves_nothing(self):
        if not self.is_wrapped():
            assert [sorted(vars(module)) for module in self.model.modules()] == self.outside
            assert attachment_of(self.model) is None

    def teardown(self):
        kvp.unwrap(self.model)
        tokens = torch.arange(3, 23)[None]
        assert torch.equal(run(self.model, tokens).logits, run(self.plain, tokens).logits)


class Steps:
    """What ``generate`` says to a shadow's cache, step by step, and what comes in between at the step ``at``."""

    def __init__(self, machine, shadow, trouble, at):
        self.machine, self.shadow, self.trouble, self.at = machine, shadow, trouble, at
        self.held, self.seen, self.is_of_no_use, self.n_forward = held_sets(shadow.cache), [], False, 0
        of_steps = {"logits_processor": LogitsProcessorList([Watch(self.note)])}
        self.watching = {**of_steps, "stopping_criteria": StoppingCriteriaList([Stop(self.after)])}

    def __enter__(self):
        module = attention_modules(self.machine.model)[1]
        if self.trouble == "layer":  # else no hook, beside which no step has a fixed size
            self.hook = module.register_forward_pre_hook(self.before_layer)

    def __exit__(self, kind, *error):
        if self.trouble == "layer":
            self.hook.remove()
        return kind is Interrupt

    def before_layer(self, *args):
        self.n_forward += 1
        if self.n_forward == self.at:
            self.is_of_no_use = True
            raise Interrupt

    def note(self, ids, logits):
        self.seen.append((ids.clone(), logits.clone(), held_sets(self.shadow.cache)))
        if len(self.seen) == self.at and self.trouble == "processor":
            raise Interrupt
        if len(self.seen) == self.at and self.trouble == "another":  # the model runs on other caches meanwhile
            machine, twin = self.machine, self.shadow.cache.copy()
            run(machine.model, torch.full((len(ids), 1), 9), **cache_argument(machine.model, twin))
            with machine.handle.paused():
                run(machine.model, torch.arange(3, 23)[None])

    def after(self):
        if len(self.seen) == self.at and self.trouble == "criterion":
            raise Interrupt

    def check(self, real):
        """All that was said is what the model without a wrap says, and the cache is as it was after the last step."""
        shadow, held = self.shadow, self.held
        for ids, _, after in self.seen:
            shadow.extend(ids[:, shadow.shape[1] :], real, held)
            held, real = after, torch.ones(len(ids), 1, dtype=torch.bool)
        wanted, every = shadow.logits(self.machine.plain), torch.ones(len(shadow.tokens), dtype=torch.bool)
        for ids, logits, _ in self.seen:
            assert_near(logits, wanted[:, ids.shape[1] - 1], every)
        for now, then in zip(held_sets(shadow.cache), held, strict=True):
            assert torch.equal(now & shadow.real[:, None], then & shadow.real[:, None])


def run(model, tokens, mask=None, positions=None, gradients=False, **given):
    """One forward by hand."""
    given |= {"attention_mask": None if mask is None else mask.long(), "position_ids": positions}
    with torch.set_grad_enabled(gradients):
        return model(tokens, use_cache=True, **{name: x for name, x in given.items() if x is not None})


def in_thread(operation):
    """What it gives, or raises, on a thread of its own."""
    result: list = []

    def target():
        try:
            result.extend([operation(), None])
        except REFUSED as error:
            result.extend([None, error])

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    value, error = result
    if error is not None:
        raise error
    return value


def copies(cache, way, room, model):
    """A cache of its own with the same content."""
    if way == "fixed":
        return cache.fixed(room)
    if way != "file":
        return cache.copy() if way == "copy" else pickle.loads(pickle.dumps(cache))
    with tempfile.TemporaryDirectory() as folder:
        cache.save(f"{folder}/cache.safetensors")
        return kvp.load_cache(f"{folder}/cache.safetensors", model)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("has_spare", [False, True])
def test_operations_in_any_order_are_exact_or_refused(family, has_spare, monkeypatch):
    monkeypatch.setattr(stepping, "DEVICES", ("cpu",))  # a fixed size while generate runs, several rooms in an answer
    monkeypatch.setattr(stepping, "ROOM", 5)
    monkeypatch.setattr(layer, "_SMALL", 1 if has_spare else layer._SMALL)
    some = settings(max_examples=30, stateful_step_count=20, deadline=None, derandomize=True, database=None)
    whole = {"phases": [Phase.generate], "report_multiple_bugs": False}  # to shrink a sequence takes many minutes
    some = settings(some, suppress_health_check=list(HealthCheck), **whole)
    run_state_machine_as_test(type("Sequence", (Sequence,), {"family": family}), settings=some)
