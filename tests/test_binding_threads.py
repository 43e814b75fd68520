"""The extension module among threads that call it or change its arguments, in forked children, and in other
interpreters."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_binding import B, D, H, attention, norm

from kvpitfalls import _core


def test_other_python_threads_run_during_a_call():
    """The main thread is never made to yield here, so that the other one can only count while a call has let go of the
    GIL."""
    counter, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counter[0] += 1
            time.sleep(0)

    arguments, interval = attention(4000), sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    sys.setswitchinterval(1000)
    try:
        progress = []
        for _ in range(20):
            before = counter[0]
            _core.score(*arguments)
            progress.append(counter[0] - before)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert any(progress)


def all_results(n_worker):
    """Every output, as bytes, of calls that are large enough to be shared out among threads."""
    n_token = 4000
    scored = attention(n_token, n_worker)
    _core.score(*scored)
    keys, scores = scored[1], scored[7]
    segments, quotas = np.array([[0, 10, n_token]] * B, np.int32), np.full((B, H, 2), [4, 900], np.int32)
    positions, counts = np.empty((B, H, 904), np.int32), np.empty((B, H), np.int32)
    _core.select(scores, segments, quotas, None, None, positions, counts, None, n_worker)
    out_keys, out_values = np.empty((2, B, H, 904, D), np.float32)
    _core.gather(keys, -keys, positions, out_keys, out_values, n_worker)
    return [x.tobytes() for x in (scores, norm(keys, n_worker=n_worker), positions, counts, out_keys, out_values)]


def test_results_have_the_same_bits_for_any_number_of_workers():
    serial = all_results(1)
    assert np.isfinite(np.frombuffer(serial[0], np.float32)).all()
    for n_worker in (0, 2, 4, 4, 4, 13):
        assert all_results(n_worker) == serial, n_worker


def test_calls_from_many_python_threads():
    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(tuple, pool.map(all_results, [1, 2, 3, 4] * 10)))) == 1


FORK = """
import os, sys
import numpy as np
from kvpitfalls import _core
keys = np.random.default_rng(0).standard_normal((4, 8, 2000, 32), dtype=np.float32)
scores = np.empty(keys.shape[:3], np.float32)
def call():
    scores[:] = 0
    _core.score("norm", keys, None, None, None, None, None, scores, None, None, 4)
    return scores.tobytes()
n_thread = lambda: len(os.listdir("/proc/self/task"))
alone = n_thread()
expected = call()
started = n_thread() - alone
child = os.fork()
if child == 0:
    os._exit(0 if call() == expected and n_thread() == 1 else 1)
print(started, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), call() == expected)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by /proc")
def test_a_forked_child_works_serially():
    """The time limit is there because the child of a program with OpenMP threads would otherwise wait for ever."""
    setting = {
        "env": {**os.environ, "OMP_DYNAMIC": "false", "OMP_THREAD_LIMIT": "64"},
        "cwd": Path(_core.__file__).parents[1],
    }
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, **setting)
    assert done.returncode == 0, done.stderr
    started, child, still_works = done.stdout.split()
    assert (int(started) > 0) == _core.build_info()["openmp"]
    assert (child, still_works) == ("0", "True")


REWRITES = """
import sys, threading, time

sys.setswitchinterval(1e-5)
import numpy as np
from kvpitfalls import _core

H, T, D, K = 64, 4096, 16, 2048
keys, queries = np.zeros((1, H, T, D), np.float32), np.zeros((1, H, 64, D), np.float32)
votes = np.array([[[0, T - 64, T - 64, T, 0, 0, 1, 0, 0, 0]]], np.int32)
positions = np.broadcast_to(np.arange(0, T, 2, dtype=np.int32), (1, H, K)).copy()
valid, segments, quotas = np.array([[0, T]], np.int32), np.array([[0, T]], np.int32), np.full((1, H, 1), K, np.int32)
out, scores = [np.empty((1, H, K, D), np.float32) for _ in range(2)], np.zeros((1, H, T), np.float32)
kept, counts, shares = (np.empty(shape, np.int32) for shape in ((1, H, K), (1, H), (1, H, 1)))
table, call = {
    "positions": (positions, lambda: _core.gather(keys, keys, positions, *out, 1)),
    "valid": (valid, lambda: _core.score("attention", keys, None, queries, votes, valid, None, scores, None, None, 1)),
    "segments": (segments, lambda: _core.select(scores, segments, quotas, None, None, kept, counts, None, 1)),
    "quotas": (quotas, lambda: _core.share(scores, segments, quotas, quotas, shares, None, 1)),
}[sys.argv[1]]
flat, good, stop = table.reshape(-1), int(table.reshape(-1)[-1]), time.monotonic() + 3

def rewrite():
    while time.monotonic() < stop:
        flat[-1] = 1 << 30
        flat[-1] = good

threading.Thread(target=rewrite, daemon=True).start()
n = {True: 0, False: 0}
while time.monotonic() < stop:
    try:
        call()
        n[True] += 1
    except ValueError:
        n[False] += 1
print(n[True], n[False])
"""


@pytest.mark.parametrize("name", ["positions", "valid", "segments", "quotas"])
def test_a_thread_that_rewrites_a_table_cannot_crash_the_process(name):
    """What is checked is what is used: such calls are refused or give some numbers, and the process lives."""
    run = subprocess.run(
        [sys.executable, "-c", REWRITES, name],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-500:]
    done, refused = map(int, run.stdout.split())
    assert done > 3 and done + refused > 10


# In a process of its own: after the first subinterpreter Python no longer knows who holds the GIL, and torch refuses
# gradients.
_IN_A_SUBINTERPRETER = """
import importlib, sys
if sys.version_info < (3, 13):
    interpreters = importlib.import_module("_xxsubinterpreters")
    inner = interpreters.create(isolated=False)
    try:
        interpreters.run_string(inner, sys.argv[1])
    except interpreters.RunFailedError as error:
        print(error)
else:
    interpreters = importlib.import_module("_interpreters")
    inner = interpreters.create("legacy")
    print(interpreters.run_string(inner, sys.argv[1]).formatted)
interpreters.destroy(inner)
"""


def raised_in_a_subinterpreter(code: str) -> str:
    """What running this code in an interpreter that shares the main one's GIL raises, as text."""
    return subprocess.run(
        [sys.executable, "-c", _IN_A_SUBINTERPRETER, code], capture_output=True, text=True, check=True
    ).stdout


def test_a_subinterpreter_is_refused():
    """By name, also in builds for the stable ABI, whose headers hide the slot that says so."""
    load = "import importlib.util as u\ns = u.spec_from_file_location('kvpitfalls._core', {!r})\n"
    text = raised_in_a_subinterpreter(load.format(_core.__file__) + "s.loader.exec_module(u.module_from_spec(s))")
    assert "is imported in a subinterpreter; expected the main one" in text or "does not support loading in" in text
