"""Our `dataclass` against the standard library's."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import field
from typing import Any

import pytest

from mse_runtime import records


def made(decorator: Any, frozen: bool) -> Any:
    @decorator(frozen=frozen)
    class Point:
        """A point."""

        x: int
        label: str = "a"
        near: list[int] = field(default_factory=list, repr=False)
        seen: int = field(default=0, compare=False)

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("negative")

        @property
        def double(self) -> int:
            return 2 * self.x

    return Point


@pytest.mark.parametrize("frozen", [True, False])
def test_it_behaves_as_the_standard_one(frozen: bool) -> None:
    ours, theirs = made(records.dataclass, frozen), made(dataclasses.dataclass, frozen)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__match_args__ == theirs.__match_args__
    a, b, c = (
        [kind(1), kind(1, seen=5), kind(2, label="b", near=[3])] for kind in (ours, theirs, ours)
    )
    for one, other in zip(a, b, strict=True):
        assert repr(one) == repr(other)
        assert dataclasses.asdict(one) == dataclasses.asdict(other)
        assert one != other
    assert a == c
    assert a[0] == a[1]
    assert a[0] != a[2]
    assert a[0] != 1
    changed = dataclasses.replace(a[2], x=7)
    assert (changed.x, changed.label, changed.double) == (7, "b", 14)
    assert copy.copy(a[2]) == a[2] == copy.deepcopy(a[2])
    with pytest.raises(ValueError, match="negative"):
        ours(-1)
    with pytest.raises(TypeError):
        ours()
    if frozen:
        for change in (
            lambda: setattr(a[0], "x", 3),
            lambda: setattr(a[0], "other", 3),
            lambda: delattr(a[0], "x"),
        ):
            with pytest.raises(dataclasses.FrozenInstanceError):
                change()
        assert a[0].x == 1
        with pytest.raises(TypeError):
            hash(a[0])  # a list is in it, as with theirs
    else:
        a[0].x = 3
        assert a[0].x == 3
        assert ours.__hash__ is None


@records.dataclass(frozen=True)
class Kept:
    """At the top of a module, so that it can be pickled."""

    x: int
    y: tuple[int, ...] = ()


@records.dataclass(frozen=True)
class Equal:
    """As with theirs, it can be hashed though it has its own way to compare."""

    x: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)


@records.dataclass(frozen=True)
class Own:
    """Its own methods stay."""

    x: int

    def __repr__(self) -> str:
        return "own"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 5


def test_pickles_hashes_and_methods_of_its_own() -> None:
    assert pickle.loads(pickle.dumps(Kept(1, (2,)))) == Kept(1, (2,))
    assert hash(Kept(1)) == hash(Kept(1)) != hash(Kept(2))
    assert {Kept(1), Kept(1)} == {Kept(1)}
    assert (Equal(1) == Equal(2), hash(Equal(1)) == hash(Equal(1))) == (True, True)
    with pytest.raises(TypeError, match="not set by __init__"):

        @records.dataclass(frozen=True)
        class Late:
            x: int = field(init=False)

    assert (repr(Own(1)), hash(Own(1)), Own(1) == 3) == ("own", 5, True)
