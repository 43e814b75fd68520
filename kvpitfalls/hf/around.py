"""A function around one method of one object, which no copy of the object inherits and which leaves no trace when it is
taken away."""

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch


def _same(value):
    return value


def take_away_all(model: torch.nn.Module, but: Sequence["Around"] = ()) -> None:
    """Take away what stands on a model's modules and nobody knows any more: an interrupt may have come before it was
    noted. ``but``: those that are known."""
    known = {id(around) for around in but}
    for around in [x for module in model.modules() for x in vars(module).values() if isinstance(x, Around)]:
        if id(around) not in known:
            around.take_away()


class Around:
    """Stands in an object's dictionary in place of a method; ``function(owner, method, args, kwargs)`` is called with
    the method itself.

    It refers to its owner weakly, so a dropped model is freed; a deepcopy or a pickle of the owner has the method, not
    this.

    Parameters
    ----------
    owner : torch.nn.Module
    name : str
        Of the method.
    function : callable
        Of a module's top level, since it outlives what it is called for.
    """

    def __init__(self, owner: torch.nn.Module, name: str, function: Callable):
        self._owner, self._name, self._function = weakref.ref(owner), name, function
        self._is_put = True
        self._before = vars(owner).get(name)  # the object's own, such as accelerate puts there
        method = getattr(owner, name)
        twin: Any = self
        functools.update_wrapper(twin, method, updated=())
        del twin.__wrapped__  # bound to the owner, which would then refer to itself
        self.__signature__ = inspect.signature(method)
        vars(owner)[name] = self

    @torch.compiler.disable  # run by Python, also where a caller was compiled since
    def __call__(self, *args, **kwargs):
        owner = self._owner()
        method = self._method(owner)
        return self._function(owner, method, args, kwargs) if self._is_put else method(*args, **kwargs)

    @property
    def is_before_another(self) -> bool:
        """Whether the object had such a function of its own."""
        return self._before is not None

    def stands_before(self, owner: torch.nn.Module) -> bool:
        """Whether it is in this object's dictionary."""
        return vars(owner).get(self._name) is self

    def _method(self, owner) -> Callable:
        return getattr(type(owner), self._name).__get__(owner) if self._before is None else self._before

    def take_away(self) -> None:
        """Put back what was there; if it was wrapped meanwhile, it stays inside and lets all calls through."""
        self._is_put, owner = False, self._owner()
        if owner is None or not self.stands_before(owner):
            return
        if self._before is None:
            del vars(owner)[self._name]
        else:
            vars(owner)[self._name] = self._before

    def __deepcopy__(self, memo: dict):
        twin = memo.get(id(self._owner()))
        if twin is None:  # this alone is copied, not its owner
            return self
        return (
            copy.deepcopy(self._before, memo)
            if self._before is not None
            else getattr(type(twin), self._name).__get__(twin)
        )

    def __reduce__(self):
        return (_same, (self._before,)) if self._before is not None else (getattr, (self._owner(), self._name))
