"""Fixtures that more than one module needs."""

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer; ``make test`` installs and converts it."""
    from kvpitfalls.hf.load import load

    return load()
