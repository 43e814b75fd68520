"""Fixtures that more than one module needs."""

import os

import pytest

# Most models here are tiny: threads would only wait for each other, for minutes where other processes keep the cores busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer; ``make test`` installs and converts it."""
    from kvpitfalls.hf.load import load

    return load()
