"""Models inside of services: what a request gets depends on nothing that others do before or beside it."""

import asyncio
import contextlib
import copy
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build, feed, ids

import kvpitfalls as kvp
from kvpitfalls.hf import stand_ins
from kvpitfalls.hf.arguments import cache_argument
from kvpitfalls.hf.cache import KeptCache


@pytest.fixture
def llama():
    return build("llama").requires_grad_(False)


def is_compressed(model) -> bool:
    """Whether a request that comes now is."""
    out = model.generate(ids(1, 20), max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    return isinstance(out.past_key_values, KeptCache)


def test_a_pause_is_of_the_task_that_makes_it(llama):
    """Requests of an asyncio server are tasks of one thread: none may run uncompressed since another one pauses, nor
    compressed since another's pause is over; and nothing stays paused."""

    async def serve():
        is_begun, is_over, is_left, told = asyncio.Event(), asyncio.Event(), asyncio.Event(), {}

        async def short():
            with handle.paused():
                is_begun.set()
                await asyncio.sleep(0)
                told["in its own"] = is_compressed(llama)
                await asyncio.sleep(0.01)
            told["after its own"] = is_compressed(llama)
            is_over.set()

        async def long():
            await is_begun.wait()
            told["beside another's"] = is_compressed(llama)
            with handle.paused():
                started = asyncio.create_task(goes_on())
                await is_over.wait()
                told["in its own, another's over"] = is_compressed(llama)
                told["on a thread, in its own"] = await asyncio.to_thread(is_compressed, llama)
            is_left.set()
            await started

        async def goes_on():
            told["in that of whoever started it"] = is_compressed(llama)
            await is_left.wait()
            told["started in one that is over"] = is_compressed(llama)

        await asyncio.gather(short(), long())
        return told

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        assert asyncio.run(serve()) == {
            "in its own": False,
            "beside another's": True,
            "in that of whoever started it": False,
            "after its own": True,
            "in its own, another's over": False,
            "on a thread, in its own": False,
            "started in one that is over": True,
        }
        assert is_compressed(llama)


def test_pauses_of_generators_end_in_any_order(llama):
    def pausing():
        with handle.paused():
            yield

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        one, two = pausing(), pausing()
        next(one), next(two)
        one.close()
        assert not is_compressed(llama)
        two.close()
        assert is_compressed(llama)


MOVES = {
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_cache_whose_rows_were_moved_in_part_is_refused(llama, move, is_fixed, error, monkeypatch, tmp_path):
    """As where the memory of a GPU does for the rows of some layers, or a client goes away in the midst of beam search:
    some layers would have other rows than others, and answers would be of none."""
    tokens = ids(2, 24)

    def fails(*_):
        raise error("broken off")

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :20])
        pool, cache = cache, cache.fixed(9) if is_fixed else cache.copy()
        with monkeypatch.context() as patch:
            for name in ("_map_rows", "map_in_place") if is_fixed else ("_map_rows",):
                patch.setattr(cache.layers[1], name, fails)
            with pytest.raises(error, match="broken off"):
                move(cache)
        move(cache)  # what comes later makes it no better
        with pytest.raises(ValueError, match="a move of its rows"):
            feed(llama, tokens.repeat(len(cache.valid) // 2, 1), [4], cache, start=20)
        if not is_fixed:
            with pytest.raises(ValueError, match="a move of its rows"):
                cache.save(tmp_path / "cache")
        move(pool)
        assert feed(llama, tokens.repeat(len(pool.valid) // 2, 1), [4], pool, start=20).isfinite().all()


def test_copies_of_a_cache_share_what_a_users_policy_holds(llama, registry):
    """A lock, a connection or a model of its own is neither copied for each conversation nor a reason to refuse it."""

    @dataclass(frozen=True)
    class Locked(kvp.Policy):
        """Keep the keys of smallest norm, one layer at a time."""

        lock: Any = field(default_factory=threading.Lock, compare=False)
        name = "locked"

        def score(self, inputs):
            with self.lock:
                return -inputs.keys.norm(dim=-1)

    tokens, policy = ids(2, 24), Locked()
    with kvp.wrap(llama, policy, compression_ratio=0.5) as handle:
        cache = handle.compress(tokens[:, :20])
        twin = copy.deepcopy(cache.copy())
        logits = [feed(llama, tokens, [4], x, start=20) for x in (cache, twin)]
    assert torch.equal(*logits) and twin.action.policy is policy
    assert twin.report()["kept_share"] == cache.report()["kept_share"] == 0.5


@pytest.mark.parametrize("is_removed", [False, True])
def test_calls_of_other_threads_are_none_of_a_forked_childs(llama, is_removed):
    """As a server forks its workers while it answers: the child's wrap is taken off at once, also where the parent's
    was removed before, since no such call ends there."""
    is_in, goes_on = threading.Event(), threading.Event()

    def stay(*_):
        is_in.set()
        goes_on.wait(20)

    handle = kvp.wrap(llama, "knorm", compression_ratio=0.5)
    with llama.model.layers[1].register_forward_pre_hook(stay):
        thread = threading.Thread(target=llama.generate, args=(ids(1, 20),), kwargs={"max_new_tokens": 1})
        thread.start()
        assert is_in.wait(20)
        if is_removed:
            handle.remove()
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            handle.remove()
            os._exit(1 if "forward" in vars(llama.model) or "generate" in vars(llama) or stand_ins._replaced else 0)
        goes_on.set()
        thread.join()
    assert os.waitpid(pid, 0)[1] == 0 and handle.is_removed == is_removed
    handle.remove()
    assert "forward" not in vars(llama.model) and not stand_ins._replaced


class Strike:
    """A trace function that calls something once, at the n-th line that a thread runs while it holds the lock of
    wraps: as a signal's handler does, or what the garbage collector ends."""

    def __init__(self, n: int, call):
        self.left, self.call, self.is_over = n, call, False

    def __call__(self, frame, event, argument):
        if "kvpitfalls" not in frame.f_code.co_filename or self.is_over:
            return None
        if event == "line" and stand_ins.is_held():
            self.left -= 1
            if self.left < 0:
                self.is_over = True
                self.call()
        return self


def run_while_wraps_change(llama, call, n: int) -> bool:
    """Wrap a model, run and unwrap it; whether ``call`` came in between."""
    strike = Strike(n, call)
    sys.settrace(strike)
    try:
        with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
            handle.compress(ids(1, 20))
    finally:
        sys.settrace(None)
    return strike.is_over


def test_a_wrap_is_taken_off_by_whatever_comes_while_its_thread_changes_another(llama):
    """A service that is told to end removes its wraps from a signal's handler, and a generator in a cycle is closed by
    the garbage collector: at any line, and neither waits for the thread that it runs on."""
    other, n, n_struck = build("llama"), 0, 0
    tokens, traces = ids(1, 20), [set(vars(module)) for module in other.modules()]
    plain = [model(tokens).logits for model in (llama, other)]
    while True:
        removed = kvp.wrap(other, "knorm", compression_ratio=0.5)
        is_struck = run_while_wraps_change(llama, removed.remove, n)
        if not is_struck:
            removed.remove()
            break
        n_struck += 1
        assert removed.is_removed and [set(vars(module)) for module in other.modules()] == traces, n
        assert all(torch.equal(m(tokens).logits, x) for m, x in zip((llama, other), plain, strict=True)), n
        assert not stand_ins._replaced, n
        n += 23
    assert n_struck > 20


def test_a_wrap_that_is_put_on_while_its_thread_changes_another_is_refused(llama):
    other, told = build("llama"), []

    def put():
        with pytest.raises(RuntimeError, match="came while its thread put a wrap on"):
            kvp.wrap(other, "knorm", compression_ratio=0.5)
        told.append("forward" in vars(other.model))

    assert run_while_wraps_change(llama, put, 5) and told == [False] and not stand_ins._replaced


def test_a_child_that_is_forked_while_another_thread_changes_a_wrap_does_not_wait_for_it(llama):
    """As a server forks its workers: the other thread is none of the child's, and would never give its lock back."""
    is_in, goes_on = threading.Event(), threading.Event()

    def stay():
        is_in.set()
        goes_on.wait(0.2)

    with kvp.wrap(llama, "knorm", compression_ratio=0.5) as handle:
        wanted = handle.compress(ids(1, 20)).positions(0)
        thread = threading.Thread(target=stand_ins.alone, args=(stay,))
        thread.start()
        is_in.wait()
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # torch waits for its own pool's threads, which are the parent's
            signal.alarm(120)  # a child that waits ends by it
            is_same = np.array_equal(handle.compress(ids(1, 20)).positions(0), wanted)
            handle.remove()
            os._exit(0 if is_same and "forward" not in vars(llama.model) else 1)
        goes_on.set()
        thread.join()
        assert os.waitpid(pid, 0)[1] == 0


def test_a_compressed_cache_is_asked_for_its_prompt_in_a_pause_too(llama):
    """It goes on there as ever, and as ever no other prompt may."""
    tokens, question = ids(1, 20), ids(1, 3, seed=1)
    with kvp.wrap(llama, "knorm", budget=4) as handle:
        cache, answers = handle.compress(tokens), []
        for block in (contextlib.nullcontext(), handle.paused()):
            with block:
                given = {"max_new_tokens": 4, "do_sample": False, **cache_argument(llama, cache.copy())}
                answers.append(llama.generate(torch.cat([tokens, question], 1), **given))
                with pytest.raises(ValueError, match="another prompt than the cache has seen"):
                    llama.generate(torch.cat([tokens.flip(1), question], 1), **given)
    assert torch.equal(*answers)
