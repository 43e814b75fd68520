"""Stand-ins for the two names under which a modeling file looks up its attention functions, and for the function that
turns queries.

They are there for as long as a model of that file is wrapped, counted, and taken out again even if the model is freed
without a word.
"""

import collections
import threading
from collections.abc import Callable

from .parts import registries_of

ROTARY = "apply_rotary_pos_emb"
lock = threading.Lock()  # held by who puts, takes or clears
_replaced: dict[int, list] = {}  # id of a globals dict -> [globals, count, originals]
_abandoned: "collections.deque[list[dict]]" = (
    collections.deque()
)  # globals of models that were freed while they were wrapped


class _StandIn:
    """In place of a modeling file's ALL_ATTENTION_FUNCTIONS: the same lookups, with our function around what they
    find."""

    def __init__(self, real, around: Callable):
        self._real, self._around = real, around

    def get_interface(self, implementation, default):
        return self._around(self._real.get_interface(implementation, default), implementation)

    def __getitem__(self, implementation):
        return self._around(self._real[implementation], implementation)

    def __contains__(self, implementation):
        return implementation in self._real

    def __iter__(self):
        return iter(self._real)

    def __len__(self):
        return len(self._real)

    def __setitem__(self, implementation, function):
        self._real[implementation] = function

    def __getattr__(self, name):
        return getattr(self._real, name)


def globals_of(modules) -> list[dict]:
    """The globals of the modeling files of these modules, each once."""
    namespaces = (namespace for module in modules for namespace in registries_of(module))
    return list({id(namespace): namespace for namespace in namespaces}.values())


def put(namespaces: list[dict], around: Callable, noting: Callable) -> None:
    """Put stand-ins in; ``around(function, implementation)`` is called with what each lookup finds, and
    ``noting(function)`` with the function that turns queries.

    They are counted once they are there, and put again where an interrupt came between: what it leaves is a stand-in
    more, which lets all calls through, and never a count without one.
    """
    for namespace in namespaces:
        entry = _replaced.setdefault(id(namespace), [namespace, 0, {}])
        if entry[1] == 0:
            _replace(namespace, entry[2], around, noting)
        entry[1] += 1


def _replace(namespace: dict, originals: dict, around: Callable, noting: Callable) -> None:
    if ROTARY in namespace:
        namespace[ROTARY] = noting(originals.setdefault(ROTARY, namespace[ROTARY]))
    real = originals.setdefault("ALL_ATTENTION_FUNCTIONS", namespace["ALL_ATTENTION_FUNCTIONS"])
    namespace["ALL_ATTENTION_FUNCTIONS"] = _StandIn(real, around)
    if not hasattr(real, "get_interface") and "eager_attention_forward" in namespace:
        # before transformers 5.0 eager is a plain global, not looked up in the registry
        eager = originals.setdefault("eager_attention_forward", namespace["eager_attention_forward"])
        namespace["eager_attention_forward"] = lambda *args, **kwargs: around(eager, "eager")(*args, **kwargs)


def take(namespaces: list[dict]) -> None:
    """Undo one :func:`put`; the last one restores the originals."""
    for namespace in namespaces:
        entry = _replaced[id(namespace)]
        entry[1] -= 1
        if entry[1] == 0:
            namespace.update(entry[2])
            del _replaced[id(namespace)]


def abandon(namespaces: list[dict]) -> None:
    """A wrapped model was freed. This may run inside any other code, so it only takes the lock if that is free.

    By ``with``: an interrupt may strike between an ``acquire`` and the next line, and nobody would ever release it.
    """
    _abandoned.append(namespaces)
    if not lock.locked():  # by this thread; one that takes it now gives it back soon
        with lock:
            clear_abandoned()


def clear_abandoned() -> None:
    """Take out what freed models have left."""
    while _abandoned:
        take(_abandoned.popleft())
