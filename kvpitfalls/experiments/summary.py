"""Records into numbers: means and accuracies, with intervals. What is compared with what is in ``comparisons.py``.

Items without scores are in no mean; how many failed, and how many were infeasible, stands beside every mean.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import numpy as np

from ..audits.following import accuracies
from ..audits.leakage import mostly_seen
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


def other_scripts(records: Sequence[Mapping]) -> str:
    """A sentence where answers to attacks or of the control are mostly in letters that ROUGE does not see; else
    empty."""
    said = [r["output"] for r in records if r["kind"] in ("attack", "recall") and r["output"] is not None]
    n = sum(re.search(r"[^\W_]", answer) is not None and not mostly_seen(answer) for answer in said)
    if n == 0:
        return ""
    return (
        f"{n} of {len(said)} answers to attacks and of the control are mostly in other letters than a-z: ROUGE sees no "
        "leak and no recall in them, and refusals are read in six languages of Latin letters, so that 'complied' says "
        "little of them."
    )


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
    low, high = INTERVALS[scale(metric)](values)
    return {"mean": float(values[:, 0].sum() / values[:, 1].sum()), "low": low, "high": high, "n_prompt": len(values)}


INTERVALS: Mapping[str, Callable[[np.ndarray], tuple]] = {  # by the scale of a metric
    "yes or no": share_interval,
    "share": lambda values: share_interval(values, counted=False),
    "signed": lambda values: paired_interval(influence(values)),
    "unbounded": mean_interval,
}


def following(records: Sequence[Mapping]) -> list[dict]:
    """Accuracies of instruction following per setting (``kvpitfalls.audits.following.accuracies``); a refusal follows
    nothing.

    Each dict also has ``low`` and ``high`` (95 %, prompts as units), ``n_prompt`` (those that the accuracy is of), and
    ``n_failed`` and ``n_infeasible`` of its setting.
    """
    out = []
    chosen = sorted((r for r in joined(records) if r["kind"] == "follow"), key=_setting_key)
    for _, group in groupby(chosen, key=_setting_key):
        of_setting = list(group)
        setting = {name: of_setting[0][name] for name in SETTING}
        missing = {name: n for name, n in counts(of_setting).items() if name != "n_item"}
        good = [record for record in of_setting if record["scores"] is not None]
        of_prompts: dict[tuple, dict] = {}  # of each accuracy, what a prompt adds to it
        for record in good:
            for cell in _accuracies([record]):
                pairs = of_prompts.setdefault(_accuracy_key(cell), {})
                before = pairs.get(record["key"], (0, 0))
                pairs[record["key"]] = (before[0] + cell["correct"], before[1] + cell["n"])
        for cell in _accuracies(good):
            values = np.array(list(of_prompts[_accuracy_key(cell)].values()), float)
            low, high = share_interval(values)
            out.append({**setting, **cell, "low": low, "high": high, "n_prompt": len(values), **missing})
    return out


def _accuracies(records: Sequence[Mapping]) -> list[dict]:
    rows = [{"instruction_id_list": record["scores"]["instructions"]} for record in records]
    passed = [{rule: followed(record["scores"], rule) for rule in ("strict", "loose")} for record in records]
    return accuracies(rows, passed)


def _accuracy_key(cell: Mapping) -> tuple:
    return tuple(cell[name] for name in ("rule", "group", "level", "name"))


def _setting_key(record: Mapping) -> tuple:
    return tuple(str(record[name]) for name in SETTING)
