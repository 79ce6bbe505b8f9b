"""`dataclass` for modules that every command imports: a start makes forty such classes.

The standard library compiles six methods for each; here all but `__init__` are the same. Fields,
`replace`, `is_dataclass` and type checkers know these classes as dataclasses.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls=None, /, *, frozen=False):
        """`dataclasses.dataclass` with these arguments.

        Frozen ones must have neither `__slots__` nor fields that `__init__` does not set
        (TypeError).
        """
        if cls is None:
            return lambda cls: dataclass(cls, frozen=frozen)
        made = dataclasses.dataclass(cls, repr=False, eq=False)
        if frozen and not all(f.init for f in dataclasses.fields(made)):
            raise TypeError(f"{cls.__qualname__} is frozen, and a field is not set by __init__")
        shared = {"__repr__": _repr, "__eq__": _eq, "__hash__": _hash if frozen else None}
        if frozen:
            shared |= {"__setattr__": _setattr, "__delattr__": _delattr}
        for name, method in shared.items():
            if cls.__dict__.get(name) is None:  # __hash__ is where there is an __eq__
                setattr(made, name, method)
        return made


def _repr(self: Any) -> str:
    pairs = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if f.repr]
    return f"{type(self).__qualname__}({', '.join(pairs)})"


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.compare)


def _eq(self: Any, other: object) -> Any:
    return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _setattr(self: Any, name: str, value: Any) -> None:
    """Each field once, which `__init__` does."""
    if name in self.__dict__ or name not in self.__dataclass_fields__:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
    self.__dict__[name] = value


def _delattr(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
