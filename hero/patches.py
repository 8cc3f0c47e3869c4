"""Attributes put on instances and taken off again.

What an attribute hides is restored exactly. A pickled copy of the owner (``torch.save``, a spawned worker) is
a stock one, a deep copy is attached like its original.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

__all__ = ["patch", "put", "restore"]

_HIDDEN = "_hero_hidden"  # {name: (what was put, whether the instance had an attribute, that attribute)}
_OWN = (_HIDDEN, "__getstate__", "__deepcopy__")


def put(owner: object, name: str, value: object) -> None:
    """Set an attribute of an instance, until :func:`restore`."""
    if _HIDDEN not in owner.__dict__:
        owner.__dict__[_HIDDEN] = {}
        owner.__dict__["__getstate__"] = types.MethodType(_stock_state, owner)
        owner.__dict__["__deepcopy__"] = types.MethodType(_deepcopy, owner)
    hidden = owner.__dict__[_HIDDEN]
    _, was_there, previous = hidden.get(name, (None, name in owner.__dict__, owner.__dict__.get(name)))
    hidden[name] = value, was_there, previous
    owner.__dict__[name] = value


def patch(owner: object, name: str, function: Callable) -> None:
    """Put a method on an instance, with the signature of the one that it hides.

    Args:
        function: takes the instance, the hidden bound method and the arguments of the call.
    """
    hidden = getattr(type(owner), name)
    was_there = name in owner.__dict__

    @functools.wraps(hidden)  # generate reads the names of the parameters
    def method(self, *args, **kwargs):
        original = functools.partial(hidden, self)  # torch.compile traces this, not a bound method
        if was_there:  # read anew, for deep copies have their own
            original = self.__dict__[_HIDDEN][name][2]
        if "_hero" not in self.__dict__:  # removed, but a wrapper that was put on later still calls this
            return original(*args, **kwargs)
        return function(self, original, *args, **kwargs)

    put(owner, name, types.MethodType(method, owner))


def restore(owner: object) -> None:
    """Take off what was put on an instance. A second call does nothing.

    An attribute that was replaced since, as by a wrapper around a patched method, stays as it is; the patched
    method then only calls what it hides.
    """
    hidden = owner.__dict__.get(_HIDDEN, {})
    for name, (ours, was_there, previous) in list(hidden.items()):
        if owner.__dict__.get(name) is not ours:
            continue
        if was_there:
            owner.__dict__[name] = previous
        else:
            del owner.__dict__[name]
        del hidden[name]
    if not hidden:
        for name in _OWN:
            owner.__dict__.pop(name, None)


def _stock_state(self) -> object:
    """What is pickled: the state without anything that was put on the instance."""
    own = getattr(type(self), "__getstate__", None)
    if own is None or own is getattr(object, "__getstate__", None):  # Python 3.10 has none
        state: object = dict(self.__dict__)
    else:
        state = own(self)
    if isinstance(state, dict):
        for name, (_, was_there, previous) in self.__dict__[_HIDDEN].items():
            state.pop(name, None)
            if was_there:
                state[name] = previous
        for name in _OWN:
            state.pop(name, None)
    return state


def _deepcopy(self, memo: dict) -> object:
    """An attached copy. Wrappers that forward attributes, such as PEFT's, find this method too."""
    copied_now = sys._getframe(1).f_locals.get("x", self)  # the argument of copy.deepcopy
    if copied_now is not self:  # a wrapper, copied as it would be without this method
        as_usual: Any = copy
        return as_usual._reconstruct(copied_now, memo, *copied_now.__reduce_ex__(4))
    copied = memo[id(self)] = object.__new__(type(self))
    copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return copied
