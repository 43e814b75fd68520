"""95 % confidence intervals of means over prompts: of shares, of unbounded scores, and of paired differences.

Prompts are the units: what one prompt gives (several attacks, several instructions) hangs together. All three hold
where a percentile bootstrap does not: few prompts, and shares near 0 and 1, where it gives [0, 0]. What is skewed needs
more prompts than what is counted: in simulation the interval of changes that are small in most prompts and large in few
(beta 0.3, 3) holds the mean in 80 % of runs at 5 prompts, 88 % at 10, 94 % at 20; that of lognormal scores in 83 % at
8, 87 % at 20, 91 % at 60.
"""

from statistics import NormalDist

import numpy as np

LEVEL = 0.95


def t_quantile(n: int) -> float:
    """Student's two-sided quantile for ``n`` units, by its series in 1 / (n - 1); exactly for 2 and 3 units, where that
    is short."""
    if n <= 3:
        return {2: 12.706204736432095, 3: 4.302652729911275}.get(n, np.inf)
    z, nu = NormalDist().inv_cdf((1 + LEVEL) / 2), n - 1
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / nu**i for i, term in enumerate(terms))


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


def share_interval(values: np.ndarray) -> tuple[float, float]:
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
    if np.array_equal(values, np.round(values)):  # yes or no: never more than there were answers
        answers = min(answers, values[:, 1].sum())
    answers = 1 / ((1 - n**-0.5) / answers + n**-0.5 / n)
    t = min(t_quantile(n), t_quantile(2))
    middle = (share + t**2 / (2 * answers)) / (1 + t**2 / answers)
    half = t / (1 + t**2 / answers) * np.sqrt(within / answers + t**2 / (4 * answers**2))
    return float(max(min(middle - half, share), 0.0)), float(min(max(middle + half, share), 1.0))


def mean_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Student's interval of a ratio of sums without bounds, such as a mean log-likelihood; None for one prompt, without
    spread."""
    n = len(values)
    if n < 2:
        return None, None
    middle, half = values[:, 0].sum() / values[:, 1].sum(), t_quantile(n) * influence(values).std(ddof=1) / np.sqrt(n)
    return float(middle - half), float(middle + half)


def paired_interval(parts: np.ndarray, bound: float = 1.0) -> tuple[float, float]:
    """Interval of the mean of what each prompt changes, inside [-bound, bound].

    Two more prompts join them, one that gains and one that loses as much as any: the interval of Bonett and Price
    (2012, J. Educ. Behav. Stat. 37) where a prompt changes by -1, 0 or 1. A fix that changes nothing gets an interval
    around 0, not [0, 0].

    Parameters
    ----------
    parts : ndarray (n,)
        Such as :func:`influence` on one side less that on the other.
    bound : float
        The most that the mean can change: 1 for shares.
    """
    most = np.abs(parts).max()
    parts = np.concatenate([parts, np.array([-1.0, 1.0]) * (most if most > 1e-12 else 1.0)])
    middle, half = parts.mean(), t_quantile(len(parts)) * parts.std() / np.sqrt(len(parts))
    return float(max(middle - half, -bound)), float(min(middle + half, bound))
