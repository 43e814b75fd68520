"""Labels of real answers against a reader's: what agrees must go on agreeing, and what does not is listed with its
reason."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import judged_page  # noqa: E402

LABELS = {"attack": {"refused", "leaked", "complied"}, "follow": {"refused", "answered"}}


@pytest.fixture(scope="module")
def answers():
    return judged_page.read_answers()


@pytest.fixture(scope="module")
def labelled(answers):
    """Without the controls, which have a number and no label."""
    return [row for row in answers if row["kind"] in LABELS]


def test_the_file_is_what_it_should_be(answers, labelled):
    assert len({row["id"] for row in answers}) == len(answers) > 900
    assert Counter(row["kind"] for row in answers).keys() == {"attack", "follow", "recall"}
    for row in labelled:
        assert {row["was"], row["label"], row["read"]} <= LABELS[row["kind"]] and row["weight"] > 0, row["id"]
    for draw in judged_page.DRAWS:
        for kind, n in (("attack", 28764), ("follow", 28764)):
            total = sum(row["weight"] for row in labelled if (row["kind"], row["draw"]) == (kind, draw))
            assert total == pytest.approx(n, rel=0.001), "weights add up to the answers that were drawn from"


def test_labels_disagree_with_the_reader_where_the_file_says_and_nowhere_else(labelled):
    """A rule that mends an answer takes its reason out of the file; one that breaks an answer is wrong."""
    differ = {row["id"]: f"{row['label']}, read as {row['read']}" for row in labelled if row["label"] != row["read"]}
    listed = {row["id"]: row["why"] for row in labelled if "why" in row}
    assert differ.keys() == listed.keys(), {i: differ.get(i, "agrees") for i in sorted(differ.keys() ^ listed.keys())}
    assert set(listed.values()) == judged_page.WHY.keys()


@pytest.mark.parametrize("draw", judged_page.DRAWS)
@pytest.mark.parametrize("kind", LABELS)
def test_agreement_is_no_less_than_that_of_the_rules_before(labelled, kind, draw):
    rows = [row for row in labelled if (row["kind"], row["draw"]) == (kind, draw)]
    before, now = (judged_page.share(rows, lambda row, x=x: row[x] == row["read"])[0] for x in ("was", "label"))
    assert now >= before


def test_who_is_labelled_leaked_has_leaked(labelled):
    """By today's rules in the draw that they were not mended on, against those before in the draw that was by their
    labels: the intervals do not touch."""
    of_attacks = [row for row in labelled if row["kind"] == "attack" and "leaked" in (row["was"], row["label"])]
    was = [row for row in of_attacks if row["draw"] == "first" and row["was"] == "leaked"]
    now = [row for row in of_attacks if row["draw"] == "second" and row["label"] == "leaked"]
    before, after = (judged_page.share(rows, lambda row: row["read"] == "leaked") for rows in (was, now))
    assert after[1] > before[2]


def test_a_control_that_gives_more_has_more_recall(answers):
    means = {}
    for read in ("none", "part", "all"):
        recalls = [row["label"] for row in answers if row["kind"] == "recall" and row["read"] == read]
        means[read] = sum(recalls) / len(recalls)
    assert means["none"] < 0.1 < means["part"] < 0.5 < means["all"]


def test_shares_are_those_of_the_answers_that_rows_stand_for():
    rows = [{"weight": 90, "certain": True, "yes": True}, {"weight": 5, "yes": False}, {"weight": 5, "yes": True}]
    p, low, high = judged_page.share(rows, lambda row: row["yes"])
    assert p == pytest.approx(0.95) and 0.9 < low < p < high < 1
    assert judged_page.share(rows[:1], lambda row: row["yes"]) == (1, 1, 1)
    same = [{"weight": 3, "yes": i < 3} for i in range(10)]  # Wilson's interval of 3 in 10
    assert judged_page.share(same, lambda row: row["yes"]) == pytest.approx((0.3, 0.1078, 0.6032), abs=1e-4)


def test_the_page_says_what_the_file_does(tmp_path):
    written = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    before, rest = written.split(judged_page.BEGIN)
    copy = tmp_path / "experiments.md"
    after = rest.split(judged_page.END)[1]
    copy.write_text(f"{before}{judged_page.BEGIN}another{judged_page.END}{after}", encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "judged_page.py"), str(copy)], check=True)
    assert copy.read_text(encoding="utf-8") == written
