"""The binding where memory runs out: each allocation of a call fails in turn; the call works or says so, and leaves
nothing behind."""

import subprocess
import sys
import threading
from _testcapi import remove_mem_hooks, set_nomemory

import numpy as np
import pytest
from tqdm import TMonitor

from kvpitfalls import _core

B, H, T, D, K = 1, 2, 40, 8, 5
KEYS = np.ones((B, H, T, D), np.float32)
SCORES = np.ones((B, H, T), np.float32)
VOTES = np.array([[[0, T - 8, T - 8, T, 0, 0, 1, 0, T - 8, T]]], np.int32)
SEGMENTS, QUOTAS = np.array([[0, T]], np.int32), np.full((B, H, 1), K, np.int32)
POSITIONS, COUNTS = np.zeros((B, H, K), np.int32), np.zeros((B, H), np.int32)
KEPT = np.tile(np.arange(K, dtype=np.int32), (B, H, 1))
LARGE, LARGE_SEGMENTS = (
    np.ones((B, H, 1024, 32), np.float32),
    np.array([[0, 1024]], np.int32),
)
OUT = [np.zeros((B, H, K, D), np.float32) for _ in range(2)]


class OnlyDLPack:
    """A tensor of a library that knows nothing but __dlpack__."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, max_version=None):
        return self.array.__dlpack__(max_version=max_version)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldDLPack(OnlyDLPack):
    """One from before DLPack 1.0."""

    def __dlpack__(self):
        return self.array.__dlpack__()


LENT, LENT_OLD = OnlyDLPack(KEYS), OldDLPack(KEYS)
# A call takes one such tuple as it is; to build it of parts would allocate, too, and CPython 3.11 leaks a part where
# that fails.
ATTENTION = ("attention", KEYS, None, KEYS, VOTES, None, None, SCORES, (1.0, 0.0, 3.0, 0.0))
SELECT = (SCORES, SEGMENTS, QUOTAS, None, None, POSITIONS, COUNTS)
SHARE = (SCORES, SEGMENTS, QUOTAS, QUOTAS, np.zeros(QUOTAS.shape, np.int32))
SCORE_CALL, SCORE_SIZE, SELECT_CALL, SELECT_SIZE = (
    (*ATTENTION, None, 1),
    (*ATTENTION, 1),
    (*SELECT, None, 1),
    (*SELECT, 1),
)
SHARE_CALL, SHARE_SIZE = (*SHARE, None, 1), (*SHARE, 1)
GATHER_CALL, SMALL_SCRATCH = (KEYS, KEYS, KEPT, *OUT, 1), (*SELECT, np.zeros(64, np.uint8), 1)
PRESS_CALL = ("attention", KEYS, KEYS, KEYS, VOTES, None, None, SEGMENTS, QUOTAS, None, (1.0, 0.0, 3.0, 0.0), K, 1)
SHARED_PRESS = (*PRESS_CALL[:9], QUOTAS, np.zeros(QUOTAS.shape, np.int32), (1.0, 0.0, 3.0, 0.0), 1)
EVICT_CALL = (SCORES, KEYS, KEYS, None, SEGMENTS, QUOTAS, None, None, None, K, 1)
LARGE_PRESS = ("norm", LARGE, LARGE, None, None, None, None, LARGE_SEGMENTS, QUOTAS, None, None, 1024, 1)
BAD_PRESS = (*PRESS_CALL[:-2], K - 1, 1)
BAD_PARAMS = (*ATTENTION[:-1], ("one",), None, 1)
BAD_TYPE, BAD_RANK, BAD_SHAPE = (("keys", *GATHER_CALL[1:]), (KEPT, *GATHER_CALL[1:]), (KEYS[:, :1], *GATHER_CALL[1:]))

WORKING = {
    "score": lambda: _core.score(*SCORE_CALL),
    "score from DLPack": lambda: _core.score("norm", LENT, None, None, None, None, None, SCORES, None, None, 1),
    "score from old DLPack": lambda: _core.score("norm", LENT_OLD, None, None, None, None, None, SCORES, None, None, 1),
    "select": lambda: _core.select(*SELECT_CALL),
    "share": lambda: _core.share(*SHARE_CALL),
    "gather": lambda: _core.gather(*GATHER_CALL),
    "press": lambda: _core.press(*PRESS_CALL),
    "shared press": lambda: _core.press_shared(*SHARED_PRESS),
    "evict": lambda: _core.evict(*EVICT_CALL),
    "large press": lambda: _core.press(*LARGE_PRESS),
    "score_workspace": lambda: _core.score_workspace(*SCORE_SIZE),
    "select_workspace": lambda: _core.select_workspace(*SELECT_SIZE),
    "share_workspace": lambda: _core.share_workspace(*SHARE_SIZE),
    "scorers": _core.scorers,
    "supports": lambda: _core.supports("norm", "cpu", "float32"),
    "isas": _core.isas,
    "build_info": _core.build_info,
}
REFUSED = {
    "unknown scorer": (
        ValueError,
        lambda: _core.score("nothing", KEYS, *[None] * 5, SCORES, None, None, 1),
    ),
    "unknown isa": (ValueError, lambda: _core.isa_set("abacus")),
    "text": (TypeError, lambda: _core.isa_set(7)),
    "count": (TypeError, lambda: _core.select(KEYS)),
    "type": (TypeError, lambda: _core.gather(*BAD_TYPE)),
    "rank": (ValueError, lambda: _core.gather(*BAD_RANK)),
    "shape": (ValueError, lambda: _core.gather(*BAD_SHAPE)),
    "workspace": (ValueError, lambda: _core.select(*SMALL_SCRATCH)),
    "quotas": (ValueError, lambda: _core.press(*BAD_PRESS)),
    "params": (TypeError, lambda: _core.score(*BAD_PARAMS)),
}
ROUNDS = 20
QUIET = 25  # so many calls in a row that met no failing allocation: none is left to fail


@pytest.fixture(autouse=True)
def alone():
    """Allocations fail in the whole process; a thread that watches other tests' progress bars would meet some."""
    for thread in threading.enumerate():
        if isinstance(thread, TMonitor):
            thread.exit()


def count_failures(call, refusal=None):
    """Fails the n-th allocation, for n = 0, 1, ... until calls have no n-th one; returns how many calls ran out of
    memory."""
    n = n_failed = n_quiet = 0
    while n_quiet < QUIET:
        raised = None
        set_nomemory(n, n + 1)
        try:
            call()
        except BaseException as caught:
            raised = type(caught)
        finally:
            remove_mem_hooks()
        failed = raised is MemoryError
        assert failed or raised is refusal, raised
        n, n_failed, n_quiet = n + 1, n_failed + failed, 0 if failed else n_quiet + 1
        assert n < 2000
    return n_failed


def check_leftovers(call, refusal=None):
    """One block that one failure leaves behind would be ROUNDS blocks. The first rounds may fill caches."""
    for _ in range(3):
        count_failures(call, refusal)
    before = sys.getallocatedblocks()
    for _ in range(ROUNDS):
        count_failures(call, refusal)
    assert sys.getallocatedblocks() - before < ROUNDS


def shared_objects():
    return [KEYS, SCORES, VOTES, SEGMENTS, QUOTAS, POSITIONS, COUNTS, KEPT, *OUT, LENT, LENT_OLD, ATTENTION, SELECT]


@pytest.fixture(autouse=True)
def untraced():
    """A tracer, such as coverage's, would meet the failing allocations, too, and die of them."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.mark.parametrize("name", WORKING)
def test_each_allocation_of_a_call_may_fail(name):
    call = WORKING[name]
    counts = [sys.getrefcount(x) for x in shared_objects()]
    check_leftovers(call)
    assert [sys.getrefcount(x) for x in shared_objects()] == counts
    call()


@pytest.mark.parametrize("name", REFUSED)
def test_each_allocation_of_a_refusal_may_fail(name):
    refusal, call = REFUSED[name]
    counts = [sys.getrefcount(x) for x in shared_objects()]
    check_leftovers(call, refusal)
    assert [sys.getrefcount(x) for x in shared_objects()] == counts
    with pytest.raises(refusal):
        call()


def test_the_calls_do_allocate():
    """Or the tests above would prove nothing: scratch, capsules, lists, messages."""
    for name in ("score", "select", "score from DLPack", "scorers", "isas", "build_info"):
        assert count_failures(WORKING[name]) > 0, name
    assert count_failures(REFUSED["unknown scorer"][1], ValueError) > 0


def test_each_allocation_of_the_import_may_fail():
    """In a process of its own. NumPy's header prints its MemoryError and raises ImportError instead."""
    code = """
import importlib.util, sys
from _testcapi import remove_mem_hooks, set_nomemory
import kvpitfalls._core as core, kvpitfalls.errors
n = n_failed = n_quiet = 0
spec = importlib.util.spec_from_file_location("kvpitfalls._core", core.__file__)
while n_quiet < 25:
    module = importlib.util.module_from_spec(spec)
    error = None
    set_nomemory(n, n + 1)
    try:
        spec.loader.exec_module(module)
    except (MemoryError, ImportError) as caught:
        error = caught
    finally:
        remove_mem_hooks()
    n, n_failed, n_quiet = n + 1, n_failed + (error is not None), 0 if error else n_quiet + 1
assert module.isas() == core.isas()
print(n_failed)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def aligned_bytes(n, shift=0):
    raw = np.zeros(n + 128, np.uint8)
    start = -raw.ctypes.data % 64 + shift
    return raw[start : start + n]


@pytest.mark.parametrize("n_worker", [1, 2])
@pytest.mark.parametrize("verb", ["score", "select", "share"])
def test_scratch_of_the_wrong_size_is_refused_with_the_size(verb, n_worker):
    run, size, args = {
        "score": (_core.score, _core.score_workspace, ATTENTION),
        "select": (_core.select, _core.select_workspace, SELECT),
        "share": (_core.share, _core.share_workspace, SHARE),
    }[verb]
    need = size(*args, n_worker)
    run(*args, aligned_bytes(need), n_worker)
    for given in (need - 1, 1, 0):
        with pytest.raises(ValueError, match=f"workspace has {given} bytes; expected at least {need}"):
            run(*args, aligned_bytes(given), n_worker)
    for shift in (1, 8, 32):
        with pytest.raises(
            ValueError,
            match=f"workspace begins {shift} bytes behind a multiple of 64; expected it to be aligned to 64 bytes",
        ):
            run(*args, aligned_bytes(need, shift), n_worker)
