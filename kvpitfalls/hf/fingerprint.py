"""What tells a decoder from others, and from itself at another time: its weights and the adapters that are active."""

import hashlib
from collections.abc import Iterator

import torch

from .offload import stored

_SAMPLES = 8  # weights per tensor that the fingerprint looks at


def fingerprint(decoder: torch.nn.Module) -> str:
    """Tells models apart whose caches do not fit each other: active adapters, and of every weight and buffer name,
    shape, dtype, a sample.

    Raises
    ------
    ValueError
        If a weight's values are nowhere to be found.
    """
    digest = hashlib.sha256(repr(active_adapters(decoder)).encode())
    samples: dict[torch.device, list[torch.Tensor]] = {}  # fetched a device at a time: each fetch waits for a GPU
    places: dict[tuple, torch.Tensor] = {}
    for name, weight in _weights(decoder):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.numel():
            key = weight.numel(), weight.device
            if key not in places:
                places[key] = (
                    torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(weight.device)
                )
            bits = (
                weight.detach().reshape(-1).view(torch.uint8).view(weight.numel(), -1)
            )  # float8 has few operations of its own
            samples.setdefault(weight.device, []).append(bits[places[key]].flatten())
    for of_device in samples.values():
        digest.update(torch.cat(of_device).cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights(decoder: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers; quantized ones as the tensors that they are made of, offloaded ones from where
    they wait."""
    for path, module in decoder.named_modules():
        own = {
            **module._parameters,
            **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set},
        }
        for name, weight in own.items():
            if weight is not None:
                yield from _plain(f"{path}.{name}", stored(module, name, weight))


def _plain(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if (flatten := getattr(weight, "__tensor_flatten__", None)) is not None:
        for part in flatten()[0]:
            yield from _plain(f"{name}.{part}", getattr(weight, part))
    elif weight.device.type == "meta":
        raise ValueError(
            f"the weight {name} is on the device 'meta', without values; expected a model whose weights can be read"
        )
    else:
        yield name, weight


def count_changes(decoder: torch.nn.Module) -> int:
    """How often its weights were changed in place; those that are offloaded come and go, and tell nothing."""
    here = (weight for weight in decoder.parameters() if weight.device.type != "meta")
    return sum(weight._version for weight in here if not weight.is_inference())


def active_adapters(decoder: torch.nn.Module) -> tuple[str, ...]:
    """Names of the adapters (LoRA and others) that the decoder's modules use now, sorted."""
    active: set[str] = set()
    for module in decoder.modules():
        names = getattr(module, "active_adapters", None)
        if isinstance(names, (list, tuple)) and not getattr(module, "disable_adapters", False):
            active.update(map(str, names))
    return tuple(sorted(active))
