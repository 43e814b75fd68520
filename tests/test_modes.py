"""Modes of a sweep, written as one word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpitfalls as kvp
from kvpitfalls import Fair
from kvpitfalls.experiments.modes import Mode
from kvpitfalls.experiments.plan import Setting
from kvpitfalls.policies import policy_names
from kvpitfalls.policies.random import Random


@pytest.mark.parametrize(
    ("mode", "fair", "protect"),
    [
        ("biased", Fair(strength=0), None),
        ("fair", Fair(), None),
        ("paper", Fair(rule="paper"), None),
        ("lambda=0.5", Fair(strength=0.5), None),
        ("whitelist", Fair(strength=0), ["the phrase"]),
        ("whitelist_defense", Fair(strength=0), ["defense"]),
        ("sinks=2", Fair(strength=0), [0, 1]),
        ("fair+whitelist", Fair(), ["the phrase"]),
        ("boundary", Fair(strength=0), ["boundary"]),
        ("fair+boundary", Fair(), ["boundary"]),
        ("floor=8", Fair(strength=0, min_tokens=8), None),
        ("floor=4+sinks=1+boundary+whitelist", Fair(strength=0, min_tokens=4), ["the phrase", 0, "boundary"]),
        ("fair+absorb", Fair(template="absorb"), None),
        ("lambda=0.25+separate+sinks=1+whitelist", Fair(strength=0.25, template="separate"), ["the phrase", 0]),
        ("fair+min=4+defense=2+directive=0.5", Fair(min_tokens=4, weights={"defense": 2, "directive": 0.5}), None),
    ],
)
def test_a_mode_is_what_wrap_would_be_given(mode, fair, protect):
    evict = Setting("snapkv", Mode.parse(mode).name, 0.5).evict("the phrase")
    assert (evict.policy.name, evict.fair, evict.protect, evict.compression_ratio) == ("snapkv", fair, protect, 0.5)
    assert Mode.parse(mode).name == mode


def _written(strength: float, weight: float, n: int) -> str:
    return f"lambda={strength:.12f}+min={n}+defense={weight:.9f}+sinks={n}"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (0.5, "lambda=0.5"),
        (1, "lambda=1"),
        ("lambda=0.50", "lambda=0.5"),
        ("whitelist+sinks=1+separate+fair", "fair+separate+sinks=1+whitelist"),
        ("biased+sinks=04", "sinks=4"),
        ("phrase", "whitelist"),
        ("fair_phrase", "fair+whitelist"),
        (1e-5, "lambda=0.00001"),
        (-0.0, "lambda=0"),
        (np.float32(0.1), "lambda=0.1"),
        ("fair+min=2000001", "fair+min=2000001"),
        ("random", "random"),
        ("random=0", "random"),
        ("random=07", "random=7"),
        ("floor", "floor=4"),
        ("pinned", "whitelist_defense"),
        ("boundary+pinned+fair", "fair+boundary+whitelist_defense"),
    ],
)
def test_a_mode_has_one_name(said, name):
    assert Mode.parse(said).name == name


@given(
    st.one_of(st.floats(0, 1), st.builds(_written, st.floats(1e-9, 1), st.floats(0, 1e9), st.integers(0, 10**9 - 1)))
)
def test_the_name_of_a_mode_is_that_mode(mode):
    """A sweep checks its modes when it is made, and reads them from their names when it is run."""
    parsed = Mode.parse(mode)
    assert Mode.parse(parsed.name) == parsed


@pytest.mark.parametrize(
    "said",
    [
        "",
        "unfair",
        "fair+biased",
        "fair+fair",
        "lambda=2",
        "lambda=x",
        "lambda=",
        "whitelist+whitelist_defense",
        "paper+whitelist",
        "sinks=-1",
        "random=",
        "random=-1",
        "random=1.5",
        "random+whitelist",
        "random=1+whitelist",
        "random+whitelist",
        "fair_phrase+sinks=1",
    ]
    + [
        "sinks=1.5",
        f"sinks={10**400}",
        f"fair+defense={10**400}",
        "separate",
        "absorb",
        "fair+absorb+separate",
        "whitelist+min=4",
        "lambda=0+defense=2",
        "fair=1",
        "floor=0",
        "floor=4+min=2",
        "floor+fair",
        "floor+defense=2",
        "pinned+whitelist",
        None,
        True,
        1.5,
        -0.1,
    ],
)
def test_other_modes_are_refused(said):
    with pytest.raises(ValueError, match=r"modes hold .*; expected some of biased, fair, paper"):
        Mode.parse(said)


def test_the_control_draws_at_random_whatever_the_policy():
    for mode, seed in {"random": 0, "random=7": 7}.items():
        evict = Setting("snapkv", mode, 0.5).evict("the phrase")
        assert (evict.policy, evict.fair, evict.protect) == (Random(seed), Fair(strength=0), None)
    assert "random" not in policy_names()


def test_draws_of_other_seeds_agree_as_often_as_chance_has_it():
    """Of 4,096 draws of half of 64 tokens, two seeds share 16 in the mean; the bound is six standard errors of that."""
    keys = np.random.default_rng(0).standard_normal((64, 64, 64, 8), dtype=np.float32)
    drawn = [
        kvp.keep(Setting("snapkv", mode, 0.5).evict(None).policy, keys, budget=32).positions
        for mode in ("random", "random=1")
    ]
    is_kept = [np.zeros((64, 64, 64), bool) for _ in drawn]
    for held, positions in zip(is_kept, drawn, strict=True):
        np.put_along_axis(held, np.asarray(positions), True, -1)
    shared = (is_kept[0] & is_kept[1]).sum(-1)
    error = np.sqrt(32 * 32 * 32 * 32 / (64**2 * 63)) / 64
    assert abs(shared.mean() - 16) < 6 * error and (shared < 32).all()


def test_a_phrase_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="mode 'sinks=1\\+whitelist' protects the defense's phrase, and there is none"):
        Setting("tova", "sinks=1+whitelist", 0.5).evict(None)
