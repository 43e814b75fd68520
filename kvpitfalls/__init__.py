"""Show, measure and prevent the loss of instructions under KV cache compression.

Importing this package loads neither torch nor transformers; a name is imported when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "Audit": "audits.found",
    "audit": "audits.retention",
    "CudaError": "errors",
    "DeviceError": "errors",
    "Fair": "fairness",
    "H2O": "policies.h2o",
    "Handle": "hf.wrap",
    "KNorm": "policies.knorm",
    "Kept": "selection",
    "KeptCache": "hf.cache",
    "NotInterceptedError": "errors",
    "Policy": "policies",
    "Prompt": "prompt",
    "Report": "hf.report",
    "SnapKV": "policies.snapkv",
    "Span": "prompt",
    "StreamingLLM": "policies.streaming_llm",
    "TOVA": "policies.tova",
    "UnsupportedModelError": "errors",
    "keep": "selection",
    "load_cache": "hf.cache_file",
    "wrap": "hf.wrap",
}
_MODULES = ("ops", "policies", "reference")

__all__ = [*sorted(_HOME), *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f"kvpitfalls.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"kvpitfalls.{name}")
    else:
        raise AttributeError(f"module 'kvpitfalls' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
