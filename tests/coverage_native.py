"""How much of csrc/ was run, by gcov: adds up all .gcda files under the folders given, prints a table, and demands the
thresholds.

A line, or the n-th way out of a branch, counts as run if any build and any instance ran it (rows_template.h is compiled
many times). Left out by name: what the machine at hand cannot run, or what needs nvcc. What only an instruction set
runs that this processor lacks is left out, too: shares are of what could run, on every machine.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from test_isa import available

ROOT = Path(__file__).parent.parent
LEFT_OUT = {
    "rows/rows_neon.c": "Arm's; make arm runs it",
    "python/cuda_module.c": "needs nvcc",
    "examples/press.c": "make library-check builds and runs it",
}
OF_ISA = {  # instruction set -> file and names of the functions that only it runs
    "avx2": ("rows/rows_avx2.c", ".*"),
    "avx512": ("rows/rows_avx512.c", ".*"),
    "avx512_bf16": ("rows/rows_avx512.c", ".*_pairs"),
    "amx": ("rows/rows_avx512.c", ".*_tiles|multiply_four|multiply_any"),
}
LINES, BRANCHES = 95.0, 85.0


def cannot_run(file, function, missing):
    return any(file == OF_ISA[isa][0] and re.fullmatch(OF_ISA[isa][1], function) for isa in missing)


def read_gcov(data):
    command = ["gcov", "--json-format", "--branch-probabilities", "--stdout", str(data)]
    for line in subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=data.parent
    ).stdout.splitlines():
        report = json.loads(line)
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"]).resolve()
            if path.is_relative_to(ROOT / "csrc"):
                yield str(path.relative_to(ROOT / "csrc")), file["lines"]


def add_up(folders, missing):
    """{file: {line: count}} and {file: {(line, way out): count}}"""
    lines, branches = defaultdict(lambda: defaultdict(int)), defaultdict(lambda: defaultdict(int))
    for data in sorted(path for folder in folders for path in Path(folder).resolve().rglob("*.gcda")):
        for name, rows in read_gcov(data):
            for row in rows:
                if cannot_run(name, row.get("function_name", ""), missing):
                    continue
                lines[name][row["line_number"]] += row["count"]
                for i, branch in enumerate(row["branches"]):
                    branches[name][row["line_number"], i] += branch["count"]
    return lines, branches


def share(counts):
    return 100 * sum(count > 0 for count in counts) / len(counts) if counts else 100.0


def main(folders):
    here = available()
    missing_here = [isa for isa in OF_ISA if isa not in here]
    lines, branches = add_up(folders, missing_here)
    names = sorted(set(lines) - set(LEFT_OUT))
    expected = {str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.c")} - set(LEFT_OUT)
    expected -= {OF_ISA[isa][0] for isa in missing_here}
    if missing := expected - set(names):
        sys.exit(f"nothing was measured of {', '.join(sorted(missing))}")
    for name in names:
        missed = [number for number, count in sorted(lines[name].items()) if not count]
        print(
            f"{name:28} lines {share(lines[name].values()):6.1f} %   branches {share(branches[name].values()):6.1f} % "
            f"  {missed or ''}"
        )
    for name, reason in LEFT_OUT.items():
        print(f"{name:28} left out: {reason}")
    for isa in missing_here:
        print(f"{OF_ISA[isa][0]:28} left out: what only {isa} runs; this processor, or this build, lacks it")
    of_lines = share([count for name in names for count in lines[name].values()])
    of_branches = share([count for name in names for count in branches[name].values()])
    print(
        f"csrc/ in all: lines {of_lines:.1f} % (at least {LINES:g}), branches {of_branches:.1f} % (at least "
        f"{BRANCHES:g})"
    )
    sys.exit(of_lines < LINES or of_branches < BRANCHES)


if __name__ == "__main__":
    main(sys.argv[1:])
