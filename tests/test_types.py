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
STRICT_CALLS = """
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import kvpitfalls as kvp


def use(model: Any, tokenizer: Any) -> None:
    prompt = kvp.Prompt.from_chat(tokenizer, [{"role": "system", "content": "a"}], "sentences")
    with kvp.wrap(model, "snapkv", compression_ratio=0.5, fair=True, protect=["sinks", 3]) as handle, handle.paused():
        cache = handle.compress(prompt, instructions={"a": "a"})
        cache.copy().report().to_pandas()
        cache.positions(0).astype(np.int64)
        cache.fixed(4).save("a")
        prompt.followed_by("b").to("cuda")
        handle.compress(torch.zeros(1, 4), spans={"a": (0, 2)})
        handle.compres(prompt)  # wrong
    kvp.load_cache("a", model).kept("a").mean()
    kvp.unwrap(model)
    policies: list[kvp.Policy | str] = ["snapkv", kvp.SnapKV(window_size=8)]
    kvp.audit(model, prompt, policies=policies, compression_ratios=[0.1], fair=[False, 0.5]).heatmap()
    kvp.audit(model, prompt, fair="paper").kept_mask(kvp.KNorm, 0.1).sum()
    kvp.effects(model, prompt, said="b", fair=0.5)
    kvp.explore(model, tokenizer)
    kvp.wrap(model, "snapkv", budget="4")  # wrong


def keep(keys: torch.Tensor, bare: npt.NDArray[np.float32]) -> None:
    kept = kvp.keep("knorm", bare, budget=2, spans={"a": (0, 2)}, allocation="ada")
    kvp.ops.gather(bare, bare, kept.positions.astype(np.int32))
    kvp.ops.select(kvp.ops.score("norm", keys), [1, 1], segments=[0, 2, 4])[0].cpu()
    kvp.keep(kvp.Fair, keys, budget=2)  # wrong
    kvp.keep(kvp.KNorm, keys, budget=2, valid=[(0, 3)]).positions.cpu()


class Oldest(kvp.Policy):
    name = "oldest"
    needs_queries = True

    def score(self, inputs: kvp.policies.Inputs) -> Any:
        return inputs.score("position", n_sink=0)
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
    imports = [
        node
        for node in ast.parse((ROOT / "kvpitfalls/__init__.pyi").read_text()).body
        if isinstance(node, ast.ImportFrom)
    ]
    names = {alias.asname: (node.module or "", alias.name) for node in imports for alias in node.names}
    assert {*names, "__version__"} == set(kvpitfalls.__all__)
    for name, (module, attribute) in names.items():
        home = kvpitfalls._HOME.get(name)
        assert (
            (module, attribute) == (home, name)
            if home
            else f"{module}.{attribute}".lstrip(".") == kvpitfalls._MODULES[name]
        )


def errors_of(calls, folder, *options):
    """The lines of a program in which mypy finds errors, and what it says."""
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "calls.py").write_text(calls)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        str(folder / "cache"),
        *options,
        "calls.py",
    ]
    out = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={"MYPYPATH": str(ROOT), "PATH": ""}
    ).stdout
    return [int(n) for n in re.findall(r"calls\.py:(\d+): error", out)], out


def test_mypy_finds_every_misspelt_name_and_nothing_else(tmp_path):
    lines, out = errors_of(CALLS, tmp_path)
    assert lines == [n for n, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# wrong")], out


def test_a_strict_user_is_told_of_wrong_types_and_of_nothing_else(tmp_path):
    lines, out = errors_of(STRICT_CALLS, tmp_path, "--strict", "--follow-imports", "silent")
    assert sorted(set(lines)) == [
        n for n, line in enumerate(STRICT_CALLS.splitlines(), 1) if line.endswith("# wrong")
    ], out


def test_each_thing_that_a_type_checker_is_not_to_see_has_its_kind_and_its_reason():
    ignored = [
        line
        for path in (ROOT / "kvpitfalls").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"# (type|pyright): ignore", line)
    ]
    assert ignored and not [
        line for line in ignored if not re.search(r"# (type|pyright): ignore\[[\w-]+\] # \w.*", line)
    ]
