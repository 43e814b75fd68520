"""Records into numbers: means with intervals, accuracies, rank correlation. What is compared with what is in
``comparisons.py``.

Items without scores are in no mean; how many failed, and how many were infeasible, stands beside every mean.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import numpy as np

from ..audits.following import accuracies
from ..display.progress import progress
from .intervals import influence, mean_interval, paired_interval, share_interval
from .metrics import GROUP, METRICS, SETTING, by_setting, counts, followed, joined, per_prompt, scale


def summarize(records: Sequence[Mapping]) -> list[dict]:
    """One dict per setting.

    Parameters
    ----------
    records : list of dict
        As a sweep writes them. Its shuffled and unshuffled paper data count as one data set.

    Returns
    -------
    list of dict
        ``model dataset defense order policy mode compression_ratio``; ``metrics``: name -> its mean, 95 % interval and
        number of prompts, with ``n_item``, ``n_failed`` and ``n_infeasible`` of its kind; ``kept``: span -> mean kept
        share over prompts, ``n_prompt_kept``: span -> how many; ``n_prompt``: prompts with a score of any kind.
    """
    cells = []
    for setting, by_kind in progress(by_setting(records).items(), desc="summary, settings"):
        metrics = {
            name: {**counts(by_kind[kind]), **_estimate(per_prompt(by_kind[kind], parts), name)}
            for name, (kind, parts) in METRICS.items()
            if kind in by_kind
        }
        together = [record for of_kind in by_kind.values() for record in of_kind]
        n_prompt = len({record["key"] for record in together if record["scores"] is not None})
        kept = _kept(together)
        cells.append(
            {
                **dict(zip(SETTING, setting, strict=True)),
                "metrics": metrics,
                "kept": {span: float(np.mean(shares)) for span, shares in kept.items()},
                "n_prompt_kept": {span: len(shares) for span, shares in kept.items()},
                "n_prompt": n_prompt,
            }
        )
    return cells


def attack_families(records: Sequence[Mapping]) -> list[dict]:
    """:func:`summarize` for each family of attacks alone: each dict has a ``family``; recall and following are the
    setting's own."""
    names = dict.fromkeys(_family(r) for r in records if r["kind"] == "attack")
    return [
        {"family": name, **cell}
        for name in names
        for cell in summarize(
            [r for r in records if r["kind"] in ("recall", "follow") or (r["kind"] == "attack" and _family(r) == name)]
        )
    ]


def _family(record: Mapping) -> str:
    return record["attack"].rpartition("-")[0]


def groups(cells: Sequence[Mapping]) -> dict[tuple, list[Mapping]]:
    """Cells by model, dataset, defense and order: one set of figures each."""
    out: dict[tuple, list[Mapping]] = {}
    for cell in cells:
        out.setdefault(tuple(cell[name] for name in GROUP), []).append(cell)
    return out


def _kept(records: Sequence[Mapping]) -> dict[str, list[float]]:
    """Span -> the kept share of each prompt that has one: a mean over its records, which were not all prefilled in one
    batch."""
    shares: dict[str, dict] = {}
    for record in records:
        for span, share in (record["kept"] or {}).items():
            shares.setdefault(span, {}).setdefault(record["key"], []).append(share)
    return {span: [float(np.mean(of_prompt)) for of_prompt in of_span.values()] for span, of_span in shares.items()}


def _estimate(pairs: Mapping, metric: str) -> dict:
    """``mean`` (sum of sums over sum of counts), ``low``, ``high`` (95 %, prompts as units), ``n_prompt``; None without
    scores."""
    if not pairs:
        return {"mean": None, "low": None, "high": None, "n_prompt": 0}
    values = np.array([pairs[key] for key in sorted(pairs, key=str)], float)
    low, high = _INTERVALS[scale(metric)](values)
    return {"mean": float(values[:, 0].sum() / values[:, 1].sum()), "low": low, "high": high, "n_prompt": len(values)}


_INTERVALS: Mapping[str, Callable[[np.ndarray], tuple]] = {
    "share": share_interval,
    "signed": lambda values: paired_interval(influence(values)),
    "unbounded": mean_interval,
}


def following(records: Sequence[Mapping]) -> list[dict]:
    """Accuracies of instruction following per setting (``kvpitfalls.audits.following.accuracies``); a refusal follows
    nothing.

    Each dict also has ``n_prompt``, ``n_failed`` and ``n_infeasible`` of its setting.
    """
    out = []
    chosen = sorted((r for r in joined(records) if r["kind"] == "follow"), key=_setting_key)
    for _, group in groupby(chosen, key=_setting_key):
        of_setting = list(group)
        good = [record for record in of_setting if record["scores"] is not None]
        setting = {name: of_setting[0][name] for name in SETTING}
        rows = [{"instruction_id_list": record["scores"]["instructions"]} for record in good]
        passed = [{rule: followed(record["scores"], rule) for rule in ("strict", "loose")} for record in good]
        missing = {name: n for name, n in counts(of_setting).items() if name != "n_item"}
        out += [
            {**setting, **cell, "n_prompt": len({r["key"] for r in good}), **missing}
            for cell in accuracies(rows, passed)
        ]
    return out


def _setting_key(record: Mapping) -> tuple:
    return tuple(str(record[name]) for name in SETTING)


def rank_correlations(
    cells: Sequence[Mapping], level: str = "family", rule: str = "strict", group: str = "all"
) -> list[dict]:
    """Spearman's rho between the accuracies of instruction classes at a setting and at the full cache (the paper's
    figures 3 and 4).

    Parameters
    ----------
    cells : list of dict
        What :func:`kvpitfalls.experiments.summary.following` gave.
    level : {"family", "id"}
    rule : {"strict", "loose"}
    group : {"all", "single", "multi"}

    Returns
    -------
    list of dict
        The setting, ``rho`` (None where all classes are equal, so that there is no ranking), ``n_class``, ``n_prompt``,
        and the prompts that have no score at the setting and at the full cache, ``n_missing`` and ``n_missing_full``:
        they are in no accuracy.
    """
    vectors: dict[tuple, dict[str, float]] = {}
    prompts: dict[tuple, int] = {}
    missing: dict[tuple, int] = {}
    for cell in cells:
        if (cell["level"], cell["rule"], cell["group"]) == (level, rule, group):
            setting = tuple(cell[name] for name in SETTING)
            vectors.setdefault(setting, {})[cell["name"]] = cell["accuracy"]
            prompts[setting], missing[setting] = cell["n_prompt"], cell["n_failed"] + cell["n_infeasible"]
    out = []
    for setting, here in vectors.items():
        whole = (*setting[: len(GROUP)], None, "full", 0.0)
        full = vectors.get(whole, {})
        names = sorted(here.keys() & full.keys())
        rho = spearman([here[n] for n in names], [full[n] for n in names])
        known = {
            "n_class": len(names),
            "n_prompt": prompts[setting],
            "n_missing": missing[setting],
            "n_missing_full": missing.get(whole),
        }
        out.append({**dict(zip(SETTING, setting, strict=True)), "rho": rho, **known})
    return out


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of ranks, ties sharing their mean rank; None if one side is constant or empty."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(x < v for x in values) + (sum(x == v for x in values) - 1) / 2 for v in values]
