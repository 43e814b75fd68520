# SPDX-License-Identifier: Apache-2.0
"""Builds the C core, ``kvpitfalls._core``, and, where nvcc is, its CUDA kernels, ``kvpitfalls._cuda``. All else stands
in pyproject.toml.

Switches, by environment variable: ``KVP_SANITIZE=1`` adds the address and undefined-behaviour sanitizers,
``KVP_WERROR=1`` turns the strict warnings on and into errors, ``KVP_CUDA=0`` leaves the kernels out and ``KVP_CUDA=1``
insists on them, ``KVP_CUDA_ARCHS="80 90"`` builds them for these architectures only. A change of switches needs
``build_ext --force``. GCC or Clang is expected, and CUDA 12.5 or later.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

try:
    import numpy
except ModuleNotFoundError:
    raise SystemExit(
        "kvpitfalls: NumPy is missing; expected pip install without --no-build-isolation, or pip install "
        "'setuptools>=77' 'numpy>=2' first"
    ) from None

FOLDERS = ("core", "rows", "score", "select", "evict", "backend")
# PTX of the last serves what comes after it.
CUDA_ARCHS = (os.environ.get("KVP_CUDA_ARCHS") or "80 86 89 90").split()
OLDEST_CUDA = [12, 5]  # the first that has cudaGetDriverEntryPointByVersion
NVCC_ARGS = [
    "-c",
    "-O3",
    "-std=c++17",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics,-Wall,-Wextra",
    "-Xptxas=-v",
]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wvla", "-Wmissing-prototypes", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
WHEELS = (
    "expected them, or a wheel, which needs neither: pip install --only-binary kvpitfalls kvpitfalls. Wheels are for "
    "CPython 3.11 and "
    "later (cp311-abi3), on Linux x86_64 and aarch64 with glibc 2.28 or later (manylinux_2_28) and on macOS 11 or "
    "later, arm64"
)
PYTHON_TRIAL = "#include <Python.h>\nint main(void) { return PY_MAJOR_VERSION != 3; }\n"
OPENMP_TRIAL = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"

# Builds without the GIL had no stable ABI before 3.15.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


def is_on(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def headers(*endings: str) -> list[str]:
    return [path for ending in endings for path in glob(f"csrc/**/*.{ending}", recursive=True)]


def find_nvcc() -> str | None:
    wanted = os.environ.get("KVP_CUDA", "")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None and is_on("KVP_CUDA"):
        raise SystemExit(
            f"kvpitfalls: KVP_CUDA is {wanted!r}, but there is no nvcc on the PATH or in {home}/bin; expected one"
        )
    return None if wanted == "0" else nvcc


class BuildCore(build_ext):
    """Adds what depends on the compiler: OpenMP where it works, and nvcc for the CUDA files."""

    def build_extensions(self):
        if reason := self._fails("int main(void) { return 0; }\n"):
            raise CompileError(f"kvpitfalls: there is no C compiler that works ({reason}); {WHEELS}")
        if self._fails(PYTHON_TRIAL, *headers_of_others):  # the compiler has said what it misses
            raise CompileError(f"kvpitfalls: Python's C headers are missing (Debian has them in python3-dev); {WHEELS}")
        if self._has_openmp():
            core.extra_compile_args.append("-fopenmp")
            core.extra_link_args.append("-fopenmp")
        super().build_extensions()

    def build_extension(self, extension):
        if extension.name.endswith("._cuda"):
            sources = sorted(glob("csrc/**/*.cu", recursive=True))
            folder = Path(self.build_temp, "cuda")
            folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                extension.extra_objects = list(pool.map(lambda source: self._run_nvcc(source, folder), sources))
        super().build_extension(extension)

    def _run_nvcc(self, source: str, folder: Path) -> str:
        """The object file of a CUDA source, made anew if anything it may include is newer."""
        target, log = folder / f"{Path(source).stem}.o", folder / f"{Path(source).stem}.log"
        inputs = ["setup.py", source, *headers("h", "def", "cuh")]
        if not self.force and target.exists() and all(os.path.getmtime(p) < target.stat().st_mtime for p in inputs):
            return str(target)
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        archs.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
        if Path(source).stem in ("sm90", "window"):  # Hopper's own instructions
            archs = ["-gencode=arch=compute_90a,code=sm_90a"]
        with tempfile.TemporaryDirectory() as kept:
            command = [nvcc, *NVCC_ARGS, *archs, "--keep", "--keep-dir", kept, source, "-o", str(target)]
            run = subprocess.run(command, capture_output=True, text=True)
            for ptx in Path(kept).glob("*.ptx"):  # tests/kernel_code.py reads it
                shutil.copy(ptx, folder)
        log.write_text(run.stdout + run.stderr)
        if run.returncode:
            raise CompileError(f"nvcc failed on {source} (KVP_CUDA=0 builds without CUDA kernels):\n{run.stderr}")
        return str(target)

    def _fails(self, text: str, *arguments: str) -> str | None:
        """Why a source text cannot be compiled; None if it can."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.c")
            source.write_text(text)
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[*arguments])
            except CompileError as error:
                return str(error)
        return None

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp_trial.c")
            source.write_text(OPENMP_TRIAL)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, "openmp_trial", output_dir=folder, extra_postargs=["-fopenmp"])
            except (CompileError, LinkError):
                print("kvpitfalls: this compiler has no OpenMP, so the core will run on one thread")
                return False
        return True


# -isystem, so that the strict warnings are about our own code.
headers_of_others = ["-isystem", numpy.get_include(), "-isystem", sysconfig.get_path("include")]
compile_args = ["-std=c17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", *headers_of_others]
link_args = []
if is_on("KVP_WERROR"):
    compile_args += WARNINGS
if is_on("KVP_SANITIZE"):
    compile_args += SANITIZERS
    link_args += SANITIZERS

macros = [("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else []
depends = headers("h", "def")
core = Extension(
    "kvpitfalls._core",
    sources=[
        *sorted(path for folder in FOLDERS for path in glob(f"csrc/{folder}/**/*.c", recursive=True)),
        *sorted(set(glob("csrc/python/*.c")) - {"csrc/python/cuda_module.c"}),
    ],
    depends=depends,
    include_dirs=["csrc"],
    define_macros=macros,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    py_limited_api=STABLE_ABI,
)
extensions = [core]

nvcc = find_nvcc()
if nvcc:
    version = re.search(
        r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    )[1]
    if [int(part) for part in version.split(".")] < OLDEST_CUDA:
        expected = f"{nvcc} is of CUDA {version}; expected 12.5 or later"
        if is_on("KVP_CUDA"):
            raise SystemExit(f"kvpitfalls: {expected}")
        print(f"kvpitfalls: {expected}, so the CUDA kernels are left out")
        nvcc = None
if nvcc:
    plan = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    cuda_libraries = re.findall(r'"-L([^"]+)"', re.search(r"LIBRARIES=(.*)", plan)[1])
    extensions.append(
        Extension(
            "kvpitfalls._cuda",
            sources=["csrc/python/cuda_module.c", "csrc/core/status.c", "csrc/core/dtype.c"],
            depends=headers("h", "def", "cu", "cuh"),
            include_dirs=["csrc"],
            define_macros=[*macros, ("KVPB_NVCC", f'"{version}"'), ("KVPB_ARCHITECTURES", f'"{" ".join(CUDA_ARCHS)}"')],
            library_dirs=cuda_libraries,
            libraries=["cudart_static", "dl", "pthread", "rt"],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            py_limited_api=STABLE_ABI,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
