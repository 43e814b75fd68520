"""A check on a live model: the order of cached rows must not matter, or eviction would change more than what it
removes."""

import contextlib
from collections.abc import Iterator

import torch

from ..errors import UnsupportedModelError
from .alone import copied
from .arguments import cache_argument
from .cache import KeptCache
from .evict import Action
from .forward import AttentionCall
from .layer import KeptLayer
from .model import attached
from .parts import decoder_of, device_of, n_known_of
from .rows import FORGETFUL


class Shuffle(Action):
    """A cache's action: keep every row, but each head's in an order of its own."""

    evicts = True

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def after_prefill(self, layer: KeptLayer, call: AttentionCall) -> None:
        """Shuffle ``layer``."""
        n_row, n_head, n_token = layer.keys.shape[:3]
        order = (
            torch.rand(n_row, 1 if call.share_heads else n_head, n_token, generator=self.generator, device="cpu")
            .argsort(-1)
            .to(layer.keys.device)
        )
        order = order.expand(-1, n_head, -1)
        keys, values = (
            x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (layer.keys, layer.values)
        )
        layer.keep(keys, values, order.int(), True)


@torch.no_grad()
def shuffle_difference(model, n_token: int, tolerance: float) -> float:
    """See :meth:`kvpitfalls.Handle.verify`."""
    decoder = decoder_of(model)
    device = device_of(decoder)
    n_vocab = n_known_of(model)
    if n_vocab is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not tell how many tokens it knows; expected a torch.nn.Embedding of its ids"
        )
    ids = torch.randint(0, n_vocab, (1, n_token), generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    cut = n_token // 2
    with attached(model):
        outputs = []
        for action in (Action(), Shuffle()):
            cache = KeptCache(model.config, action)
            with _not_remembering(decoder):
                decoder(input_ids=ids[:, :cut], use_cache=True, **cache_argument(decoder, cache))
                for new in ids[:, cut:].split(1 if model.config.model_type in FORGETFUL else n_token, 1):
                    logits = model(input_ids=new, use_cache=True, **cache_argument(model, cache))[0]  # or hidden states
            outputs.append(logits.float())
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__}: shuffling cached rows changes its logits by {difference:.2g} of the largest; "
            f"expected at most {tolerance:g}"
        )
    return difference


@contextlib.contextmanager
def _not_remembering(decoder) -> Iterator[None]:
    """Rotary embeddings are copies meanwhile: dynamic ones turn each forward by the farthest position that they were
    ever asked for, so that the second of two equal passes, and the caller's next prompt, would be turned otherwise."""
    own = [
        (parent, name, module)
        for parent in decoder.modules()
        for name, module in parent.named_children()
        if hasattr(module, "max_seq_len_cached")
    ]
    try:
        for parent, name, module in own:
            setattr(parent, name, copied(module))
        yield
    finally:
        for parent, name, module in own:
            setattr(parent, name, module)
