"""The list of faults stays true: every line it changes is there, once. make mutants tries the faults themselves."""

import re
from pathlib import Path

import pytest
from mutants.run import ROOT, mutate, read_mutants

MUTANTS = read_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["why"])
def test_the_line_is_there_once(mutant):
    assert mutate(mutant) != (ROOT / mutant["path"]).read_text()


def test_the_tests_are_there():
    native = set(re.findall(r'run\("([^"]+)"', (ROOT / "tests/native/main.c").read_text()))
    for mutant in MUTANTS:
        assert set(mutant.get("native", [])) <= native and ("native" in mutant) != ("pytest" in mutant)
        assert all(Path(ROOT, path).exists() for path in mutant.get("pytest", []))


def test_there_are_enough_and_of_both_kinds():
    paths = [mutant["path"] for mutant in MUTANTS]
    assert sum(p.startswith("csrc/") for p in paths) >= 40 and sum(p.startswith("kvpitfalls/") for p in paths) >= 10
