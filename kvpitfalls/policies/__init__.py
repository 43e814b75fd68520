"""Eviction policies: one file each. Every module of this folder is imported here, so a new file is all a new policy
needs."""

from importlib import import_module
from pkgutil import iter_modules

from ..eviction.layer_inputs import Again, LayerInputs
from .base import Inputs, Policy, get_policy, policy_names
from .votes import Vote

#: The policies of "The Pitfalls of KV Cache Compression", which audits show by default.
PAPER = ("h2o", "knorm", "snapkv", "streaming_llm", "tova")

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Again", "Inputs", "LayerInputs", "Policy", "Vote", "get_policy", "policy_names"]
