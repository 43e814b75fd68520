"""Intervals: what they must hold in simulation, at the edges, and against scipy."""

import numpy as np
import pytest
from scipy import stats

from kvpitfalls.experiments import intervals

RUNS = 4000


def drawn(share, n, per_prompt, alike, seed):
    """RUNS experiments of n prompts, per_prompt answers each; ``alike``: how a prompt's answers correlate
    (beta-binomial)."""
    rng = np.random.default_rng(seed)
    size = 1 / alike - 1 if alike else np.inf
    of_prompt = rng.beta(share * size, (1 - share) * size, (RUNS, n)) if alike else np.full((RUNS, n), share)
    return np.stack([rng.binomial(per_prompt, of_prompt), np.full((RUNS, n), per_prompt)], -1).astype(float)


@pytest.mark.parametrize("n", [20, 34, 100])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("per_prompt", "alike"), [(1, 0), (4, 0), (4, 0.3), (12, 0.5)])
def test_shares_are_covered(share, n, per_prompt, alike):
    bounds = np.array([intervals.share_interval(values) for values in drawn(share, n, per_prompt, alike, n)])
    assert np.mean((bounds[:, 0] <= share) & (share <= bounds[:, 1])) >= 0.92


@pytest.mark.parametrize("n", [5, 10, 20, 34, 68, 200])
def test_one_answer_a_prompt_is_covered_but_for_shares_of_a_part_of_one_prompt(n):
    """Exactly, at every share: least just under the share that one prompt of so many leaves out."""
    bounds = [intervals.share_interval(np.stack([np.arange(n) < hits, np.ones(n)], 1) * 1.0) for hits in range(n + 1)]
    low, high = np.array(bounds).T[..., None]
    shares = np.unique(np.concatenate([np.geomspace(1e-4, 0.5, 2000), low[low > 0] - 1e-9, high[high < 1] + 1e-9]))
    held = (stats.binom.pmf(np.arange(n + 1)[:, None], n, shares) * ((low <= shares) & (shares <= high))).sum(0)
    assert held[(shares >= 0.05) & (shares <= 0.95)].min() >= 0.93 and held.min() >= 0.83
    assert (n * np.minimum(shares, 1 - shares))[held < 0.92].max(initial=0) < 1.1


@pytest.mark.parametrize("n", [5, 10, 20, 68, 200])
@pytest.mark.parametrize("much", [0.5, 0.95])
@pytest.mark.parametrize("per_prompt", [1, 12])
def test_recalls_of_which_few_are_large_are_covered(n, much, per_prompt):
    """Most prompts leak next to nothing, few a lot. With more units than prompts the interval holds the share in 66 %
    of runs at 34 prompts or more, of which on average one leaks."""
    rng = np.random.default_rng(n)
    for expected in (0.5, 1.2, 2.5, 4):  # prompts that leak
        rare = rng.random((RUNS // 4, n, 1)) < expected / n
        sums = (rng.uniform(0, 0.02, (*rare.shape[:2], per_prompt)) + much * rare).sum(-1)
        values = np.stack([sums, np.full(sums.shape, per_prompt)], -1)
        bounds = np.array([intervals.share_interval(of_run, counted=False) for of_run in values])
        share = 0.01 + much * expected / n
        assert np.mean((bounds[:, 0] <= share) & (share <= bounds[:, 1])) >= 0.92


@pytest.mark.parametrize("n", [2, 5, 24, 68])
def test_recalls_of_little_are_told_no_better_than_none(n):
    """As a change of little is."""
    none, little = (
        intervals.share_interval(np.stack([x, np.ones(n)], 1), counted=False)
        for x in (np.zeros(n), np.eye(n)[0] * 0.01)
    )
    assert none[1] <= little[1] < none[1] + 0.02


@pytest.mark.parametrize("gain", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_paired_changes_are_covered(share, gain):
    rng, n = np.random.default_rng(7), 20
    before = rng.random((RUNS, n)) < share
    after = before ^ (rng.random((RUNS, n)) < np.where(before, 0.2, (gain + 0.2 * share) / (1 - share)))
    bounds = np.array([intervals.paired_interval(parts) for parts in after.astype(float) - before])
    assert np.mean((bounds[:, 0] <= gain) & (gain <= bounds[:, 1])) >= 0.92


def test_one_answer_a_prompt_is_wilson_with_students_quantile():
    z = intervals.t_quantile(20)
    for hits in (0, 1, 7, 20):
        values = np.stack([np.arange(20) < hits, np.ones(20)], 1).astype(float)
        low, high = intervals.share_interval(values)
        # the score interval's own equation: |p - bound| = z sqrt(bound (1 - bound) / n), n the variance of 20 being
        # over 19
        n = 20 if hits in (0, 20) else 1 / ((1 - 20**-0.5) / 19 + 20**-0.5 / 20)
        for bound in {low, high} - {0.0, 1.0}:
            assert abs(hits / 20 - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / n), abs=1e-9)


# most prompts change by little or not at all, few by much: (how often, by how much), and the noise of the others
RARE = {"one in twenty": (0.05, -0.8, 0.03), "one in fifty": (0.02, 0.9, 0.01), "without noise": (0.05, 0.6, 0.0)}


@pytest.mark.parametrize("n", [3, 10, 24, 68, 200])
@pytest.mark.parametrize("name", RARE)
def test_what_is_rare_and_large_is_covered(n, name):
    """A prompt that changes by much need not be among those that were seen. With two more prompts that change by no
    more than was seen, in place of by 1, the interval holds the mean in 17 % to 75 % of runs at 68 prompts or fewer."""
    rng, (rate, much, noise) = np.random.default_rng(n), RARE[name]
    parts = np.where(rng.random((RUNS, n)) < rate, much, rng.uniform(-noise, noise, (RUNS, n)))
    bounds = np.array([intervals.paired_interval(of_run, 2.0) for of_run in parts])
    assert np.mean((bounds[:, 0] <= rate * much) & (rate * much <= bounds[:, 1])) >= 0.92


@pytest.mark.parametrize("n", [3, 10, 34, 68, 200])
@pytest.mark.parametrize(("most", "few"), [(0.0, 1.0), (1.0, -1.0), (0.3, 1.0), (0.2, -0.8), (0.5, -0.5)])
def test_two_kinds_of_change_are_covered_at_every_share_of_them(n, most, few):
    """Exactly: of prompts that change by ``most``, so many change by ``few``."""
    bounds = [intervals.paired_interval(np.where(np.arange(n) < k, few, most)) for k in range(n + 1)]
    low, high = np.array(bounds).T[..., None]
    shares = np.linspace(0.001, 0.999, 999)
    truth = most + (few - most) * shares
    held = (stats.binom.pmf(np.arange(n + 1)[:, None], n, shares) * ((low <= truth) & (truth <= high))).sum(0)
    assert held.min() >= 0.92


def test_a_change_of_little_is_told_no_better_than_none():
    for n in (5, 24, 68):
        none, little = intervals.paired_error(np.zeros(n)), intervals.paired_error(np.eye(n)[0] * 0.01)
        assert none < little < 1.01 * none
        assert intervals.paired_error(np.eye(n)[0] * 0.01, np.inf) < 0.1 * none, "log-likelihoods have no bound to take"


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 20, 69, 540])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.9995])
def test_the_quantile_is_scipys(n, level):
    assert intervals.t_quantile(n, level) == pytest.approx(stats.t.ppf((1 + level) / 2, n - 1), rel=1e-9)


@pytest.mark.parametrize("n_compared", [4, 24, 120])
def test_intervals_of_all_that_is_compared_hold_together(n_compared):
    """The largest of so many changes, of which all are 0 but for chance: it is told in at most one of twenty runs."""
    rng, n, n_run = np.random.default_rng(n_compared), 68, 400
    told = 0
    for _ in range(n_run):
        parts = rng.choice([-1.0, 0.0, 1.0], (n_compared, n), p=[0.15, 0.7, 0.15])
        bounds = [intervals.around(x.mean(), intervals.paired_error(x), n, 1.0, n_compared) for x in parts]
        told += any(low > 0 or high < 0 for low, high in bounds)
    assert told / n_run <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_run)


@pytest.mark.parametrize("seed", range(5))
def test_a_ratios_interval_holds_what_its_data_do_not_tell_it_from(seed):
    """Fieller's definition: all ratios r at which the mean of above - r below is not told from 0, over the prompts and
    two more of the mean loss, of which one returns all of it more than the mean says, and one all of it less."""
    rng = np.random.default_rng(seed)
    below = rng.normal(2, 1, 20)
    values = np.stack([rng.normal(0.3, 0.3, 20) * below + rng.normal(0, 0.5, 20), below], 1)
    low, high = intervals.ratio_interval(values)
    share, loss = values[:, 0].sum() / below.sum(), below.mean()
    assert low < share < high
    for edge, inside in ((low, 1e-6), (high, -1e-6)):
        for ratio, is_in in ((edge + inside, True), (edge - inside, False)):
            rest = np.append(values[:, 0] - ratio * below, [(share + 1 - ratio) * loss, (share - 1 - ratio) * loss])
            assert (abs(rest.mean()) / rest.std() * np.sqrt(22) < stats.t.ppf(0.975, 21)) == is_in
    assert intervals.ratio_interval(values - [0, values[:, 1].mean()]) == (None, None), "a share of nothing"
    assert intervals.ratio_interval(values[:1]) == (None, None)


@pytest.mark.parametrize("n", [3, 10, 20, 68])
@pytest.mark.parametrize("rare", [0.02, 0.05, 0.2])
def test_a_rare_prompt_of_which_nothing_returns_is_covered(n, rare):
    """Of the others all does. Fieller's interval of the prompts alone holds the share in 17 to 92 % of runs, and is
    [1, 1] wherever none of the rare ones was seen."""
    rng = np.random.default_rng(n)
    below = rng.lognormal(0, 1, (RUNS, n))
    above = below * (rng.random((RUNS, n)) >= rare)
    bounds = [intervals.ratio_interval(np.stack(pair, 1)) for pair in zip(above, below, strict=True)]
    known = np.array([pair for pair in bounds if pair[0] is not None])
    assert np.mean((known[:, 0] <= 1 - rare) & (1 - rare <= known[:, 1])) >= 0.92
    assert (known[:, 1] - known[:, 0]).min() > 4 / (n + 2), "as many prompts alike tell no more than that"


@pytest.mark.parametrize("n", [10, 20, 50])
def test_ratios_far_below_0_are_covered(n):
    """What putting an instruction back at equal memory returns: less than nothing, and more of that where more was
    lost. Student's interval of the linearised ratio holds it in 88 to 92 % of runs."""
    rng = np.random.default_rng(n)
    below = rng.lognormal(0.5, 1, (RUNS, n))
    above = -0.3 * below - rng.lognormal(0, 1, (RUNS, n))
    truth = -0.3 - np.exp(0.5) / np.exp(1.0)
    bounds = [intervals.ratio_interval(np.stack(pair, 1)) for pair in zip(above, below, strict=True)]
    known = np.array([pair for pair in bounds if pair[0] is not None])
    assert len(known) > RUNS / 2 and np.mean((known[:, 0] <= truth) & (truth <= known[:, 1])) >= 0.94


@pytest.mark.parametrize("bound", [1.0, 2.0])
def test_no_mean_changes_by_more_than_it_can(bound):
    rng = np.random.default_rng(9)
    for n in (1, 2, 5, 20):
        for parts in (np.full(n, bound), np.full(n, -bound), rng.uniform(-bound, bound, n)):
            low, high = intervals.paired_interval(parts, bound)
            assert -bound <= low <= min(parts.mean(), high) <= max(parts.mean(), low) <= high <= bound


@pytest.mark.parametrize("of_each", [2.5, -0.1, np.nan])
def test_what_is_no_share_has_no_interval_of_shares(of_each):
    with pytest.raises(ValueError, match=r"the mean of a share is .*; expected a number in \[0, 1\]"):
        intervals.share_interval(np.array([[of_each, 1.0], [of_each, 1.0]]))
    thirds = np.tile([3 * 0.1, 0.3], (7, 1))  # a sum of 0.1 is over 0.3 in the last bit
    assert intervals.share_interval(thirds)[1] == 1


def test_edges_have_intervals():
    none = np.stack([np.zeros(20), np.ones(20)], 1)
    assert intervals.share_interval(none)[0] == 0 and 0.1 < intervals.share_interval(none)[1] < 0.2
    low, high = intervals.paired_interval(np.zeros(20))  # a fix that changes nothing
    assert low == pytest.approx(-high) and 0.05 < high < 0.2
    low, high = intervals.share_interval(none[:1])  # one prompt tells next to nothing
    assert high > 0.9


@pytest.mark.parametrize("seed", range(20))
def test_more_answers_of_the_same_prompt_are_no_more_prompts(seed):
    values = np.random.default_rng(seed).random((12, 1)).round(1) * [1, 0] + [0, 1]
    of_shares = intervals.share_interval(values, counted=False)
    assert intervals.share_interval(values * 7, counted=False) == pytest.approx(of_shares)
    half = np.tile([0.5, 1.0], (12, 1)) + np.eye(12, 2)[:, ::-1] * [0.5, 0]  # twice as much is whole, and no count
    assert intervals.share_interval(half * 2, counted=False) == pytest.approx(
        intervals.share_interval(half, counted=False)
    )
    assert intervals.mean_interval(values * 7) == pytest.approx(intervals.mean_interval(values))


def test_unbounded_means_are_students():
    x = np.random.default_rng(2).normal(-3, 2, 15)
    theirs = stats.t.interval(0.95, 14, x.mean(), stats.sem(x))
    assert intervals.mean_interval(np.stack([x, np.ones(15)], 1)) == pytest.approx(theirs, rel=1e-4)
    assert intervals.mean_interval(np.ones((1, 2))) == (None, None)


@pytest.mark.parametrize("n", [1, 2, 10, 200])
@pytest.mark.parametrize("length", [0.0, 0.1, 64.0, -3.3])
def test_prompts_that_are_all_alike_do_not_say_how_far_others_are(n, length):
    """Such as answers that were all cut off at the limit: no interval, and none that is as narrow as rounding."""
    assert intervals.mean_interval(np.stack([np.full(n, 3 * length), np.full(n, 3)], 1)) == (None, None)
    for values in (np.zeros(n), np.ones(n)):
        low, high = intervals.share_interval(np.stack([values, np.ones(n)], 1))
        assert high - low > 1 / (n + 2)


@pytest.mark.parametrize("seed", range(10))
def test_influences_add_up_to_the_ratio(seed):
    rng = np.random.default_rng(seed)
    values = np.stack([rng.random(9), rng.integers(1, 5, 9)], 1)
    assert intervals.influence(values).mean() == pytest.approx(values[:, 0].sum() / values[:, 1].sum())
    values[:, 1] = 3
    assert intervals.influence(values) == pytest.approx(values[:, 0] / 3)
