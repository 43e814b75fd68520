"""The notebooks run from top to bottom, and what is committed in them is what their code printed."""

from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import run_notebooks
from run_notebooks import NOTEBOOKS

NAMES = ["1_quickstart", "2_which_instruction_is_lost", "3_leakage", "4_your_own_policy", "5_your_own_model"]


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


def kinds(cell):
    """What a cell shows: names of streams and kinds of data, joined outputs of one stream counted once."""
    return {output.get("name") or kind for output in cell.outputs for kind in output.get("data", [None])} - {"stderr"}


@pytest.fixture(scope="module")
def runs():
    """Path -> the future of a run; two at a time, of one thread each."""
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run_notebooks.execute, path) for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_is_committed(path, runs):
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert len(committed.cells) < 40
    assert committed.metadata.kvpitfalls.sources_sha256 == run_notebooks.digest(committed), (
        "its outputs are old; expected `make notebooks`"
    )
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    for cell in code:
        assert not [
            output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"
        ], cell.source
    ran = run_notebooks.tidied(runs[path].result())  # raises if a cell failed
    for cell, again in zip(committed.cells, ran.cells, strict=True):
        if cell.cell_type == "code":
            assert kinds(cell) == kinds(again), cell.source


def test_no_output_names_a_place_on_the_machine_that_made_it():
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        assert not [place for place in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages") if place in text], (
            path.name
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_fits_into_jupyterlab(path):
    """At 1300 pixels, 100 columns are seen."""
    lines = [
        line
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
    ]
    assert not [line for line in lines if len(line) > 100]
