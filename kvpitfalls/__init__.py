"""Show, measure and prevent the loss of instructions under KV cache compression.

Importing this package loads neither torch nor transformers; a name is imported when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AdaKV": "policies.adakv",
    "Allocation": "eviction.allocation",
    "Audit": "audits.audit",
    "audit": "audits.retention",
    "BudgetError": "errors",
    "ChunkKV": "policies.chunkkv",
    "CudaError": "errors",
    "DefensiveKV": "policies.defensivekv",
    "DeviceError": "errors",
    "ExpectedAttention": "policies.expected_attention",
    "Fair": "eviction.fairness",
    "H2O": "policies.h2o",
    "Handle": "hf.wrap",
    "KNorm": "policies.knorm",
    "KVzip": "policies.kvzip",
    "KeyDiff": "policies.keydiff",
    "Kept": "eviction.selection",
    "KeptCache": "hf.cache",
    "LagKV": "policies.lagkv",
    "NotInterceptedError": "errors",
    "Policy": "policies",
    "Prompt": "prompts.prompt",
    "PyramidKV": "policies.pyramidkv",
    "RKV": "policies.rkv",
    "Report": "hf.report",
    "Rotary": "policies.rotary",
    "SnapKV": "policies.snapkv",
    "Span": "prompts.spans",
    "StreamingLLM": "policies.streaming_llm",
    "TOVA": "policies.tova",
    "UnsupportedModelError": "errors",
    "effects": "experiments.effects",
    "explore": "display.explore",
    "keep": "eviction.selection",
    "load_cache": "hf.save",
    "unwrap": "hf.wrap",
    "wrap": "hf.wrap",
}
_MODULES = {"ops": "eviction.ops", "policies": "policies", "reference": "eviction.reference"}

__all__ = [*sorted(_HOME), *_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll] # __init__.pyi has them one by one


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(import_module(f"kvpitfalls.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"kvpitfalls.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'kvpitfalls' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
