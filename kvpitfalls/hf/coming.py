"""A prompt that comes in chunks: what is known of it before the first one."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch

from .threads import local


class Coming:
    """One prefill in chunks.

    Attributes
    ----------
    n_token : int
        Of the whole prompt, padding included.
    valid : list of (int, int)
        Per row, the range of its real tokens.
    """

    def __init__(self, decoder: torch.nn.Module, n_token: int, valid: Sequence[tuple[int, int]]) -> None:
        self.decoder, self.n_token, self.valid = weakref.ref(decoder), n_token, list(valid)
        self.is_taken = False  # by the cache that it fills
        for row, (_, end) in enumerate(valid):
            if end != n_token:
                raise ValueError(
                    f"row {row} of the prompt is padded on the right; prefill_chunk_size expects padding on the left, "
                    "so that each row's last token is in the last chunk"
                )

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """A block in which this thread's forwards of the decoder bring its chunks."""
        before = local.coming
        try:
            local.coming = self
            yield
        finally:
            local.coming = before

    def check_chunk(self, n_row: int, n_seen: int, n_new: int, position_ids: object) -> None:
        """Raise if a forward brings no chunk of it."""
        if n_row != len(self.valid) or n_seen + n_new > self.n_token:
            raise ValueError(
                f"a chunk of {n_new} tokens in {n_row} rows came after {n_seen}; expected chunks of a prompt of "
                f"{self.n_token} tokens in {len(self.valid)} rows"
            )
        begins = torch.tensor([begin for begin, _ in self.valid], device="cpu")
        if not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 2:
            return
        place = torch.arange(n_seen, n_seen + n_new, device="cpu") - begins[:, None]
        positions = position_ids.cpu().expand(n_row, -1)
        if bool(((positions != place) & (place >= 0)).any()):
            raise ValueError(
                "a chunk came with positions that are not its tokens', as generate before transformers 5.5 gives them "
                "with prefill_chunk_size (4.57: where there is padding); expected a later release, or "
                "handle.compress(..., prefill_chunk_size=...)"
            )
