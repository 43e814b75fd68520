"""What each thread is doing with wrapped models, and what each thread or task of asyncio has paused."""

import threading
from contextvars import ContextVar
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
    generating: tuple[Any, ...] = ()  # calls of generate, the innermost last
    outer: Outer | None = None  # whose forward it is in


local = _Local()


class Pause:
    """A block in which a thread, or a task of asyncio, runs a decoder as if it were not wrapped.

    Tasks of one thread take turns in the midst of their blocks, and what a task starts may go on after its end: so the
    end of a block takes away its own pause alone, and one that is over counts nowhere.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder  # None once it is over

    def begin(self) -> None:
        """From now on, in this context and those that are made of it."""
        _pauses.set((*_pauses.get(), self))

    def end(self) -> None:
        """In all of them."""
        self.decoder = None
        _pauses.set(tuple(pause for pause in _pauses.get() if pause.decoder is not None))


_pauses: ContextVar[tuple[Pause, ...]] = ContextVar("pauses", default=())


def is_paused(decoder: Any) -> bool:
    """Whether this thread or task runs the decoder as if it were not wrapped."""
    return any(pause.decoder is decoder for pause in _pauses.get())
