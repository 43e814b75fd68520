"""The same kept tokens whatever the instruction set, and the way to choose one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_golden import CASES, NEAR_TIE, Case

from kvpitfalls import _core, ops


def available():
    """The instruction sets that this CPU can run."""
    before, names = _core.isa(), []
    for name in _core.isas():
        try:
            _core.isa_set(name)
        except ValueError:
            continue
        names.append(name)
    _core.isa_set(before)
    return names


def fastest(names):
    """Later ones are faster, but for bfloat16 products on Intel's processors."""
    info = Path("/proc/cpuinfo")
    is_intel = info.exists() and "GenuineIntel" in info.read_text()
    return [name for name in names if not (is_intel and name == "avx512_bf16")][-1]


@pytest.fixture
def isa(request):
    before = _core.isa()
    yield _core.isa_set
    _core.isa_set(before)


@pytest.mark.parametrize("name", CASES)
def test_kept_sets_are_the_same_on_every_instruction_set(isa, name):
    """Wherever the recorded scores decide; scores themselves agree to 1e-5 of each other."""
    kept = {}
    for chosen in available():
        isa(chosen)
        golden = Case(name)
        for run in golden.runs("base", "fair", "whitelist"):
            if (
                run["error"] or run["n_kept"] == 0 or run["i"] % 3
            ):  # a third of the runs: every policy and variant is among them
                continue
            decided = ~golden.data["tie"][run["i"]] & (golden.data["gap"][run["i"]] >= NEAR_TIE)
            kept.setdefault(run["i"], []).append(golden.kept(run).positions[decided])
    assert len(kept) > 5 and {len(per_isa) for per_isa in kept.values()} == {len(available())}
    for per_isa in kept.values():
        assert all(np.array_equal(positions, per_isa[0]) for positions in per_isa)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scorer", ["norm", "attention", "keydiff"])
def test_errors_against_float64(isa, scorer, dtype):
    """Relative 2-norm at most 5e-5 on the same inputs, at a length of several blocks and a head dimension that fills no
    vector."""
    import torch

    from kvpitfalls import reference

    make = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(1, n, 700, 72, generator=make).to(getattr(torch, dtype)) for n in (2, 6))
    given = {
        "norm": {},
        "attention": {"queries": queries, "votes": np.array([[[0, 700, 0, 700, 0, 0, 2, 700, 0, 0]]]), "scaling": 0.3},
        "keydiff": {"votes": np.array([[[0, 700, 0, 0, 0, 0, 0, 0, 0, 0]]])},
    }[scorer]
    exact = reference.score(scorer, keys, **given).double()
    for chosen in available():
        isa(chosen)
        error = (ops.score(scorer, keys, **given).double() - exact).norm() / exact.norm()
        assert error <= 5e-5, (chosen, error)


def test_the_environment_variable_chooses():
    code = "from kvpitfalls import _core; print(_core.isa())"

    def run(isa):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "KVP_ISA": isa}
        )

    for name in available():
        assert run(name).stdout.strip() == name
    assert run("").stdout.strip() == fastest(available()), "the fastest one by default"
    refused = run("mmx")
    assert (
        refused.returncode == 1
        and 'the environment variable KVP_ISA is "mmx"; expected one of scalar' in refused.stderr
    )
