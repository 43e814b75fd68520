"""Scores by the attention that queries to come are expected to pay to keys, by the CUDA kernels of the core."""

from typing import TYPE_CHECKING

from .. import _core
from .arrays import Int32
from .ops import cuda_path

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
    values: "torch.Tensor | None",
    turns: "tuple[torch.Tensor, torch.Tensor]",
    ahead: "tuple[torch.Tensor, torch.Tensor]",
    edges: Int32,
    *,
    scaling: float,
    sinks: "torch.Tensor | None" = None,
    epsilon: float = 0.0,
    with_spread: bool = True,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Logits and scores of ``kvp_expect`` in ``csrc/kvp.h``.

    Parameters
    ----------
    keys : tensor, shape (B, H, T, D)
    queries : tensor, shape (B, H*G, T, D)
        After rotary embedding that pairs channels d and d + D/2.
    values : tensor, shape (B, H, T, Dv), or None
        By whose lengths scores are multiplied.
    turns : (tensor, tensor) of float32, shape (B, T, D)
        Cosines and sines that turned the queries.
    ahead : (tensor, tensor) of float32, shape (B, D)
        Those of the turn to come, a mean.
    edges : ndarray of int32, shape (B, S+2)
        Of segments, ascending. Tokens of the first are not judged and score above all others; softmaxes are over each
        of the others.
    scaling : float
    sinks : tensor of float32, shape (H*G,), or None
        A logit that joins each softmax of a query head.
    epsilon : float
    with_spread : bool
        Whether the covariance of queries counts, or their mean alone.

    Returns
    -------
    (tensor, tensor) of float32, shapes (B, H*G, T) and (B, H, T)
        Tokens that are not judged have no logits.

    Raises
    ------
    NotImplementedError
        On a CPU, where products of torch are as fast.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> x, angles = torch.zeros(1, 1, 1, 64), (torch.ones(1, 1, 64), torch.zeros(1, 1, 64))
    >>> expect(x, x, x, angles, tuple(a[:, 0] for a in angles), np.array([[0, 0, 1]], np.int32), scaling=1.0)
    Traceback (most recent call last):
    NotImplementedError: this device has no verb "expect"
    """
    import torch

    if keys.is_cuda:
        cuda_path(keys.device.index)  # gives the kernels to the core
    logits, scores = (keys.new_empty(x.shape[:3], dtype=torch.float32) for x in (queries, keys))
    tables = turns[0][:, None], turns[1][:, None], *ahead, edges, sinks
    arguments = keys, queries, values, *tables, logits, scores, scaling, epsilon, with_spread
    scratch = keys.new_empty(_core.expect_workspace(*arguments, 1), dtype=torch.uint8)
    _core.expect(*arguments, scratch, 1)
    return logits, scores
