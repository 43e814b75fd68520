"""What must not stand in the code of the CUDA kernels: ``make cuda`` runs this, on PTX for a GPU before Hopper and on
PTX for Hopper.

A kernel that does nothing but return (it was compiled away for an architecture, and would leave its output as it was);
a load through the read-only path (``ld.global.nc``), which may be older than what the kernel before wrote; and, where
kernels wait for the one before, an access to global memory ahead of that.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ["80", "90"]
HOPPER = ("sm90", "window")  # sources with Hopper's own instructions
GLOBAL = re.compile(r"(?:ld|st|atom|red|cp\.async\S*)\.(?:\w+\.)*global|cp\.async\.bulk")


def make_ptx(source, architecture):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernels.ptx")
        target = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
        subprocess.run(["nvcc", "-ptx", "-std=c++17", target, source, "-o", out], check=True)
        return out.read_text()


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
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    work = [
        (source, "90a" if source.stem in HOPPER else a)
        for source in sources
        for a in ARCHITECTURES
        if source.stem not in HOPPER or a != "80"
    ]
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda pair: make_ptx(*pair), work))
    n_kernel, faults = 0, []
    for (source, architecture), ptx in zip(work, texts, strict=True):
        for name, instructions in read_kernels(ptx).items():
            n_kernel += 1
            faults += [
                f"{source.stem}, {architecture}: {f}"
                for f in find_faults(name, instructions, architecture.startswith("90"))
            ]
        if len(read_kernels(ptx)) != ptx.count(".entry "):
            faults.append(
                f"{source.stem}, {architecture}: {ptx.count('.entry ')} kernels, of which {len(read_kernels(ptx))} "
                "could be read"
            )
    print(*faults, f"{n_kernel} kernels, {len(faults)} faults", sep="\n")
    sys.exit(bool(faults) or n_kernel == 0)


if __name__ == "__main__":
    main()
