"""No causal-LM type of transformers is silently uncompressed: each is exact, refused by name, or, of earlier releases,
listed as not built here."""

import pytest
import transformers
from model_sweep import PAGE, TYPES, Outcome, examine, listed, page, page_version

OUTCOMES: dict[str, Outcome] = {}


@pytest.mark.parametrize("model_type", TYPES)
def test_type(model_type):
    expected = listed()
    outcome = OUTCOMES[model_type] = examine(model_type)
    if transformers.__version__ == page_version():
        assert model_type in expected, f"{model_type} is new: run python tests/model_sweep.py, and look at what it says"
        assert outcome.status == expected[model_type]
    elif (
        outcome.status != "not built"
    ):  # other releases may hold a type's cache in a way that must be refused, but nothing else
        assert outcome.status in (expected.get(model_type, "exact"), "refused"), outcome


def test_page_is_what_the_sweep_found():
    if len(OUTCOMES) < len(TYPES):  # this test was picked alone
        OUTCOMES.update({name: examine(name) for name in TYPES if name not in OUTCOMES})
    n_exact = sum(outcome.status == "exact" for outcome in OUTCOMES.values())
    assert n_exact >= 60
    if transformers.__version__ == page_version():
        assert n_exact >= 75
        assert PAGE.read_text() == page(OUTCOMES)
