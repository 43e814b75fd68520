"""Kept sets against kvpress 0.5.5's own presses on the same keys (benchmarks/kvpress_golden.py recorded them)."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import kvpitfalls as kvp

ROOT = Path(__file__).parent.parent
RECORDED = np.load(Path(__file__).parent / "data" / "kvpress.npz")
NEAR_TIE = 1e-6  # scores this close on both sides of the cut: rounding decides, and theirs is another


def recorder():
    """The script itself, without kvpress: it says what was drawn."""
    spec = importlib.util.spec_from_file_location("kvpress_golden", ROOT / "benchmarks" / "kvpress_golden.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kvpress", types.SimpleNamespace(KeyDiffPress=None))
        spec.loader.exec_module(module)
    return module


SCRIPT = recorder()


@pytest.mark.parametrize("policy", ["keydiff"])
def test_we_keep_what_kvpress_keeps(policy):
    n_head, n_tie = 0, 0
    for seed, heads, n_token, n_dim, _, kind in SCRIPT.CASES:
        theirs = RECORDED[f"{policy}_{seed}"]
        keys = SCRIPT.keys_of(seed, heads, n_token, n_dim, kind)
        ours = kvp.keep(policy, keys, budget=theirs.shape[1])
        for head in range(heads):
            order = np.sort(ours.scores[0, head])[::-1]
            is_tie = order[theirs.shape[1] - 1] - order[theirs.shape[1]] <= NEAR_TIE
            n_head, n_tie = n_head + 1, n_tie + is_tie
            assert is_tie or np.array_equal(ours.positions[0, head], theirs[head]), (seed, head)
    assert n_head >= 2000 and n_tie <= n_head / 500
