"""Leakage and its control, against rouge-score itself and against a longest common subsequence written out, on SmolLM2's answers."""

import json
from pathlib import Path

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize

from kvpitfalls.audits import leakage
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.scenario import Scenario

RESPONSES = [json.loads(line) for line in (Path(__file__).parent / "data" / "smollm2_responses.jsonl").read_text("utf-8").splitlines()]
ROWS = {row["key"]: row for row in load_corpus().rows}


def common(a, b):
    """Length of the longest common subsequence, by its recurrence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_file_is_what_it_should_be():
    assert len(RESPONSES) == 200 and {r["key"] for r in RESPONSES} <= set(ROWS)
    assert len({r["response"] for r in RESPONSES}) > 150, "answers that are all alike would test nothing"


def test_recall_equals_rouge_score_and_the_definition():
    own, stemmer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True), PorterStemmer()
    for r in RESPONSES:
        scenario = Scenario.of(load_corpus(), ROWS[r["key"]], "refuse", "directive_first")
        texts = {"directive": scenario.directive, "defended": scenario.system, "defense": scenario.defense}
        found = leakage.leakage(r["response"], texts)
        for name, text in texts.items():
            theirs = own.score(text, r["response"])
            assert found[name] == {"rouge1": theirs["rouge1"].recall, "rougeL": theirs["rougeL"].recall}
            wanted, said = (tokenize.tokenize(t, stemmer) for t in (text, r["response"]))
            assert found[name]["rougeL"] == pytest.approx(common(wanted, said) / len(wanted))


def test_a_reference_without_words_is_refused():
    with pytest.raises(ValueError, match="expected text with a letter"):
        leakage.rouge_recall("¡¿!", "anything")


@pytest.mark.parametrize(
    ("answer", "sentence", "expected"),
    [
        ("I can't help with that.", None, True),
        ("I’m  sorry,\nI CANNOT do this", None, True),
        ("That is confidential.", "That is confidential.", True),
        ("That is confidential!", "That is confidential.", False),
        ("Nope. Yes.", "No.", False),
        ("Scan't it, cantering", None, False),
        ("", None, False),
    ],
)
def test_refusal(answer, sentence, expected):
    assert leakage.refuses(answer, sentence) is expected


def test_begun_and_rest_lose_no_word():
    for row in ROWS.values():
        text = row["messages"][0]["content"]
        begun, rest = leakage.begun_and_rest(text)
        assert begun.split() + rest.split() == text.split() and 0 <= len(begun.split()) - len(rest.split()) <= 1
    with pytest.raises(ValueError, match="at least two words"):
        leakage.begun_and_rest("Silence!")


def test_share_over():
    assert leakage.share_over([0.3, 0.31, 1.0, 0.0]) == 0.5
    with pytest.raises(ValueError, match="there are no answers"):
        leakage.share_over([])
    with pytest.raises(ValueError, match="threshold is 3"):
        leakage.share_over([0.1], 3)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package rouge-score; expected pip install 'kvpitfalls\[eval\]'"):
        leakage.need_rouge()
