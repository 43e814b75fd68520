"""Records into what may be committed: means, intervals and changes by setting, without texts and without prompts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kvpitfalls.experiments.comparisons import change
from kvpitfalls.experiments.intervals import mean_interval
from kvpitfalls.experiments.metrics import by_setting, most_change, per_prompt, scale
from kvpitfalls.experiments.summary import INTERVALS

FULL = (None, "full", 0.0)
WHERE = ("policy", "mode", "compression_ratio")


def kept(span: str) -> tuple:
    """The metric "share of an instruction that is kept": a mean over layers and heads, then over prompts."""
    return "attack", lambda record: (record["kept"][span], 1)


def sums_of(records: Sequence[Mapping], measured: Mapping[str, tuple]) -> dict[tuple, dict[str, dict]]:
    """(policy, mode, ratio) -> metric -> prompt -> (sum, count)."""
    return {
        setting[-3:]: {name: per_prompt(kinds[kind], of) for name, (kind, of) in measured.items()}
        for setting, kinds in by_setting(records).items()
    }


def settings(sums: Mapping[tuple, Mapping]) -> list[dict]:
    """What names each setting, and its metrics: mean, 95 % interval, number of prompts."""
    return [
        {**dict(zip(WHERE, setting, strict=True)), "metrics": {n: _mean(n, pairs) for n, pairs in metrics.items()}}
        for setting, metrics in sums.items()
    ]


def _mean(metric: str, pairs: Mapping) -> dict:
    if not pairs:
        return {"mean": None, "low": None, "high": None, "n_prompt": 0}
    values = np.array(list(pairs.values()), float)
    low, high = _interval(metric)(values)
    return {"mean": float(values[:, 0].sum() / values[:, 1].sum()), "low": low, "high": high, "n_prompt": len(values)}


def _interval(metric: str) -> Callable:
    """Kept shares are measured and not counted: where all are the same, they have no interval."""
    if metric.startswith("kept_"):
        return lambda values: [x if x is None else min(max(x, 0.0), 1.0) for x in mean_interval(values)]
    return INTERVALS[scale(metric)]


def changes(sums: Mapping[tuple, Mapping], metrics: Iterable[str], pairs: Iterable[tuple]) -> list[dict]:
    """What the first setting of each pair has more than the second, by prompt."""
    return [
        {
            **dict(zip(WHERE, here, strict=True)),
            "than": there[1],
            "metric": metric,
            **change(
                sums[here][metric],
                sums[there][metric],
                {*sums[here][metric], *sums[there][metric]},
                most_change(metric),
            ),
        }
        for here, there in pairs
        for metric in metrics
    ]


def fixes(sums: Mapping[tuple, Mapping]) -> list[tuple]:
    """(a fix, its biased policy), for :func:`changes`."""
    return [
        (setting, (setting[0], "biased", setting[2]))
        for setting in sums
        if setting[1] not in ("biased", "full") and (setting[0], "biased", setting[2]) in sums
    ]


def made_with(meta: Mapping) -> dict:
    """What records depend on, with files by their names: where they lay is nobody's concern."""
    out = dict(meta["same"])
    for name in ("config.models", "model_sources"):
        out[name] = [Path(x).name for x in out[name]]
    out["config.dataset"] = Path(out["config.dataset"]).name
    return out


def rounded(x):
    """Numbers to four places, wherever they stand."""
    if isinstance(x, dict):
        return {name: rounded(y) for name, y in x.items()}
    if isinstance(x, list):
        return [rounded(y) for y in x]
    return round(x, 4) if isinstance(x, float) else x
