"""What each thread is doing with wrapped models."""

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coming import Coming


class _Local(threading.local):
    """What a thread begins with."""

    forward: Any = None  # the Forward that it is in, if its decoder is wrapped and its cache is ours; or a Watched
    coming: "Coming | None" = None  # the prompt that it brings to a cache in chunks
    paused: tuple[Any, ...] = ()  # decoders that it runs as if they were not wrapped
    generating: tuple[Any, ...] = ()  # calls of generate, the innermost last
    outer: Any = None  # the module around a decoder whose forward it is in, and the ids that it was given

    def is_paused(self, decoder: Any) -> bool:
        """Whether it runs this decoder as if it were not wrapped."""
        return any(other is decoder for other in self.paused)


local = _Local()
