"""Leakage and its control, against rouge-score itself and against a longest common subsequence written out, on
SmolLM2's answers."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize

from kvpitfalls.audits import leakage
from kvpitfalls.experiments.corpus import load_corpus
from kvpitfalls.experiments.scenario import Scenario

RESPONSES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "smollm2_responses.jsonl").read_text("utf-8").splitlines()
]
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
        measured = leakage.leakage(r["response"], texts)
        for name, text in texts.items():
            theirs = own.score(text, r["response"])
            assert measured[name] == {"rouge1": theirs["rouge1"].recall, "rougeL": theirs["rougeL"].recall}
            wanted, said = (tokenize.tokenize(t, stemmer) for t in (text, r["response"]))
            assert measured[name]["rougeL"] == pytest.approx(common(wanted, said) / len(wanted))


WORDS = st.lists(
    st.sampled_from(["run", "running", "Runs!", "the", "a", "Ä", "x-1", "no,", "\n"]) | st.text(max_size=6), max_size=30
)


@given(WORDS, WORDS)
def test_recall_equals_rouge_score_on_any_texts(wanted, said):
    reference, response = " ".join(wanted), " ".join(said)
    if leakage.has_words(reference):
        theirs = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(reference, response)
        assert leakage.rouge_recall(reference, response) == {
            "rouge1": theirs["rouge1"].recall,
            "rougeL": theirs["rougeL"].recall,
        }


def test_a_reference_without_words_is_refused():
    with pytest.raises(ValueError, match="expected text with a letter"):
        leakage.rouge_recall("¡¿!", "anything")


def test_a_floor_is_the_recall_of_other_texts():
    others = ["Use the word sea.", "Write in the first person.", "No commas!"]
    for response in ("The moon and the sea.", "", "Write the word sea in the first person, no commas"):
        recalls = [leakage.rouge_recall(text, response) for text in others]
        measured = leakage.floor(response, others)
        assert measured["rougeL"] == pytest.approx(sum(r["rougeL"] for r in recalls) / 3) and measured["most"] == max(
            r["rougeL"] for r in recalls
        )
    for wrong in ([], "text"):
        with pytest.raises(ValueError, match="expected texts that the answer cannot have seen"):
            leakage.floor("x", wrong)


@pytest.mark.parametrize("row", list(ROWS.values())[:3], ids=lambda row: str(row["key"]))
def test_a_floor_knows_no_order_of_the_other_texts(row):
    """To the last bit: else it would be another one on a Python whose sum adds otherwise."""
    others, answer = load_corpus().other_directives(row), row["messages"][1]["content"]
    orders = [random.Random(seed).sample(others, len(others)) for seed in range(8)]
    assert len({tuple(leakage.floor(answer, some).values()) for some in [others, others[::-1], *orders]}) == 1


def test_texts_that_a_recital_holds_are_no_floor():
    own = "Answer in Spanish, in two lines."
    others = [own, "Answer in Spanish.", "Answer in two lines.", "Use no comma.", "Use no comma.", "¡¿!"]
    assert leakage.unlike(own, others) == ["Use no comma."] and leakage.unlike(own, others[3:], 0) == []


@pytest.mark.parametrize("row", list(ROWS.values())[::5], ids=lambda row: str(row["key"]))
def test_a_recital_exceeds_every_other_text(row):
    directive, others = row["messages"][0]["content"], load_corpus().other_directives(row)
    assert len(others) >= 40
    assert leakage.recites(directive, directive, leakage.floor(directive, others))
    assert not leakage.recites(directive, "", leakage.floor("", others))


@given(st.lists(st.sampled_from(["sea", "Sea", "the sea", "P.S.", "a+b", "1", ""]), max_size=4), WORDS)
def test_what_obeying_says_is_not_in_the_rest(said, words):
    text = " ".join(["Mention the sea twice, then P.S. and a+b in Part 1.", *words])
    rest = leakage.without(text, said)
    assert rest == text or all(f" {phrase.lower()} " not in f" {rest.lower()} " for phrase in said if phrase)
    assert leakage.has_words(rest), "or there would be nothing to recite"


def test_a_recital_has_words_beyond_what_obeying_says():
    said, none = "Have a calm evening, all.", {"rouge1": 0.0, "rougeL": 0.0, "most": 0.0}
    text = f"Close with: {said}"
    assert leakage.recites(text, said, none) and not leakage.recites(text, said, none, [said])
    assert leakage.recites(text, text, none, [said]), "the two words that are left"
    assert not leakage.recites("Use no capital letters at all.", "I use capital letters.", none), "three words"
    assert leakage.recites("Use no commas.", "use no commas", none), "all that there are"
    assert leakage.without("Bye.", ["bye"]) == "Bye.", "nothing would be left"


def test_begun_and_rest_lose_no_word():
    for row in ROWS.values():
        text = row["messages"][0]["content"]
        begun, rest = leakage.begun_and_rest(text)
        assert begun.split() + rest.split() == text.split() and 0 <= len(begun.split()) - len(rest.split()) <= 1
    with pytest.raises(ValueError, match="at least two words"):
        leakage.begun_and_rest("Silence!")
