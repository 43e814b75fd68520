"""Scores by the attention that queries to come are expected to pay to keys, by the core."""

from typing import TYPE_CHECKING

from .. import _core
from .arrays import Int32
from .ops import cuda_path, n_worker, workspace

if TYPE_CHECKING:
    import torch

_CUDA_DIMS = (64, 96, 128, 256)  # that there are kernels for


def is_known(keys: "torch.Tensor", queries: "torch.Tensor") -> bool:
    """Whether :func:`expect` takes them: of one type, with channels that pair, and on a GPU as many as it has kernels
    for.

    Examples
    --------
    >>> import torch
    >>> is_known(torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 64))
    True
    """
    n_dim = keys.shape[-1]
    if keys.dtype != queries.dtype or n_dim % 2:
        return False
    return not keys.is_cuda or (n_dim in _CUDA_DIMS and cuda_path(keys.device.index)[0])


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
        On a GPU, for another number of channels than 64, 96, 128 or 256.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> x, angles = torch.ones(1, 1, 2, 64), (torch.ones(1, 2, 64), torch.zeros(1, 2, 64))
    >>> ahead = tuple(a[:, 0] for a in angles)
    >>> expect(x, x, x, angles, ahead, np.array([[0, 0, 2]], np.int32), scaling=1.0)[1].tolist()
    [[[4.0, 4.0]]]
    """
    import torch

    if keys.is_cuda:
        cuda_path(keys.device.index)  # gives the kernels to the core
    logits, scores = (keys.new_empty(x.shape[:3], dtype=torch.float32) for x in (queries, keys))
    tables = turns[0][:, None], turns[1][:, None], *ahead, edges, sinks
    arguments = keys, queries, values, *tables, logits, scores, scaling, epsilon, with_spread
    _core.expect(*arguments, workspace(keys, _core.expect_workspace, arguments), n_worker())
    return logits, scores
