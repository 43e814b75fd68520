"""What must not stand in the code of the CUDA kernels: ``make cuda`` runs this, on the PTX of every architecture that
setup.py left in build/.

A kernel that does nothing but return (it was compiled away for an architecture, and would leave its output as it was);
a load through the read-only path (``ld.global.nc``), which may be older than what the kernel before wrote; and, where
kernels wait for the one before, an access to global memory ahead of that.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLOBAL = re.compile(r"(?:ld|st|atom|red|cp\.async\S*)\.(?:\w+\.)*global|cp\.async\.bulk")


def read_kernels(ptx):
    """The instructions of each kernel, by name."""
    kernels = {}
    for name, body in re.findall(r"\.entry (\w+)\(.*?\)\n.*?\n?\{(.*?)\n\}", ptx, re.DOTALL):
        lines = (re.sub(r"^@!?%p\d+\s+|//.*", "", line.strip()) for line in body.splitlines())
        kernels[name] = [line for line in lines if line and not line.startswith((".", "$", "{", "}", "//"))]
    return kernels


def find_faults(name, instructions, waits):
    """Sentences about one kernel; waits: it is compiled for a GPU on which kernels wait for the one before."""
    if all(i in ("ret;", "bra.uni", "exit;") for i in instructions):
        yield f"{name} does nothing"
    if any(i.startswith("ld.global.nc") for i in instructions):
        yield f"{name} reads global memory through the read-only path"
    wait = next((n for n, i in enumerate(instructions) if i.startswith("griddepcontrol.wait")), len(instructions))
    first = next((n for n, i in enumerate(instructions) if GLOBAL.match(i)), len(instructions))
    if waits and first < wait:
        yield f"{name} reads or writes global memory before it waits for the kernel before"


def main():
    n_kernel, faults = 0, []
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        files = sorted((ROOT / "build").glob(f"temp*/cuda/{source.stem}.*ptx"))
        faults += [] if files else [f"{source.stem}: no PTX in build/temp*/cuda; expected that of a build by setup.py"]
        for ptx in (path.read_text() for path in files):
            architecture = int(re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)[1])
            kernels = read_kernels(ptx)
            n_kernel += len(kernels)
            wrong = [f for name, body in kernels.items() for f in find_faults(name, body, waits=architecture >= 90)]
            if len(kernels) != ptx.count(".entry "):
                wrong.append(f"{ptx.count('.entry ')} kernels, of which {len(kernels)} could be read")
            faults += [f"{source.stem}, {architecture}: {f}" for f in wrong]
    print(*faults, f"{n_kernel} kernels, {len(faults)} faults", sep="\n")
    sys.exit(bool(faults) or n_kernel == 0)


if __name__ == "__main__":
    main()
