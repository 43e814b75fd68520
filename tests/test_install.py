"""What a build says where something is missing. The wheel itself is made and looked at by ``make wheel``."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import newest_transformers
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
WHEEL = (
    "pip install --only-binary kvpitfalls kvpitfalls. Wheels are for CPython 3.11 and later (cp311-abi3), on Linux "
    "x86_64 and aarch64"
)


def build(tmp_path, **changes) -> str:
    """What ``setup.py build_ext`` writes before it fails."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--force",
        "--build-temp",
        str(tmp_path / "t"),
        "--build-lib",
        str(tmp_path / "l"),
    ]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"KVP_CUDA": "0", **changes}, capture_output=True, text=True
    )
    assert ran.returncode, "expected it to fail"
    return ran.stdout + ran.stderr


def test_without_a_compiler_the_wheels_are_named(tmp_path):
    said = build(tmp_path, CC="/nonexistent/cc")
    assert (
        "there is no C compiler that works ([Errno 2] No such file or directory: '/nonexistent/cc')" in said
        and WHEEL in said
    )


def test_without_pythons_headers_the_wheels_are_named(tmp_path):
    """A compiler that has no Python.h."""
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\nfor a in "$@"; do case "$a" in *.c) grep -q "Python.h" "$a" && exit 1;; esac; done\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    said = build(tmp_path, CC=str(compiler))
    assert "Python's C headers are missing (Debian has them in python3-dev)" in said and WHEEL in said


def test_cuda_is_insisted_on_without_nvcc(tmp_path):
    said = build(tmp_path, KVP_CUDA="1", PATH="/usr/bin:/bin", CUDA_HOME="/nonexistent")
    assert "KVP_CUDA is '1', but there is no nvcc on the PATH or in /nonexistent/bin; expected one" in said


def test_a_folder_with_a_space_and_a_compiler_with_arguments(tmp_path):
    """And flags as distributions set them. The compiler is a quick one, which makes an empty object of each source."""
    folder, compiler = tmp_path / "build dir \u00fc", tmp_path / "quick cc"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "kvpitfalls").mkdir()
    shutil.copy(ROOT / "kvpitfalls" / "__init__.py", folder / "kvpitfalls")
    compiler.write_text(
        f"#!{sys.executable}\nimport os, subprocess, sys\n"
        "arguments = sys.argv[1:]\n"
        "assert arguments[0] == '--quick' and '-ffunction-sections' in arguments, arguments\n"
        "sources = [x for x in arguments if x.endswith('.c')]\n"
        "objects = [x for x in arguments if x.endswith('.o') and x != arguments[arguments.index('-o') + 1]]\n"
        "assert all(os.path.exists(x) for x in sources + objects), arguments\n"
        "kind = ['-x', 'c', '-c', os.devnull] if sources else ['-shared', *objects]\n"
        "sys.exit(subprocess.call(['cc', *kind, '-o', arguments[arguments.index('-o') + 1]]))\n"
    )
    compiler.chmod(0o755)
    flags = {"CC": f"'{compiler}' --quick", "CFLAGS": "-Wall -flto=auto -O2 -ffunction-sections", "LC_ALL": "C"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    ran = subprocess.run(
        command, cwd=folder, env={**os.environ, "KVP_CUDA": "0", **flags}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and list((folder / "kvpitfalls").glob("_core*")), ran.stdout + ran.stderr


@pytest.mark.parametrize("module", ["core_module", "cuda_module"])
def test_a_slot_of_a_later_python_is_set_only_where_its_values_are_known(module):
    """Python 3.15 defines the slots' names for every stable ABI, but their values from the release on that has them."""
    names = [f"-D{name}=9" for name in ("Py_mod_multiple_interpreters", "Py_mod_gil")]
    names += ['-DKVPB_NVCC=""', '-DKVPB_ARCHITECTURES=""']  # of the build
    folders = [f"-I{folder}" for folder in ("csrc", sysconfig.get_paths()["include"], np.get_include())]
    command = ["cc", "-std=c17", "-fsyntax-only", "-DPy_LIMITED_API=0x030B0000", *names, *folders]
    ran = subprocess.run([*command, f"csrc/python/{module}.c"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_building_asks_for_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert {re.split("[<>=]", name)[0] for name in project["build-system"]["requires"]} == {"setuptools", "numpy"}
    assert not re.search(r"^\s*(import|from) torch", (ROOT / "setup.py").read_text("utf-8"), flags=re.M)


@pytest.mark.parametrize("name", ["test", "wheels", "docs"])
def test_workflows_run_what_is_there(name):
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M)
    used = re.findall(r"run: make ([\w-]+)", text)
    assert not set(used) - set(targets) and (used or "run: bash .ci/run" in text)


@pytest.mark.parametrize(
    ("index", "here", "strict", "tests", "code"),
    [
        ("999.0", "5.24.0", [], 1, 0),
        ("999.0", "5.24.0", ["--strict"], 1, 1),
        ("999.0", "5.24.0", ["--strict"], 0, 0),
        ("999.0", "4.57.6", [], 1, 0),
        (None, "4.57.6", [], 1, 1),
        ("4.57.6", "4.57.5", [], 0, 0),
        (newest_transformers.known(), "4.57.6", [], 1, 1),
        (None, newest_transformers.known(), ["--strict"], 1, 0),
        (None, "998.0", ["--strict"], 1, 0),
    ],
)
def test_a_failure_on_a_release_is_a_failure_if_it_is_known(monkeypatch, capsys, index, here, strict, tests, code):
    """And if it is not, it is told. (None: the index has nothing newer than what is here. If that is the newest that is
    known, ``make test`` runs on it.)"""
    monkeypatch.setattr(newest_transformers, "version", lambda name: here)
    monkeypatch.setattr(newest_transformers, "asked", lambda: {} if index is None else {"transformers": index})
    ran = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: ran.append(command) or subprocess.CompletedProcess(command, tests)
    )
    monkeypatch.setattr(sys, "argv", ["newest_transformers.py", *strict, "tests/test_wrap.py"])
    monkeypatch.setattr(newest_transformers, "run", lambda packages, paths: ran.append([*packages, *paths]) or tests)
    assert newest_transformers.main() == code
    said = capsys.readouterr().out
    if index == "999.0":
        assert ran == [["transformers", "tests/test_wrap.py"]] and "transformers 999.0 is newer" in said
        assert ("TESTS FAIL ON IT" in said) == bool(tests)
    elif index is None and here != "4.57.6":
        assert not ran and "make test runs on it" in said
    else:
        assert ran == [["make", f"test-transformers-{newest_transformers.known()}"]]
