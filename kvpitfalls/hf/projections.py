"""The output projections of a model's attention modules, each tried by calling the module alone."""

import weakref
from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..errors import UnsupportedModelError
from .alone import answered, called, same, turned_arguments_for

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_known: "weakref.WeakKeyDictionary[torch.nn.Module, str]" = (
    weakref.WeakKeyDictionary()
)  # names, of modules that were tried


def projections_of(decoder, layers: Mapping[torch.nn.Module, int]) -> dict[torch.nn.Module, Callable]:
    """Per attention module a function that gives the projection of each head; see :func:`_by_head`.

    Raises
    ------
    UnsupportedModelError
        If a module does something else with what it attended to than to project it.
    """
    for module, index in layers.items():
        if module not in _known:
            _known[module] = answered(decoder, index, "output projection", _tried, decoder, module, index)
    return {module: partial(_by_head, getattr(module, _known[module])) for module in layers}


@torch.no_grad()
def _tried(decoder, module, index: int) -> str:
    """The name of this module's output projection."""
    arguments = turned_arguments_for(decoder, module, index)
    shape, generator = called(module, arguments).attended.shape, torch.Generator("cpu").manual_seed(1)
    draw = torch.randn(shape, generator=generator, device="cpu").to(arguments["hidden_states"])
    returned = called(module, arguments, draw).returned
    for name in _NAMES:
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Module) and same(projection(draw.flatten(2)), returned, draw.dtype):
            return name
    raise UnsupportedModelError(
        f"{type(decoder).__name__} does more in layer {index} with what was attended to than to project it; the "
        "policy weighs values by "
        f"the output projection and expects one, called {', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
    )


@torch.no_grad()
def _by_head(projection, attended: torch.Tensor) -> torch.Tensor:
    """What a projection makes of each head's part of ``attended`` (..., Hq, Dv): float32 (Hq, Dv, E).

    Asked of the module, which may be quantized, adapted, sharded or offloaded, unless it is a plain one.
    """
    n_head, n_dim = attended.shape[-2:]
    weight = projection.weight if type(projection) is torch.nn.Linear else None
    if type(weight) is torch.nn.Parameter and weight.device == attended.device:
        matrix = weight.T
    else:
        matrix = projection(torch.eye(n_head * n_dim, dtype=attended.dtype, device=attended.device)[None])[0]
        matrix = matrix.float() - projection(attended.new_zeros(1, 1, n_head * n_dim))[0].float()
    return matrix.detach().float().unflatten(0, (n_head, n_dim))
