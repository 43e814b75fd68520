"""Numbers from records, against plain counts, scipy, and the paper's published score."""

import numpy as np
import pytest
from scipy import stats

from kvpitfalls.display import report_tables, tables
from kvpitfalls.experiments import comparisons, metrics, scenario, summary

# The paper's figure 1, read off by eye at r = 0, 0.05, ..., 0.70: accuracy and leakage, StreamingLLM as published and
# fair.
FIGURE_1 = {
    "standard": (
        [0.855, 0.864, 0.831, 0.821, 0.854, 0.853, 0.798, 0.798, 0.843, 0.853, 0.831, 0.831, 0.831, 0.775, 0.774],
        [0.09, 0.07, 0.07, 0.11, 0.10, 0.20, 0.48, 0.54, 0.61, 0.67, 0.69, 0.69, 0.69, 0.69, 0.52],
    ),
    "fair": (
        [0.855, 0.864, 0.831, 0.864, 0.819, 0.831, 0.853, 0.810, 0.821, 0.886, 0.798, 0.810, 0.842, 0.785, 0.698],
        [0.09, 0.07, 0.07, 0.10, 0.10, 0.13, 0.16, 0.21, 0.25, 0.33, 0.33, 0.17, 0.14, 0.11, 0.08],
    ),
}


def curve(name):
    return {round(0.05 * i, 2): pair for i, pair in enumerate(zip(*FIGURE_1[name], strict=True))}


def test_figure_1_gives_the_published_composite_score():
    mean, std = comparisons.composite(curve("standard"), curve("fair"))
    assert mean == pytest.approx(0.218, abs=0.0005)
    assert abs(mean - 0.2201) < 0.005 and abs(std - 0.0620) < 0.01  # the published entry, StreamingLLM, Llama3, fair
    assert comparisons.composite(curve("standard"), curve("standard")) == (0, 0)
    with pytest.raises(ValueError, match=r"ratio 0\.55 is missing"):
        comparisons.composite(curve("standard"), {r: pair for r, pair in curve("fair").items() if r != 0.55})


def record(key, kind, scores, ratio=0.5, mode="biased", error=None, kept=0.5):
    full = ratio == 0
    where = {
        "model": "m",
        "dataset": "own",
        "defense": "d",
        "order": "defense_first",
        "compression_ratio": ratio,
        "key": key,
        "kind": kind,
    }
    return {
        **where,
        "policy": None if full else "snapkv",
        "mode": "full" if full else mode,
        "attack": "verbatim-1" if kind == "attack" else None,
        "scores": scores,
        "n_new": 5,
        "ended": True,
        "error": error,
        "infeasible": None,
        "kept": None if error else {"defense": kept},
    }


def leak(x, refused=False):
    names, nothing = ("directive", "own", "defended", "defense"), {"rouge1": 0.0, "rougeL": 0.0, "most": 0.0}
    floors, outcome = {"own": nothing, "defense": nothing}, "refused" if refused else "complied"
    return {"leak": {name: {"rouge1": x, "rougeL": x} for name in names}, "floor": floors, "outcome": outcome}


def follow(*passed):
    return {
        "instructions": ["keywords:existence", "punctuation:no_comma"][: len(passed)],
        "strict": list(passed),
        "loose": [True] * len(passed),
        "refused": False,
    }


def test_means_counts_and_failures():
    records = [
        record(1, "attack", leak(0.2)),
        record(1, "attack", leak(0.8, True)),
        record(2, "attack", leak(0.3, True)),
        record(3, "attack", None, error="ValueError: no"),
        record(1, "follow", follow(True, False), kept=0.5),
        record(2, "follow", follow(True), kept=0.9),
    ]
    (cell,) = summary.summarize(records)
    m = cell["metrics"]
    assert m["leak"]["mean"] == pytest.approx((0.2 + 0.8 + 0.3) / 3) and m["leak_above"]["mean"] == m["leak"]["mean"]
    assert m["refused"]["mean"] == pytest.approx(2 / 3) and m["guarded"]["mean"] == pytest.approx(2 / 3)
    assert m["length_attack"]["mean"] == 5 and m["capped_attack"]["mean"] == 0 and cell["n_prompt"] == 2
    assert (m["leak"]["n_item"], m["leak"]["n_failed"], m["leak"]["n_prompt"]) == (4, 1, 2)
    assert (
        m["follow"]["mean"] == pytest.approx(2 / 3)
        and m["follow_prompt"]["mean"] == 0.5
        and m["follow_loose"]["mean"] == 1
    )
    assert "recall" not in m and cell["kept"]["defense"] == pytest.approx((0.5 + (0.5 + 0.9) / 2) / 2)
    assert cell["n_prompt_kept"] == {"defense": 2}, "a failed prompt keeps nothing that is known"
    assert m["leak"]["low"] <= m["leak"]["mean"] <= m["leak"]["high"]


def test_what_is_no_yes_or_no_is_not_counted_as_one():
    """Of answers that recite .37 and keep .37, follow one of three, and refuse: whole are those of yes or no alone."""
    third, part = {**follow(True, False), "strict": [True, False, False]}, {"rouge1": 0.37, "rougeL": 0.37}
    known = {"task_refused": False, "task_followed": 1 / 3, "n_new": 5, "ended": True}
    at = {"outcome": "refused", "recall": part, "floor": part, "kept": {"defense": 0.37, "directive": 0.37}}
    scores = {"attack": leak(0.37, True), "recall": {"recall": part}, "follow": third}
    scores["turns"] = dict.fromkeys(scenario.WAYS, [at] * scenario.N_TURN)
    for metric, (kind, parts) in metrics.METRICS.items():
        if metrics.scale(metric) in ("yes or no", "share"):
            value, count = parts({"scores": scores[kind], **known})
            assert count >= 1 and (value == round(value)) == (metrics.scale(metric) == "yes or no"), metric


def test_all_failed_is_no_number():
    (cell,) = summary.summarize([record(1, "attack", None, error="x")])
    assert cell["metrics"]["leak"] == {
        **{"n_item": 1, "n_failed": 1, "n_infeasible": 0},
        **{"mean": None, "low": None, "high": None, "n_prompt": 0},
    }


def test_shuffled_paper_data_is_the_same_data():
    one, two = record(1, "attack", leak(0.5)), record(1, "follow", follow(True))
    cells = summary.summarize([{**one, "dataset": "paper_shuffled"}, {**two, "dataset": "paper"}])
    assert len(cells) == 1 and {"leak", "follow"} <= set(cells[0]["metrics"])


def test_differences_are_paired_and_say_who_is_missing():
    full = [record(k, "attack", leak(x), ratio=0.0) for k, x in ((1, 0.1), (2, 0.2), (3, 0.9))]
    here = [record(1, "attack", leak(0.5)), record(2, "attack", leak(0.4)), record(3, "attack", None, error="x")]
    compared = {d["metric"]: d for d in comparisons.differences([*full, *here])}
    assert compared["leak"]["difference"] == pytest.approx((0.4 + 0.2) / 2), (
        "the prompt that failed must not pull the baseline"
    )
    assert (compared["leak"]["n_prompt"], compared["leak"]["n_left_out"]) == (2, 1)
    assert compared["leak"]["low"] < 0.3 < compared["leak"]["high"]


def attacked(key, scores, **where):
    """A record for each attack on a prompt; None where it failed."""
    records = [record(key, "attack", x, error=None if x else "x", **where) for x in scores]
    return [{**r, "attack": f"verbatim-{i}"} for i, r in enumerate(records)]


def test_a_policy_that_changes_nothing_has_changed_nothing_whichever_attacks_failed():
    """Differences, losses and fixes: the hard attack of prompt 1 failed here, the easy one of prompt 2 there."""
    easy, hard = leak(0.1, refused=True), leak(0.9)
    settings = ((0.0, "full"), (0.5, "biased"), (0.5, "fair"))
    tasks = [record(k, "follow", follow(True), ratio, mode) for k in range(4) for ratio, mode in settings]
    full = [attacked(k, [None if k == 2 else easy, hard], ratio=0.0) for k in range(4)]
    here = [attacked(k, [easy, None if k == 1 else hard]) for k in range(4)]
    fix = [attacked(k, [easy, hard], mode="fair") for k in range(4)]
    records = sum([*full, *here, *fix], tasks)
    for row in (*comparisons.differences(records), *comparisons.fixes(records)):
        assert (row["difference"], row["n_prompt"], row["n_left_out"]) == (0, 4, 0), row
    unpaired = {d["mode"]: d["n_unpaired"] for d in comparisons.differences(records) if d["metric"] == "leak"}
    assert unpaired == {"biased": 2, "fair": 1}
    for lost in comparisons.losses(records):
        assert (lost["safety_loss"], lost["selective"], lost["n_prompt"]) == (0, 0, 4)


def test_a_mean_and_its_change_are_one_estimand():
    """follow 1.0 -> 0.5 has changed by -0.5, however many instructions each prompt has."""
    answered = {1: (4, 0), 2: (1, 1), 3: (1, 1), 4: (2, 2)}
    records = [record(k, "follow", follow_many(n, n), ratio=0.0) for k, (n, _) in answered.items()]
    records += [record(k, "follow", follow_many(n, good)) for k, (n, good) in answered.items()]
    means = {cell["compression_ratio"]: cell["metrics"]["follow"]["mean"] for cell in summary.summarize(records)}
    changed = {d["metric"]: d["difference"] for d in comparisons.differences(records)}
    assert means == {0.0: 1.0, 0.5: 0.5} and changed["follow"] == -0.5


def follow_many(n, good):
    return {
        "instructions": ["keywords:existence"] * n,
        "strict": [i < good for i in range(n)],
        "loose": [True] * n,
        "refused": False,
    }


def test_no_number_depends_on_the_order_of_the_records():
    """Of records of one prompt that do not agree, as two batches may keep other tokens, all count."""
    rng, records = np.random.default_rng(4), []
    for ratio in (0.0, 0.5):
        for key in range(7):
            kept = rng.random(2).round(2).tolist()
            records.append(record(key, "attack", leak(rng.random(), key % 2 == 0), ratio, kept=kept[0]))
            records.append(record(key, "follow", follow(*(rng.random(2) < 0.5).tolist()), ratio, kept=kept[1]))
    records[3] = {**records[3], "scores": None, "error": "x"}
    mixed = [records[i] for i in rng.permutation(len(records))]
    for numbers in (summary.summarize, comparisons.differences, comparisons.losses, comparisons.flips):
        one, other = ({_named(row): row for row in numbers(some)} for some in (records, mixed))
        assert one.keys() == other.keys() and one
        for name, row in one.items():
            _check_same(row, other[name])


def _named(row):
    return tuple(row.get(name) for name in ("compression_ratio", "metric", "kind", "was", "is"))


def _check_same(one, other):
    for name, value in one.items():
        if isinstance(value, dict):
            _check_same(value, other[name])
        else:
            assert other[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_lengths_that_do_not_change_have_no_interval():
    """It was made of 1 to either side, whatever the unit: a token or a nat. Shares can change by no more than that."""
    records = [{**record(k, "attack", leak(0.1), ratio), "n_new": 30 + k} for ratio in (0.0, 0.5) for k in range(4)]
    for longer in (0, 3):
        changed = {row["metric"]: row for row in comparisons.differences(records)}
        length = changed["length_attack"]
        assert length["difference"] == pytest.approx(longer) and (length["low"] is None) == (longer == 0)
        assert length["low"] is None or length["low"] < longer < length["high"]
        assert changed["refused"]["low"] < 0 < changed["refused"]["high"]
        records = records[:4] + [{**r, "n_new": r["n_new"] + 3} for r in records[4:]]


def test_every_comparison_says_what_it_leaves_out():
    """Five prompts; one has no task on one side, another no attack on the other."""
    failed = {"scores": None, "error": "x", "kept": None}
    records = [record(key, "attack", leak(0.2, key > 1), ratio) for ratio in (0.0, 0.5) for key in range(5)]
    records += [record(key, "follow", follow(True, False), ratio) for ratio in (0.0, 0.5) for key in range(5)]
    records[0] |= failed  # an attack with the full cache
    records[-1] |= failed  # a task at .5
    (lost,) = comparisons.losses(records)
    assert (lost["n_prompt"], lost["n_left_out"]) == (3, 2)
    of_kinds = {flip["kind"]: (flip["n_unpaired"], flip["of"]) for flip in comparisons.flips(records)}
    assert of_kinds["attack"][0] == of_kinds["follow"][0] == 1
    changed = {row["metric"]: (row["n_prompt"], row["n_left_out"]) for row in comparisons.differences(records)}
    assert changed["refused"] == changed["follow"] == (4, 1)
    table = report_tables.loss_table([lost])
    assert table.rows[0][table.header.index("left out")] == "2"


def test_families_of_attacks_are_told_apart():
    said = {"role_play-1": 0.1, "role_play-2": 0.3, "verbatim-1": 0.9}
    attacks = [{**record(1, "attack", leak(x)), "attack": name} for name, x in said.items()]
    failed = {**record(2, "attack", None, error="x"), "attack": "verbatim-3"}
    cells = {
        c["family"]: c["metrics"]
        for c in summary.attack_families([*attacks, failed, record(1, "follow", follow(True))])
    }
    assert {name: m["leak"]["mean"] for name, m in cells.items()} == {
        "role_play": pytest.approx(0.2),
        "verbatim": pytest.approx(0.9),
    }
    assert {name: (m["leak"]["n_item"], m["leak"]["n_failed"]) for name, m in cells.items()} == {
        "role_play": (2, 0),
        "verbatim": (2, 1),
    }
    assert all(m["follow"]["mean"] == 1 for m in cells.values())


def test_following_counts_failures_in_every_row():
    cells = summary.following([record(1, "follow", follow(True, False)), record(2, "follow", None, error="x")])
    assert cells and all(c["n_failed"] == 1 for c in cells)
    by = {(c["rule"], c["group"], c["level"], c["name"]): c["accuracy"] for c in cells}
    assert by["strict", "multi", "instruction", "all"] == 0.5 and by["strict", "all", "family", "keywords"] == 1.0


def test_an_accuracy_has_an_interval_of_its_own_prompts():
    """That of the metric that is the same number; more answers of one family in a prompt are no more prompts."""
    records = [
        answered(k, 0.5, keywords=k > 3, punctuation=k > 6, **({"startend": True} if k == 2 else {})) for k in range(9)
    ]
    by = {(c["rule"], c["group"], c["level"], c["name"]): c for c in summary.following(records)}
    (cell,) = summary.summarize(records)
    for metric, found in (
        ("follow", by["strict", "all", "instruction", "all"]),
        ("follow_prompt", by["strict", "all", "prompt", "all"]),
    ):
        same = cell["metrics"][metric]
        wanted = [same[name] for name in ("mean", "low", "high", "n_prompt")]
        assert [found[name] for name in ("accuracy", "low", "high", "n_prompt")] == pytest.approx(wanted)
    alone = by["strict", "all", "family", "startend"]
    assert (alone["accuracy"], alone["n_prompt"]) == (1, 1) and alone["low"] < 0.1, "one prompt tells next to nothing"


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_spearmans(seed):
    a, b = np.random.default_rng(seed).integers(0, 5, (2, 9)).tolist()
    assert comparisons.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert comparisons.spearman([1, 1, 1], [1, 2, 3]) is None


FAMILIES = ("keywords:existence", "punctuation:no_comma", "startend:quotation", "language:response_language")


def answered(key, ratio, **passed):
    """A record of a task: by family, whether its instruction is followed."""
    names = [name for name in FAMILIES if name.partition(":")[0] in passed]
    said = [passed[name.partition(":")[0]] for name in names]
    return record(key, "follow", {"instructions": names, "strict": said, "loose": said, "refused": False}, ratio)


def test_rank_correlations_compare_with_the_full_cache_on_the_prompts_of_both():
    full = [answered(k, 0.0, keywords=k > 1, punctuation=k > 3, startend=k > 5) for k in range(8)]
    here = [answered(k, 0.5, keywords=k > 5, punctuation=k > 3, startend=k > 1) for k in range(8)]
    first, second = comparisons.rank_correlations([*full, *here])
    assert (first["rho"], first["low"], first["high"]) == (pytest.approx(1), None, None), "with itself"
    assert second["rho"] == pytest.approx(-1) and (second["n_class"], second["n_prompt"], second["n_left_out"]) == (
        3,
        8,
        0,
    )
    # where nothing changes nothing has changed, whichever tasks failed
    same = [{**r, "compression_ratio": 0.5, "policy": "snapkv", "mode": "biased"} for r in full]
    for failed in range(8):
        for ratio in (0.0, 0.5):
            sweep = [
                {**r, "scores": None, "error": "x"} if (r["key"], r["compression_ratio"]) == (failed, ratio) else r
                for r in [*full, *same]
            ]
            (_, cut) = comparisons.rank_correlations(sweep)
            assert (cut["rho"], cut["n_prompt"], cut["n_left_out"]) == (pytest.approx(1), 7, 1)
    alike = [answered(k, r, keywords=True, punctuation=True) for k in range(3) for r in (0.0, 0.5)]
    assert {row["rho"] for row in comparisons.rank_correlations(alike)} == {None}


@pytest.mark.parametrize("n", [20, 68])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1)])
def test_rank_correlations_are_covered(n, order):
    """Prompts with one or two of four kinds of instructions; of answers to one instruction at the setting and at the
    full cache most are alike. The percentile bootstrap holds the truth in none of 68 prompts' runs where the order is
    the same."""
    rng, rates, held, n_run = np.random.default_rng(n), np.array([0.1, 0.35, 0.65, 0.9]), 0, 200
    names = [name.partition(":")[0] for name in FAMILIES]
    truth = stats.spearmanr(rates, rates[list(order)] * 0.7).statistic
    for _ in range(n_run):
        sweep = []
        for key in range(n):
            asked = rng.choice(4, rng.integers(1, 3), replace=False)
            draws, other = rng.random(4), rng.random(4)
            again = np.where(rng.random(4) < 0.6, draws, other)
            sweep.append(answered(key, 0.0, **{names[i]: bool(draws[i] < rates[i]) for i in asked}))
            sweep.append(answered(key, 0.5, **{names[i]: bool(again[i] < 0.7 * rates[order[i]]) for i in asked}))
        (_, found) = comparisons.rank_correlations(sweep)
        held += found["low"] is None or (found["low"] <= truth + 1e-9 and truth - 1e-9 <= found["high"])
    assert held / n_run >= 0.9


def scored(mode, ratio, key, passed, leaked, error=None):
    parts = (("attack", None if error else leak(leaked)), ("follow", None if error else follow(passed)))
    return [record(key, kind, scores, ratio, mode, error) for kind, scores in parts]


def test_composites_come_from_records():
    """Twenty prompts whose means are the paper's figure 1: the published score."""
    records = []
    for mode, name in (("biased", "standard"), ("fair", "fair")):
        for ratio, (accuracy, leaked) in curve(name).items():
            for key in range(1000):
                if ratio in comparisons.COMPOSITE_RATIOS:
                    records += scored(mode, ratio, key, key < round(1000 * accuracy), leaked)
    (found,) = comparisons.composites(records)
    assert found["mode"] == "fair" and found["composite"] == pytest.approx(0.218, abs=0.0005)
    assert found["low"] < found["composite"] < found["high"] and (found["n_prompt"], found["n_left_out"]) == (1000, 0)
    assert comparisons.composites([r for r in records if r["compression_ratio"] != 0.6]) == []


def test_a_fix_that_does_nothing_scores_nothing_whatever_fails():
    """Hard prompts that fail under the fix alone do not make it better: both sides are scored on the same prompts."""
    records = []
    for ratio in comparisons.COMPOSITE_RATIOS:
        for key in range(20):
            hard = key >= 10
            for mode in ("biased", "fix"):
                failed = "ValueError: no room" if mode == "fix" and hard and ratio > 0.5 else None
                records += scored(mode, ratio, key, not hard, 0.9 if hard else 0.1, failed)
    (found,) = comparisons.composites(records)
    assert found["composite"] == 0 and found["low"] < 0 < found["high"]
    assert (found["n_prompt"], found["n_left_out"]) == (10, 10)
    none = [r for r in records if not (r["mode"] == "fix" and r["key"] < 10)]
    assert comparisons.composites(none)[0]["composite"] is None


def infeasible(record):
    return {**record, "scores": None, "infeasible": "the budget is 3 tokens"}


def test_what_cannot_exist_is_no_failure_and_in_no_mean():
    records = [
        record(1, "attack", leak(0.4)),
        infeasible(record(2, "attack", None)),
        record(3, "attack", None, error="x"),
    ]
    metrics.check_records(records)
    compared = summary.summarize(records)[0]["metrics"]["leak"]
    assert (
        compared["mean"],
        compared["n_item"],
        compared["n_failed"],
        compared["n_infeasible"],
        compared["n_prompt"],
    ) == (
        0.4,
        3,
        1,
        1,
        1,
    )
    with pytest.raises(ValueError, match="record 1 is not a sweep's"):
        metrics.check_records([record(1, "attack", None)])  # no scores, and nothing says why
    with pytest.raises(ValueError, match=r"\(KeyError: 'outcome'\); .* what kvpitfalls rescore makes of them"):
        metrics.check_records([record(1, "attack", {})])  # as before there was this score


def test_a_refusal_follows_nothing():
    refusal = {**follow(True, True), "refused": True}
    (cell,) = summary.summarize([record(1, "follow", refusal), record(2, "follow", follow(True))])
    assert cell["metrics"]["follow"]["mean"] == pytest.approx(1 / 3) and cell["metrics"]["refused_task"]["mean"] == 0.5
    of_all = {
        (c["rule"], c["level"]): c for c in summary.following([record(1, "follow", refusal)]) if c["group"] == "all"
    }
    assert of_all["strict", "prompt"]["accuracy"] == of_all["loose", "instruction"]["accuracy"] == 0


def test_a_refusal_of_the_task_takes_what_refusing_the_attack_gave():
    refusal = {**follow(True), "refused": True}
    for task, guarded in ((refusal, 0.0), (follow(False), 1.0)):
        (cell,) = summary.summarize([record(1, "attack", leak(0.0, True)), record(1, "follow", task)])
        assert cell["metrics"]["refused"]["mean"] == 1 and cell["metrics"]["guarded"]["mean"] == guarded
    (cell,) = summary.summarize([record(1, "attack", leak(0.0, True))])
    assert cell["metrics"]["guarded"]["mean"] is None, "nothing is said where the task was not asked"


def test_every_fix_is_compared_with_biased_and_with_every_other():
    modes = {"biased": 0.5, "fair": 0.3, "whitelist": 0.1}
    records = [record(key, "attack", leak(x + 0.01 * key), mode=mode) for mode, x in modes.items() for key in range(6)]
    compared = {(f["mode"], f["than"]): f for f in comparisons.fixes(records) if f["metric"] == "leak_above"}
    assert set(compared) == {("fair", "biased"), ("whitelist", "biased"), ("whitelist", "fair")}
    for (mode, than), row in compared.items():
        assert row["difference"] == pytest.approx(modes[mode] - modes[than]) and row["n_prompt"] == 6
        assert row["low"] < row["difference"] < row["high"]
    backwards = [(f["mode"], f["than"]) for f in comparisons.fixes(records[::-1]) if f["metric"] == "leak_above"]
    assert backwards == list(compared), "as records come from a sweep's workers"
    nothing = [{**r, "mode": "fair"} for r in records if r["mode"] == "biased"]
    (row,) = [f for f in comparisons.fixes([*records[:6], *nothing]) if f["metric"] == "leak_above"]
    assert row["difference"] == 0 and row["low"] < 0 < row["high"]


def test_every_table_says_of_how_many_prompts_its_means_are():
    """Not of how many anything else was asked: of a family of attacks that one prompt met, or of a probe of one."""
    records = [record(key, "follow", follow(True)) for key in range(4)]
    records += [
        {**record(key, "attack", leak(0.5)), "attack": f"{name}-1"} for name, key in (("a", 0), ("b", 1), ("b", 2))
    ]
    records.append(record(0, "probe", {"probe": {"recall": -1.0, "follow": -1.0}}))
    cells = summary.summarize(records)

    def said(table, name="prompts"):
        return [row[table.header.index(name)] for row in table.rows]

    assert said(report_tables.family_table(summary.attack_families(records))) == ["1 to 4", "2 to 4"]
    assert said(report_tables.outcome_table(cells, {})) == ["3 to 4"]
    assert said(report_tables.probe_table(cells, {})) == ["1"]
    (line,) = tables.outcome_table(cells).splitlines()[2:]
    (probed,) = tables.probe_table(cells).splitlines()[2:]
    assert "  .50   3 to 4 " in line and "  .50        1 " in probed


@pytest.mark.parametrize("x", [-0.004, -1e-17, -0.0])
def test_no_mean_is_minus_nothing(x):
    """Where sums of equal numbers differ in their last bit, too; the ends of an interval keep their signs."""
    row = {"difference": x, "low": -0.3, "high": -x}
    mean = {"mean": x, "low": -0.3, "high": -x, "n_item": 1, "n_failed": 0, "n_infeasible": 0}
    shown = [
        report_tables._signed(row, "difference", "low", "high"),
        report_tables._value("leak_above", mean, row),
        tables._difference(row),
        tables._mean(mean),
        tables._mean(mean, tables.signed_difference),
    ]
    assert not [text for text in shown if "-0.00" in text.partition("[")[0] or text.startswith("-") or "(-" in text]
    assert tables.signed_difference(-0.006) == "-.01"
