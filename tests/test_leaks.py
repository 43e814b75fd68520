"""A thousand calls of each verb of the binding, and many wraps, leave no reference and no memory behind."""

import copy
import ctypes
import gc
import os
import sys
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import torch
from test_binding import KEYS, READ_ONLY, B, H, OnlyDLPack, T, attention, gathering, selection
from tiny_models import build, ids, tiny_prompt

import kvpitfalls as kvp
from kvpitfalls import _core

N_CALL = 1000
MALLINFO = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class Mallinfo2(ctypes.Structure):
    """glibc's struct of this name."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


def allocated() -> int:
    """Bytes that malloc gave out and has not got back."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this system's malloc does not tell how much it gave out")
    libc.mallinfo2.restype = Mallinfo2
    told = libc.mallinfo2()
    return told.uordblks + told.hblkhd


def resident() -> int:
    """Bytes of this process that are in memory."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system does not tell a process's memory in /proc")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leak_cases():
    protect, valid = np.zeros((B, T), bool), np.tile(np.array([0, T], np.int32), (B, 1))
    wrapped = [OnlyDLPack(KEYS), OnlyDLPack(KEYS.numpy(), old=True), OnlyDLPack(np.zeros((B, H, T), np.float32))]
    yield "numpy", _core.select, [*selection()[:3], protect, valid, *selection()[5:]]
    yield "torch", _core.gather, [torch.from_numpy(x) for x in gathering()[:5]] + [1]
    pressing = [KEYS.numpy(), KEYS.numpy(), None, None, valid, None, *selection()[1:3], None, None]
    yield "press", _core.press, ["norm", *pressing, selection()[5].shape[2], 1]
    yield "press of torch", _core.press, ["norm", KEYS, KEYS, *pressing[2:], selection()[5].shape[2], 1]
    yield "refused by press", _core.press, ["norm", KEYS, KEYS, *pressing[2:], 1, 1]
    sharing = [*selection()[1:3], selection()[2], np.empty_like(selection()[2]), None, 1]
    yield "shared press", _core.press_shared, ["norm", *pressing[:6], *sharing]
    yield "shared press of torch", _core.press_shared, ["norm", KEYS, KEYS, *pressing[2:6], *sharing]
    too_high = [*sharing[:2], sharing[2] + 1, *sharing[3:]]
    yield "refused by shared press", _core.press_shared, ["norm", KEYS, KEYS, *pressing[2:6], *too_high]
    evicting = [selection()[0], KEYS, KEYS, valid, *selection()[1:3], None]
    yield "evict", _core.evict, [*evicting, None, None, selection()[5].shape[2], 1]
    yield "evict of shares", _core.evict, [*evicting, *sharing[2:4], 1, 1]
    yield "refused by evict", _core.evict, [*evicting, None, None, 1, 1]
    yield "attention", _core.score, attention()
    yield "dlpack", _core.score, ["norm", wrapped[0], None, None, valid, None, wrapped[2], [], None, 1]
    yield "old dlpack", _core.score, ["norm", wrapped[1], None, None, valid, None, wrapped[2], None, None, 2]
    yield (
        "refused by select",
        _core.select,
        [*selection()[:3], protect, np.full((B, 2), T + 1, np.int32), *selection()[5:]],
    )
    yield "refused by gather", _core.gather, [*gathering()[:2], gathering()[2] + T, *gathering()[3:5], 1]
    yield "refused by the core", _core.score, ["norm", wrapped[0], None, None, protect, None, wrapped[2], None, None, 1]
    yield "refused by the binding", _core.score, ["norm", wrapped[1], None, None, [1], None, wrapped[2], None, None, 1]
    yield (
        "refused by the library",
        _core.score,
        ["norm", wrapped[0], None, None, KEYS.to("meta"), None, wrapped[2], None, None, 1],
    )
    yield "read-only", _core.score, ["norm", wrapped[0], None, None, None, None, OnlyDLPack(READ_ONLY), None, None, 1]
    yield "small workspace", _core.score, attention(workspace=np.zeros(1, np.uint8))
    yield "bad number", _core.score, ["norm", wrapped[0], None, None, None, None, wrapped[2], ["1"], None, 1]
    yield "refused by its method", _core.score, ["norm", OnlyDLPack(KEYS.clone().requires_grad_()), *[None] * 7, 1]
    yield "unknown name", _core.score, ["m" * 100, *[None] * 9]


CASES = [pytest.param(*case[1:], id=case[0]) for case in leak_cases()]


def call_often(function, arguments, n_call: int) -> None:
    for _ in range(n_call):
        with suppress(Exception):  # whether it is refused is another test's subject
            function(*arguments)
    gc.collect()


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_calls_leave_no_references_and_no_memory(request, function, arguments):
    n_call = 200 if "by the library" in request.node.name else N_CALL  # torch takes 5 ms to say why it refuses
    inside = [
        y for x in arguments if isinstance(x, OnlyDLPack | list) for y in (x if isinstance(x, list) else [x.array])
    ]
    shared = [KEYS, READ_ONLY, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)]
    held = [x for x in [*arguments, *inside, *shared] if x is not None and not isinstance(x, int)]
    call_often(function, arguments, 20)
    counts = [sys.getrefcount(x) for x in held]
    tracemalloc.start()
    call_often(function, arguments, n_call)
    leaked = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert leaked < 16 * n_call, "one small object for each call would be more"
    before = allocated()
    call_often(function, arguments, n_call)
    assert allocated() - before < 16 * n_call, "what Python does not count: one small block for each call would be more"
    assert [sys.getrefcount(x) for x in held] == counts


def test_wraps_caches_and_audits_leave_no_memory():
    """Round after round of all that holds caches: the resident size grows by less than half of what a cache for each
    round would be.

    The allocator's own ups and downs are some MiB here; that an hour of rounds is flat is the subject of ``make soak``.
    """
    model, tokens, prompt = build("llama"), ids(8, 100), tiny_prompt()

    def one_round(policy, when):
        with kvp.wrap(model, policy, compression_ratio=0.5, when=when) as handle:
            cache = handle.compress(tokens[:, :-1], spans={"a": (4, 20)})
            model.generate(tokens, past_key_values=copy.deepcopy(cache), max_new_tokens=3, do_sample=False)
            with suppress(ValueError):  # refused in the middle of a prefill
                handle.compress(tokens, spans={"a": (4, 99)})
        kvp.audit(model, prompt, policies=[policy], compression_ratios=[0.5])
        return cache.held_bytes

    settings = [("snapkv", "prefill"), ("h2o", "always"), ("knorm", "prefill")]
    for _ in range(10):
        size = [one_round(*setting) for setting in settings]
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    for _ in range(20):
        for setting in settings:
            one_round(*setting)
    gc.collect()
    assert resident() - before < 20 * sum(size) / 2, f"of {size} bytes a cache"
    assert len(gc.get_objects()) - objects < 20, "less than an object for each round"
