"""A figure of a report is what anybody makes of its records by the words of the docs."""

import functools
import operator
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from kvpitfalls.audits.leakage import OUTCOMES
from kvpitfalls.experiments import metrics, summary

WHERE = {
    "model": "m",
    "dataset": "own",
    "defense": "refuse",
    "order": "defense_first",
    "policy": "snapkv",
    "mode": "biased",
    "compression_ratio": 0.5,
    "attack": "verbatim-1",
    "error": None,
    "infeasible": None,
    "kept": {"defense": 0.5},
}


def drawn(rng, key):
    """A prompt's records, of any scores."""
    share = lambda: {name: float(rng.random()) for name in ("rouge1", "rougeL")}  # noqa: E731
    n, answers = int(rng.integers(1, 4)), []
    attack = {"leak": {name: share() for name in ("directive", "own", "defended", "defense")}}
    attack |= {"floor": {"own": share(), "defense": share()}, "outcome": str(rng.choice(OUTCOMES))}
    follow = {rule: [bool(x) for x in rng.integers(2, size=n)] for rule in ("strict", "loose")}
    follow |= {"instructions": ["a:b"] * n, "refused": bool(rng.integers(2))}
    for kind, scores in (("attack", attack), ("recall", {"recall": share(), "floor": share()}), ("follow", follow)):
        more = {"n_new": int(rng.integers(1, 9)), "ended": bool(rng.integers(2))}
        answers.append({**WHERE, "key": key, "kind": kind, "scores": scores, **more})
    return answers


@pytest.mark.parametrize("seed", range(3))
def test_every_mean_is_what_the_docs_say_records_add(seed):
    """By its table alone: paths of a record's scores, and the few words around them."""
    rng = np.random.default_rng(seed)
    records = [answer for key in range(7) for answer in drawn(rng, key)]
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("attack", "recall", "follow")}
    task = {r["key"]: r["scores"]["refused"] for r in of["follow"]}

    follows = {key: 0 if task[key] else np.mean(r["scores"]["strict"]) for r in of["follow"] for key in [r["key"]]}

    def at(kind, path):
        return [functools.reduce(operator.getitem, path.split("."), r) for r in of[kind]]

    def less(kind, path, floor):
        return np.subtract(at(kind, f"scores.{path}.rougeL"), at(kind, f"scores.{floor}.rougeL"))

    expected = {outcome: [x == outcome for x in at("attack", "scores.outcome")] for outcome in OUTCOMES}
    expected |= {
        "guarded": [r["scores"]["outcome"] == "refused" and not task[r["key"]] for r in of["attack"]],
        "guarded_follow": [(r["scores"]["outcome"] == "refused") * follows[r["key"]] for r in of["attack"]],
        "leak": at("attack", "scores.leak.directive.rougeL"),
        "leak_rouge1": at("attack", "scores.leak.directive.rouge1"),
        "leak_above": less("attack", "leak.own", "floor.own"),
        "leak_defense": at("attack", "scores.leak.defense.rougeL"),
        "leak_defense_above": less("attack", "leak.defense", "floor.defense"),
        "leak_defended": at("attack", "scores.leak.defended.rougeL"),
        "recall": at("recall", "scores.recall.rougeL"),
        "recall_above": less("recall", "recall", "floor"),
        "refused_task": at("follow", "scores.refused"),
    }
    for rule, end in (("strict", ""), ("loose", "_loose")):
        of_each = [[x and not r["scores"]["refused"] for x in r["scores"][rule]] for r in of["follow"]]
        expected |= {f"follow{end}": list(chain(*of_each)), f"follow_prompt{end}": [all(x) for x in of_each]}
    for kind in of:
        expected |= {f"length_{kind}": at(kind, "n_new"), f"capped_{kind}": [not x for x in at(kind, "ended")]}
    (cell,) = summary.summarize(records)
    means = {name: metric["mean"] for name, metric in cell["metrics"].items()}
    assert means == {name: pytest.approx(np.mean(x), abs=1e-12) for name, x in expected.items()}


def test_every_metric_is_in_the_table_of_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.partition("| metric | kind |")[2].split("\n\n")[0].splitlines()[2:]]
    told = {name for row in rows for name in row.replace("`", "").replace(" ", "").split(",")}
    patterns = [re.sub("KIND|NAME", r"\\w+", name) for name in told]
    other = [name for name in metrics.METRICS if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert all(name.startswith("turn") for name in other), "those have a section of their own"
