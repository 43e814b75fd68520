"""What each thread is doing with wrapped models."""

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .coming import Coming


class Outer(NamedTuple):
    """The module around a decoder, and the ids and the attention mask that it was given."""

    module: Any
    ids: Any
    mask: Any


class _Local(threading.local):
    """What a thread begins with."""

    forward: Any = None  # the Forward that it is in, if its decoder is wrapped and its cache is ours; or a Watched
    coming: "Coming | None" = None  # the prompt that it brings to a cache in chunks
    paused: tuple[Any, ...] = ()  # decoders that it runs as if they were not wrapped
    generating: tuple[Any, ...] = ()  # calls of generate, the innermost last
    outer: Outer | None = None  # whose forward it is in

    def is_paused(self, decoder: Any) -> bool:
        """Whether it runs this decoder as if it were not wrapped."""
        return any(other is decoder for other in self.paused)


local = _Local()
