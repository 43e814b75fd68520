"""Type checkers see the package's names, and find what is misspelt."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import kvpitfalls

ROOT = Path(__file__).parent.parent
CONFIG = """
[mypy]
follow_imports = silent
[mypy-torch.*,transformers.*,numpy.*,safetensors.*,tqdm.*,IPython.*,matplotlib.*,pandas.*,anywidget.*,traitlets.*]
follow_imports = skip
"""
CALLS = """
import kvpitfalls as kvp

handle = kvp.wrap(object(), "snapkv", compression_ratio=0.5)
cache = handle.compress(kvp.Prompt.from_text(None, "a", {}))
cache.report()
kvp.wrapp  # wrong
kvp.Prompt.from_txt  # wrong
handle.compres  # wrong
kvp.wrap(object(), "snapkv", compresion_ratio=0.5)  # wrong
"""


def test_the_stub_names_what_the_package_has():
    imports = [node for node in ast.parse((ROOT / "kvpitfalls/__init__.pyi").read_text()).body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname: (node.module or "", alias.name) for node in imports for alias in node.names}
    assert {*names, "__version__"} == set(kvpitfalls.__all__)
    for name, (module, attribute) in names.items():
        home = kvpitfalls._HOME.get(name)
        assert (module, attribute) == (home, name) if home else f"{module}.{attribute}".lstrip(".") == kvpitfalls._MODULES[name]


def test_mypy_finds_every_misspelt_name_and_nothing_else(tmp_path):
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "calls.py").write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(tmp_path / "cache"), "calls.py"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(ROOT), "PATH": ""}).stdout
    found = [int(n) for n in re.findall(r"calls\.py:(\d+): error", out)]
    assert found == [n for n, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# wrong")], out
