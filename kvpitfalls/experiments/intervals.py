"""95 % confidence intervals of means over prompts: of shares, of unbounded scores, of their ratios, and of paired
differences. How often each holds what is true, and where it does not, stands in ``docs/experiments.md``.

Prompts are the units: what one prompt gives (several attacks, several instructions) hangs together. Attacks are not:
they are those that were asked, and other attacks may differ by more than an interval says. All hold where a percentile
bootstrap does not: few prompts, and shares near 0 and 1, where it gives [0, 0]. What is skewed and without bounds needs
more prompts: in simulation the interval of lognormal scores holds the mean in 83 % of runs at 3 prompts, 87 % at 24,
90 % at 68. Nothing helps where few prompts are far from all others and none of them was seen: of likelihoods that one
prompt in twenty changes by much the paired interval holds the mean in 39 % at 10 prompts, 63 % at 20, 97 % at 68.
"""

import functools
import math

import numpy as np

LEVEL = 0.95


@functools.lru_cache(4096)
def t_quantile(n: int, level: float = LEVEL) -> float:
    """Student's two-sided quantile for ``n`` units: where a share ``level`` of his distribution of n - 1 degrees of
    freedom lies, found by halving."""
    if n < 2:
        return math.inf
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # as far as halving goes in double precision
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, n - 1) < level else (low, middle)
    return math.sqrt(n - 1) * math.tan(low)


def _t_share(angle: float, freedom: int) -> float:
    """The share of Student's distribution within +-t, with ``angle`` = arctan(t / sqrt(freedom)): a finite sum
    (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    steps = np.arange(2 + freedom % 2, freedom - 1, 2)
    terms = np.cumprod(np.concatenate([[1.0], (steps - 1) / steps * cosine**2]))
    if freedom % 2 == 0:
        return sine * float(terms.sum())
    return 2 / math.pi * (angle + (sine * cosine * float(terms.sum()) if freedom > 1 else 0.0))


def influence(values: np.ndarray) -> np.ndarray:
    """What each prompt adds to a ratio of sums, so that the ratio's error is that of their mean.

    Parameters
    ----------
    values : ndarray (n, 2)
        Per prompt, a sum and a count.

    Returns
    -------
    ndarray (n,)
        Their mean is the ratio; for equal counts they are the prompts' own means.
    """
    ratio = values[:, 0].sum() / values[:, 1].sum()
    return ratio + (values[:, 0] - ratio * values[:, 1]) / values[:, 1].mean()


def share_interval(values: np.ndarray, counted: bool = True) -> tuple[float, float]:
    """Interval of a share: a ratio of sums whose items lie in [0, 1].

    Wilson's score interval (1927) with Student's quantile, and with as many units as independent answers would need for
    the variance found between prompts (the effective sample size of Korn and Graubard 1998, Survey Methodology 24).
    Where no variance shows, as at 0 and 1, a prompt counts as one answer; and so it does with a weight of 1 / sqrt(n)
    everywhere, since the variance of few prompts is itself uncertain (else coverage is 88 % at n = 20, share .05, 12
    answers a prompt that correlate by .5).

    Parameters
    ----------
    values : ndarray (n, 2)
        Per prompt, a sum and a count.
    counted : bool
        Whether each item is 0 or 1, so that there are never more units than answers. Of others, such as recalls, a
        prompt is one unit at most: prompts that all leak a little do not say how many leak everything.

    Raises
    ------
    ValueError
        If it is no share: a metric of another kind is not in ``kvpitfalls.experiments.metrics.scale``.
    """
    n, share = len(values), values[:, 0].sum() / values[:, 1].sum()
    if not -1e-9 <= share <= 1 + 1e-9:  # sums of shares round
        raise ValueError(f"the mean of a share is {share:g}; expected a number in [0, 1], or a metric of another scale")
    between = influence(values).var(ddof=1) / n if n > 1 else 0.0
    within = share * (1 - share)
    answers = within / between if within > 1e-12 and between > 1e-12 else n
    answers = min(answers, values[:, 1].sum() if counted else n)
    answers = 1 / ((1 - n**-0.5) / answers + n**-0.5 / n)
    t = min(t_quantile(n), t_quantile(2))
    middle = (share + t**2 / (2 * answers)) / (1 + t**2 / answers)
    half = t / (1 + t**2 / answers) * np.sqrt(within / answers + t**2 / (4 * answers**2))
    return float(max(min(middle - half, share), 0.0)), float(min(max(middle + half, share), 1.0))


def mean_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Student's interval of a ratio of sums without bounds, such as a mean log-likelihood; None for prompts without
    spread, such as one alone, or all whose answers were cut off at the limit: nothing tells how far others are."""
    n = len(values)
    spread = influence(values).std(ddof=1) if n > 1 else 0.0
    middle = values[:, 0].sum() / values[:, 1].sum()
    if spread <= 1e-12 * abs(middle):
        return None, None
    half = t_quantile(n) * spread / np.sqrt(n)
    return float(middle - half), float(middle + half)


def ratio_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Fieller's interval (1954, J. R. Stat. Soc. B 16) of a ratio of sums whose denominators are uncertain, too, and
    may be below 0; None where these are not told from 0, since the ratio may then be anything.

    Two more prompts join them, as in :func:`paired_interval`, of the mean denominator: the numerator of one exceeds
    what the ratio says by all of that, that of the other is as far below. Prompts that are all alike are else as sure
    as if there were no others. It does not hold where few prompts lose many times as much as the others and none of
    them was seen, nor, at few prompts, where it was chance that told the loss from 0.
    """
    n = len(values)
    if n < 2 or abs(values[:, 1].mean()) <= t_quantile(n) * values[:, 1].std(ddof=1) / math.sqrt(n):
        return None, None
    above, below = values.mean(0)
    joined = np.concatenate([values, [(above + below, below), (above - below, below)]])
    covariance = np.cov(joined.T, bias=True) * t_quantile(n + 2) ** 2 / (n + 2)
    square = below**2 - covariance[1, 1]
    middle = (above * below - covariance[0, 1]) / square
    half = math.sqrt(max(middle**2 - (above**2 - covariance[0, 0]) / square, 0.0))
    return float(middle - half), float(middle + half)


def paired_interval(parts: np.ndarray, bound: float = 1.0) -> tuple[float, float]:
    """Interval of the mean of what each prompt changes, inside [-bound, bound].

    Two more prompts join them, one that gains and one that loses as much as any, and no less than 1 where there is a
    bound: the interval of Bonett and Price (2012, J. Educ. Behav. Stat. 37) where a prompt changes by -1, 0 or 1. A fix
    that changes nothing gets an interval around 0, not [0, 0]; and one that changes many prompts by little gets none
    that is narrower than that, since a rare prompt that changes by much may not be among those that were seen.

    Parameters
    ----------
    parts : ndarray (n,)
        Such as :func:`influence` on one side less that on the other.
    bound : float
        The most that the mean can change: 1 for shares, infinite for log-likelihoods.
    """
    return around(float(parts.mean()), paired_error(parts, bound), len(parts), bound)


def paired_error(parts: np.ndarray, bound: float = 1.0) -> float:
    """The standard error that :func:`paired_interval` has."""
    most = np.abs(parts).max()
    most = max(most, 1.0) if bound < math.inf else most
    return float(np.concatenate([parts, [-most, most]]).std() / math.sqrt(len(parts) + 2))


def around(difference: float, error: float, n: int, bound: float = 1.0, n_compared: int = 1) -> tuple[float, float]:
    """The interval of :func:`paired_interval`, of a mean over ``n`` prompts and its :func:`paired_error`.

    Of ``n_compared`` differences that are chosen from (the largest, say) the intervals hold all together with 95 %, by
    Bonferroni: so also the one of the chosen.
    """
    middle, half = difference * n / (n + 2), t_quantile(n + 2, 1 - (1 - LEVEL) / n_compared) * error
    return float(max(middle - half, -bound)), float(min(middle + half, bound))
