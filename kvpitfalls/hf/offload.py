"""Weights that accelerate keeps on the CPU or on disk: until their module is called they are on the device 'meta',
without values."""

import torch


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module takes its input: on its first weight's device or, if that is offloaded, on the one where it is
    run.

    Raises
    ------
    ValueError
        If its weights have no values.
    """
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    places = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    place = next((place for place in places if place is not None), None)
    if place is None:
        raise ValueError(
            "the model is on the device 'meta', without values; expected one whose weights are loaded, or offloaded "
            "by accelerate"
        )
    return torch.device(place)


def stored(module: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A module's own weight of this name; if it is offloaded, from where it waits."""
    if weight.device.type != "meta":
        return weight
    waiting = (getattr(hook, "weights_map", None) for hook in _hooks(module))
    return next((weights[name] for weights in waiting if weights is not None and name in weights), weight)


def _hooks(module: torch.nn.Module) -> list:
    """accelerate's hooks of a module; several stand in one."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
