"""The CUDA kernels: importing this module gives them to :mod:`kvpitfalls._core`. See csrc/python/cuda_module.c."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    architectures: str

def build_info() -> BuildInfo: ...
