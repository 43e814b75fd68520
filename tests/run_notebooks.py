"""Executes notebooks from top to bottom; as a script (``make notebooks``) it writes the outputs into them."""

import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
_WIDGET = "application/vnd.jupyter.widget-view+json"


def digest(notebook) -> str:
    """Of all code: says which code the outputs in a notebook were made by."""
    return hashlib.sha256(
        "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code").encode()
    ).hexdigest()


def execute(path: Path):
    """The notebook with the outputs of a run just made; raises ``CellExecutionError`` if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # One thread: two would wait for each other for minutes where other processes keep the cores busy.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    client = NotebookClient(
        notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=environment)
    return notebook


def tidied(notebook):
    """Without what differs from run to run, and without progress bars, which are of no use afterwards."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _WIDGET not in output.get("data", {})]
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
        "kvpitfalls": {"sources_sha256": digest(notebook)},
    }
    return notebook


def main(names: list[str]) -> None:
    for path in [FOLDER / name for name in names] or NOTEBOOKS:
        start = time.perf_counter()
        nbformat.write(tidied(execute(path)), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
