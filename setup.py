# SPDX-License-Identifier: Apache-2.0
"""Builds the C core, ``kvpitfalls._core``; everything else about the package stands in pyproject.toml.

Switches, by environment variable: ``KVP_SANITIZE=1`` adds the address and undefined-behaviour sanitizers, ``KVP_WERROR=1`` turns the strict
warnings on and into errors. A change of switches needs ``build_ext --force``. GCC or Clang is expected.
"""

import os
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDERS = ("core", "rows", "score", "select", "evict", "backend", "python")
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wvla", "-Wmissing-prototypes", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
OPENMP_TRIAL = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"

# Builds without the GIL had no stable ABI before 3.15.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


def is_on(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


class BuildCore(build_ext):
    """Adds what depends on the compiler: OpenMP where it works."""

    def build_extensions(self):
        if self._has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        super().build_extensions()

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

core = Extension(
    "kvpitfalls._core",
    sources=sorted(path for folder in FOLDERS for path in glob(f"csrc/{folder}/*.c")),
    depends=[*glob("csrc/*.h"), *glob("csrc/*/*.h"), *glob("csrc/*.def")],
    include_dirs=["csrc"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else [],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    py_limited_api=STABLE_ABI,
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
