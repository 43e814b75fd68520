"""What each thread is doing with wrapped models."""

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .forward import Forward

local = threading.local()  # forward: the one that this thread is in; paused, outer and generating: see model.py


def current_forward() -> "Forward | None":
    """The forward that this thread is in, if its decoder is wrapped and its cache is ours."""
    return getattr(local, "forward", None)
