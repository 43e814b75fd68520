"""One attention module is called alone, on random hidden states, to see what it does before it attends and after."""

import copy
import inspect
from typing import Any

import torch

from ..errors import UnsupportedModelError
from .forward import Watched, watched
from .parts import device_of, forwards_of

# What a module says that was not made to be called alone: something is missing, or of another shape or kind.
COMPLAINTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_PLACES = (1, 4, 9, 3)  # positions of what it is called with


def embedding_of(decoder):
    """A copy of a decoder's rotary embedding, since some change when asked for far positions; None if it has none."""
    return copied(getattr(decoder, "rotary_emb", None))


def copied(embedding):
    """The same with buffers of its own; its config is only read, and takes longer to copy than all else."""
    config = getattr(embedding, "config", None)
    return copy.deepcopy(embedding, {id(config): config})


def options_of(decoder, embedding, index: int) -> dict:
    """What the embedding is called with for this layer, beside hidden states and positions."""
    by_kind = embedding is not None and "layer_type" in inspect.signature(embedding.forward).parameters
    kinds = getattr(decoder.config, "layer_types", None)  # PhiMoE of transformers 5.2 takes a kind and has none
    return {"layer_type": kinds[index]} if by_kind and kinds is not None else {}


def arguments_for(decoder, module) -> dict:
    """Hidden states (1, n, E) of a few tokens and their positions, where this module takes them."""
    weight = next((x for x in decoder.get_input_embeddings().parameters() if x.is_floating_point()), None)
    dtype, device = torch.float32 if weight is None else weight.dtype, device_of(module)
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(1, len(_PLACES), decoder.config.hidden_size, generator=generator, device="cpu")
    return {"hidden_states": hidden.to(device, dtype), "position_ids": torch.tensor([_PLACES], device=device)}


def turned_arguments_for(decoder, module, index: int) -> dict:
    """:func:`arguments_for`, with what the decoder's rotary embedding gives to this layer for these positions."""
    arguments, embedding = arguments_for(decoder, module), embedding_of(decoder)
    if embedding is not None:
        arguments["position_embeddings"] = embedding(
            arguments["hidden_states"], arguments["position_ids"], **options_of(decoder, embedding, index)
        )
    return arguments


@torch.no_grad()
def called(module, arguments: dict, attended: torch.Tensor | None = None) -> Watched:
    """An attached decoder's module, called alone: its queries, and what it returns if it attended to ``attended``.

    Parameters
    ----------
    module : torch.nn.Module
    arguments : dict
        Arguments; those that its forward does not take by name are left out.
    attended : tensor (1, n, Hq, Dv), optional
        Zeros by default.

    Returns
    -------
    Watched
    """
    *_, forward = forwards_of(module)  # not what may stand before it
    known = dict(list(inspect.signature(forward).parameters.items())[1:])
    required = [n for n, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    needed: dict[str, Any] = dict.fromkeys(required)
    if "shared_kv_states" in known:  # Gemma's layers leave their keys there for later ones
        needed["shared_kv_states"] = {}
    taken = {name: value for name, value in arguments.items() if name in known}
    return watched(module, attended, **{**needed, **taken})


def same(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal but for some roundings to this type."""
    if one.shape != other.shape:
        return False
    eps = max(torch.finfo(x).eps for x in (dtype, torch.float32))  # what is finer was rounded away
    return bool((one.float() - other.float()).abs().max() <= 32 * eps * other.float().abs().max())


def answered(decoder, index: int, wanted: str, ask, *args):
    """What ``ask(*args)`` returns; whatever a module says that was not made to be called alone refuses the model."""
    try:
        return ask(*args)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except COMPLAINTS as reason:
        whose = f"{type(decoder).__name__} cannot be asked for the {wanted} of layer {index}"
        told = f"{whose} ({type(reason).__name__}: {reason})"
        raise UnsupportedModelError(f"{told}; the policy needs to know and expects a model that can") from reason
