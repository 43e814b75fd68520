"""Logits that queries to come are expected to give to keys, by the CUDA kernels of the core."""

from typing import TYPE_CHECKING

from .. import _core
from .ops import cuda_path, lendable

if TYPE_CHECKING:
    import torch

_DIMS = (64, 96, 128)  # that there are kernels for


def has_kernels(keys: "torch.Tensor", queries: "torch.Tensor") -> bool:
    """Whether :func:`expect` takes them: on a GPU, of one type, and with as many channels as it has kernels for.

    Examples
    --------
    >>> import torch
    >>> has_kernels(torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 64))
    False
    """
    fits = keys.is_cuda and keys.dtype == queries.dtype and keys.shape[-1] in _DIMS
    return fits and cuda_path(keys.device.index)[0]


def expect(
    keys: "torch.Tensor",
    queries: "torch.Tensor",
    turns: "tuple[torch.Tensor, torch.Tensor]",
    ahead: "tuple[torch.Tensor, torch.Tensor]",
    scaling: float,
    with_spread: bool,
) -> "torch.Tensor":
    """The logits of ``kvp_expect`` in ``csrc/kvp.h``.

    Parameters
    ----------
    keys : tensor, shape (B, H, T, D)
    queries : tensor, shape (B, H*G, T, D)
        After rotary embedding that pairs channels d and d + D/2.
    turns : (tensor, tensor) of float32, shape (B, T, D)
        Cosines and sines that turned the queries.
    ahead : (tensor, tensor) of float32, shape (B, D)
        Those of the turn to come, a mean.
    scaling : float
    with_spread : bool
        Whether the covariance of queries counts, or their mean alone.

    Returns
    -------
    tensor of float32, shape (B, H*G, T)

    Raises
    ------
    NotImplementedError
        On a CPU, where products of torch are as fast.

    Examples
    --------
    >>> import torch
    >>> x, angles = torch.zeros(1, 1, 1, 64), (torch.ones(1, 1, 64), torch.zeros(1, 1, 64))
    >>> expect(x, x, angles, tuple(a[:, 0] for a in angles), 1.0, True)
    Traceback (most recent call last):
    NotImplementedError: this device has no verb "expect"
    """
    import torch

    if keys.is_cuda:
        cuda_path(keys.device.index)  # gives the kernels to the core
    logits = keys.new_empty(queries.shape[:3], dtype=torch.float32)
    tables = turns[0][:, None], turns[1][:, None], *ahead
    arguments = lendable(keys, "keys"), lendable(queries, "queries"), *tables, logits, scaling, with_spread
    scratch = keys.new_empty(_core.expect_workspace(*arguments, 1), dtype=torch.uint8)
    _core.expect(*arguments, scratch, 1)
    return logits
