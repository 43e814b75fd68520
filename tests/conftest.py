"""Fixtures that more than one module needs."""

import gc
import os

import pytest

# Most models here are tiny: threads would only wait for each other, for minutes where other processes keep the cores
# busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported


def pytest_collection_finish():
    """What was imported is no garbage: from here on a collection goes through what tests made alone."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer; ``make test`` installs and converts it."""
    from kvpitfalls.hf.load import load

    return load()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, smollm2):
    """The folder of a random model with SmolLM2's tokenizer."""
    import tiny_sweep

    return tiny_sweep.save_tiny_model(tmp_path_factory.mktemp("tiny"), smollm2[1])


@pytest.fixture(scope="module")
def tiny_model_loaded_once(tiny_model_folder):
    """A module's sweeps share one loaded model; those of test_cli_experiments.py load it themselves."""
    from kvpitfalls.experiments import sweep
    from kvpitfalls.hf.load import load

    loaded = load(tiny_model_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "load_model", lambda config, name: loaded)
        yield


@pytest.fixture
def registry():
    """Policies that a test defines are known to that test alone."""
    from kvpitfalls.policies.base import _registry

    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)
