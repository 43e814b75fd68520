"""What a multimodal model does around its decoder: images become embeddings, and positions count in more than one
dimension.

How far positions are ahead of tokens after its images (``rope_deltas``), such a model keeps on itself, of the latest
prompt only. So a cache keeps its own, which the model gets back whenever the cache goes on.
"""

import torch

from .cache import KeptCache


def give_deltas(outer, cache: KeptCache, n_row: int) -> None:
    """Before a filled cache goes on: the model's positions are ahead as they were for its prompt."""
    if "rope_deltas" in vars(outer):
        deltas, device = cache.origin.deltas, next(outer.parameters()).device
        own = torch.zeros(len(cache.valid or ()), 1, dtype=torch.long) if deltas is None else deltas
        outer.rope_deltas = own[:: max(1, len(own) // n_row)].to(device)


def taken_deltas(outer, n_row: int) -> torch.Tensor | None:
    """What the model keeps of the prompt that it runs, (n_row, 1)."""
    deltas = vars(outer).get("rope_deltas")
    return (
        None if deltas is None else deltas.detach().reshape(len(deltas), -1).repeat_interleave(n_row // len(deltas), 0)
    )
