"""Stand-ins for the two names under which a modeling file looks up its attention functions, and for the function that
turns queries.

They are there for as long as a model of that file is wrapped, counted, and taken out again even if the model is freed
without a word.
"""

import collections
import os
import threading
from collections.abc import Callable
from typing import Any

from .parts import registries_of

ROTARY = "apply_rotary_pos_emb"
lock = threading.RLock()  # held by who puts, takes or clears
_at_it = threading.Lock()  # inside of that one, never twice: any thread may ask whether somebody is
_replaced: dict[int, list] = {}  # id of a globals dict -> [globals, count, originals]
_due: "collections.deque[tuple[Callable, tuple]]" = collections.deque()  # what is to be called under the lock

# A child that is forked has the lock as it was: it may not be another thread's, which the child does not have.
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


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


def is_held() -> bool:
    """Whether this thread holds the lock: so a signal's handler, or a finalizer, may come upon it."""
    return bool(lock._is_owned())  # type: ignore[attr-defined] # by which threading.Condition asks the same


def alone(function: Callable, *args: Any) -> Any:
    """Call it under the lock.

    Raises
    ------
    RuntimeError
        If this thread holds that already.
    """
    if is_held():
        raise RuntimeError(
            "a signal's handler or a finalizer came while its thread put a wrap on or took one off, and is to put on "
            "another; expected that outside of it"
        )
    try:
        with lock, _at_it:  # an interrupt may strike between an acquire and the next line, and nobody would release it
            return function(*args)
    finally:
        settle()


def soon(function: Callable, *args: Any) -> None:
    """Call it under the lock: at once, or, where this thread holds that already, when it gives it back."""
    if is_held():
        _due.append((function, args))
    else:
        alone(function, *args)


def abandon(namespaces: list[dict]) -> None:
    """A wrapped model was freed. This may run inside any other code, so it waits for no other thread."""
    _due.append((take, (namespaces,)))
    if not _at_it.locked():  # who takes it now gives it back soon
        settle()


def settle() -> None:
    """Do what is due, unless this thread holds the lock: who gives it back does, and who comes next."""
    while _due and not is_held():
        with lock, _at_it:
            while _due:
                function, args = _due.popleft()
                function(*args)
