"""Tries the faults of mutants.toml on a copy of the tree: the tests named there must pass without one, and fail with
it.

    python tests/mutants/run.py [FILE ...]     # the faults of these files alone
"""

import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TREE = ROOT / "build" / "mutants"
COMPILE = ["cc", "-std=c17", "-O1", "-ffp-contract=off", f"-I{TREE}/csrc", f"-I{TREE}/tests/native"]
NATIVE_TESTS = TREE / "native-tests"
LIMITS = {"native": 60, "pytest": 600}  # seconds: a fault that makes a test run for ever is noticed, too


def read_mutants(paths=()):
    mutants = tomllib.loads((ROOT / "tests/mutants/mutants.toml").read_text())["mutant"]
    if unknown := set(paths) - {mutant["path"] for mutant in mutants}:
        sys.exit(f"mutants.toml has no fault of {', '.join(sorted(unknown))}")
    return [mutant for mutant in mutants if not paths or mutant["path"] in paths]


def runs_here(mutant):
    """Whether this processor has the instruction set that the fault is in."""
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    if "isa" in mutant:
        environment["KVP_ISA"] = mutant["isa"]
    command = [sys.executable, "-P", "-c", "import kvpitfalls._core"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def mutate(mutant):
    """The file's text with the fault; the line must be there exactly once."""
    lines = (ROOT / mutant["path"]).read_text().splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if line.strip() == mutant["before"]]
    if len(at) != 1:
        raise ValueError(f"{mutant['path']} has {len(at)} lines {mutant['before']!r}; expected one")
    i = at[0]
    lines[i] = lines[i].replace(mutant["before"], mutant["after"])
    return "".join(lines)


def copy_tree():
    shutil.rmtree(TREE, ignore_errors=True)
    for folder in ("csrc", "kvpitfalls", "tests"):
        shutil.copytree(ROOT / folder, TREE / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, TREE / name)


def compile_one(source):
    subprocess.run([*COMPILE, "-c", source, "-o", object_of(source)], check=True, cwd=TREE)


def object_of(source):
    return TREE / "objects" / f"{source.parent.name}_{source.stem}.o"


def link():
    subprocess.run(["cc", *(TREE / "objects").glob("*.o"), "-lm", "-lpthread", "-o", NATIVE_TESTS], check=True)


def native_sources():
    core = [path for path in sorted((TREE / "csrc").rglob("*.c")) if path.parent.name not in ("python", "examples")]
    tests = [*sorted((TREE / "tests/native").glob("*.c")), *sorted((TREE / "tests/fuzz").glob("*.c"))]
    return [*core, *(path for path in tests if path.name != "libfuzzer.c")]


def compile_after(path):
    """What a change of this file changes: a header may be anybody's."""
    for source in native_sources() if path.suffix == ".h" else [path] if path.suffix == ".c" else []:
        compile_one(source)


def build_native():
    (TREE / "objects").mkdir()
    for source in native_sources():
        compile_one(source)
    link()


def commands_of(mutant):
    if names := mutant.get("native"):
        return [str(NATIVE_TESTS), *names]
    return [sys.executable, "-P", "-m", "pytest", "-x", "-p", "no:cacheprovider", *mutant["pytest"]]


def passes(command):
    environment = {**os.environ, "PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1"}
    limit = LIMITS["native" if command[0] == str(NATIVE_TESTS) else "pytest"]
    try:
        return subprocess.run(command, cwd=TREE, env=environment, capture_output=True, timeout=limit).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def is_killed(mutant):
    path = TREE / mutant["path"]
    path.write_text(mutate(mutant))
    try:
        if path.suffix in (".c", ".h"):
            compile_after(path)
            link()
        return not passes(commands_of(mutant))
    finally:
        shutil.copy(ROOT / mutant["path"], path)
        compile_after(path)


def main():
    listed = read_mutants(sys.argv[1:])
    copy_tree()
    build_native()
    mutants = [mutant for mutant in listed if runs_here(mutant)]
    if len(mutants) < len(listed):
        missing = sorted({mutant["isa"] for mutant in listed if mutant not in mutants})
        print(f"{len(listed) - len(mutants)} not tried: this processor lacks {', '.join(missing)}", flush=True)
    for command in {tuple(commands_of(mutant)) for mutant in mutants}:
        if not passes(command):
            sys.exit(f"without any fault these fail: {' '.join(command)}")
    survivors = []
    for mutant in mutants:
        start = time.monotonic()
        killed = is_killed(mutant)
        print(
            f"{'killed  ' if killed else 'SURVIVES'} {time.monotonic() - start:5.1f} s  {mutant['path']}: "
            f"{mutant['why']}",
            flush=True,
        )
        survivors += [] if killed else [mutant]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
