"""The notebooks run from top to bottom, and what is committed in them is what their code printed."""

import base64
import difflib
import math
import re
import zlib
from concurrent.futures import ThreadPoolExecutor

import nbformat
import numpy as np
import pytest
import run_notebooks
from run_notebooks import NOTEBOOKS

NAMES = ["1_quickstart", "2_which_instruction_is_lost", "3_leakage", "4_your_own_policy", "5_your_own_model"]


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?")
PACKED = re.compile(r"^[A-Za-z0-9+/]{40,}={0,2}$", re.M)  # a heat map's counts, compressed
PERCENT = re.compile(r"(\d+) ?%")
NEAR = {"rel_tol": 0.02, "abs_tol": 0.02}  # another processor rounds otherwise, and a token may change places
FEW = 0.01  # of a heat map's counts


def shown(cell) -> dict[str, str]:
    """What a cell shows but a log: names of streams and kinds of data, each with all of its text; of pictures the kind
    alone."""
    found: dict[str, str] = {}
    for output in cell.outputs:
        is_log = output.get("name") == "stderr"
        texts = {output.name: output.text} if output.output_type == "stream" else output.get("data", {})
        for kind, text in ({} if is_log else texts).items():
            found[kind] = found.get(kind, "") + ("" if kind.startswith("image/") else text)
    return found


def _share(percent: re.Match) -> str:
    return str(int(percent[1]) / 100)


def differences(committed: str, ran: str) -> list[str]:
    """Where two texts differ in more than numbers do by rounding."""
    counts = [
        [np.frombuffer(zlib.decompress(base64.b64decode(line)), np.uint8) for line in PACKED.findall(text)]
        for text in (committed, ran)
    ]
    found = [] if [len(x) for x in counts[0]] == [len(x) for x in counts[1]] else ["a heat map of another size"]
    if counts[0] and not found:
        here, there = map(np.concatenate, counts)
        found += [f"{(here != there).mean():.1%} of a heat map's counts"] if (here != there).mean() > FEW else []
    committed, ran = (PERCENT.sub(_share, PACKED.sub("", text)) for text in (committed, ran))
    words = [NUMBER.split(text) for text in (committed, ran)]
    if words[0] != words[1]:
        return [*found, *(line for line in difflib.ndiff(committed.splitlines(), ran.splitlines()) if line[0] in "-+")]
    numbers = zip(*(map(float, NUMBER.findall(text)) for text in (committed, ran)), strict=True)
    return found + [f"{x:g}, now {y:g}" for x, y in numbers if not math.isclose(x, y, **NEAR)]


def test_differences_are_found():
    map_of = {
        n: base64.b64encode(zlib.compress(bytes([3] * 990 + [n] * 10 + list(range(250)) * 4))).decode() for n in (3, 4)
    }
    other = base64.b64encode(zlib.compress(bytes(range(250)))).decode()
    assert not differences("a 44 %", "a 45 %") and differences("a 44 %", "a 47 %") == ["0.44, now 0.47"]
    assert not differences("a .50 <td>2", "a 0.5 <td>2") and not differences("a 0.50 <td>2e-3", "a 0.51 <td>3e-3")
    assert differences("kept 0.50 of 40", "kept 0.53 of 40") == ["0.5, now 0.53"]
    assert differences("a 1\nb", "a 1\nc") == ["- b", "+ c"]
    assert not differences(f"x\n{map_of[3]}\n", f"x\n{map_of[4]}\n")
    assert differences(f"x\n{map_of[3]}\n", f"x\n{other}\n") == ["a heat map of another size"]


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
            before, now = shown(cell), shown(again)
            assert before.keys() == now.keys(), cell.source
            for kind, text in before.items():
                assert not differences(text, now[kind]), f"{kind} of {cell.source}"


def test_no_output_names_a_place_on_the_machine_that_made_it():
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        assert not [place for place in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages") if place in text], (
            path.name
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_fits_onto_paper(path):
    """Of a line, 72 columns are printed (A4), and 100 are seen in JupyterLab at 1300 pixels."""
    lines = [
        line
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
    ]
    assert not [line for line in lines if len(line) > 72]
