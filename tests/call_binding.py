"""Calls everything the binding has, well and badly, with NumPy alone: for valgrind, under which torch would take
minutes."""

import contextlib
import gc

import numpy as np

from kvpitfalls import _core

B, H, T, D, K = 2, 2, 70, 9, 6
rng = np.random.default_rng(0)


class OnlyDLPack:
    """A tensor of a library that knows nothing but __dlpack__."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def call_everything(dtype, lend, n_worker):
    keys, values = (lend(rng.normal(size=(B, H, T, D)).astype(dtype)) for _ in range(2))
    scores, valid = np.empty((B, H, T), np.float32), np.array([[0, T], [3, T - 2]], np.int32)
    votes = np.array([[[0, T - 8, T - 8, T, 0, 0, 1, 0, T - 8, T]]] * B, np.int32)
    _core.score("norm", keys, None, None, None, valid, None, scores, None, None, n_worker)
    _core.score("position", keys, None, None, None, valid, None, scores, (4,), None, n_worker)
    _core.score("attention", keys, None, keys, votes, valid, None, scores, (0.3, 0, 3, 0), None, n_worker)
    _core.score("random", keys, None, None, None, valid, None, scores, (7, 1), None, n_worker)
    _core.score("lagkv", keys, values, None, None, valid, None, scores, (2, 9), None, n_worker)
    assert np.isfinite(scores[0]).all() and np.isneginf(scores[1, :, :3]).all()
    positions, counts = np.empty((B, H, K), np.int32), np.empty((B, H), np.int32)
    segments, quotas = np.array([[0, 30, T]] * B, np.int32), np.full((B, H, 2), K // 2, np.int32)
    _core.select(scores, segments, quotas, None, valid, positions, counts, None, n_worker)
    assert (counts == K).all()
    shares = np.empty((B, H, 2), np.int32)
    _core.share(scores, segments, quotas, quotas // 2, shares, None, n_worker)
    assert (shares.sum(1) == quotas.sum(1)).all()
    out = [np.empty((B, H, K, D), dtype) for _ in range(2)]
    _core.gather(keys, values, positions, *out, n_worker)
    if lend is np.asarray:
        given = "norm", keys, values, None, None, valid, None, segments, quotas, None, None
        pressed = _core.press(*given, K, n_worker)
        assert pressed[1].dtype == dtype and len(pressed) == 3 and (pressed[0] >= 0).all()
        with contextlib.suppress(ValueError):
            _core.press(*given, K - 1, n_worker)
            raise AssertionError("quotas above the room for positions were accepted")
        shared = *given[:9], quotas // 2, shares, None
        pressed = _core.press_shared(*shared, n_worker)
        assert pressed[2].dtype == dtype and pressed[0].shape == (B, H, shares.sum(-1).max())
        with contextlib.suppress(ValueError):
            _core.press_shared(*given[:9], quotas + 1, shares, None, n_worker)
            raise AssertionError("floors above the quotas were accepted")
        scored = scores, keys, values, valid, segments, quotas, None
        for both in ((None, None), (quotas // 2, shares)):
            evicted = _core.evict(*scored, *both, K, n_worker)
            assert evicted[1].dtype == dtype and evicted[0].shape[2] == (K if both[0] is None else shares.sum(-1).max())
        with contextlib.suppress(ValueError):
            _core.evict(*scored, None, None, K - 1, n_worker)
            raise AssertionError("quotas above the room for positions were accepted")
    with contextlib.suppress(ValueError):
        _core.gather(keys, values, positions + T, *out, n_worker)
        raise AssertionError("positions behind the end were accepted")


def call_badly():
    """Every kind of argument, each in the place of every other."""
    arguments = [None, 3, "text", object(), (), np.zeros(3, np.complex64)]
    arguments += [np.zeros((1, 1, 0, 1), np.float32), np.zeros((1, 2, 3, 4, 5), np.float32)]
    n_refused = 0
    for verb, n_argument in [
        (_core.score, 11),
        (_core.select, 9),
        (_core.share, 7),
        (_core.gather, 6),
        (_core.press, 13),
        (_core.press_shared, 13),
        (_core.evict, 11),
        (_core.supports, 3),
    ]:
        for place in range(n_argument):
            for bad in arguments:
                given = [np.zeros((1, 1, 4, 1), np.float32)] * n_argument
                given[place] = bad
                with contextlib.suppress(TypeError, ValueError):
                    verb(*given)
                    continue
                n_refused += 1
    assert n_refused > 200


for dtype in (np.float32, np.float16):
    for lend in (np.asarray, OnlyDLPack):
        for n_worker in (1, 2):
            call_everything(dtype, lend, n_worker)
call_badly()
_core.scorers(), _core.isas(), _core.build_info()
gc.collect()
print("called everything under", _core.isa())
