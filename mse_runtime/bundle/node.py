"""A JSON value with its place in the manifest: typed access that fails with the key's name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NoReturn, TypeVar

from mse_runtime.bundle.schema import ManifestError, UnsafePathError

__all__ = ["Node", "manifest_error"]

Choice = TypeVar("Choice", bound=str)
MAX_ITEMS = 100_000
MAX_DEPTH = 20
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def manifest_error(problem: str, source: object, key: str = "") -> ManifestError:
    return ManifestError(
        f"{source} {problem}. Mend the manifest, or export the bundle again with mse-export.", key
    )


class Node:
    """A value of the manifest under the dotted `key`; `strict` refuses unknown keys below it."""

    def __init__(self, value: Any, key: str, source: str, strict: bool = True) -> None:
        self.value = value
        self.key = key
        self.source = source
        self.strict = strict

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    def fail(self, problem: str) -> NoReturn:
        what = f'"{self.key}"' if self.key else "the manifest"
        raise manifest_error(f"{what} {problem}", f"{self.source}:", self.key)

    def peek(self, name: str) -> Node:
        """The value under `name`, which must be there."""
        if name not in self._mapping():
            child = self._child(name, None)
            child.fail("is missing")
        return self._child(name, self.value[name])

    def object(self, required: str, optional: str = "") -> dict[str, Node]:
        """An object with these keys (blank-separated); optional keys that are null are left out."""
        must, may = required.split(), optional.split()
        found = self._mapping()
        for name in must:
            self.peek(name)
        unknown = [name for name in found if name not in must and name not in may]
        if unknown and self.strict:
            self._child(unknown[0], None).fail(
                f"is not a key of this object (known: {', '.join(must + may)})"
            )
        nodes = {name: self._child(name, found[name]) for name in must}
        for name in may:
            if found.get(name) is not None:
                nodes[name] = self._child(name, found[name])
        return nodes

    def entries(self) -> list[Node]:
        """The values of an object whose keys are free names (letters, digits, - and _)."""
        for name in self._mapping():
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
                self.fail(f"has the name {name!r}; names are letters, digits, - and _")
        return [self._child(name, value) for name, value in self._mapping().items()]

    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            self._wrong("a list")
        if len(self.value) > MAX_ITEMS:
            self.fail(f"has {len(self.value):,} items; at most {MAX_ITEMS:,} are allowed")
        return [
            Node(value, f"{self.key}[{i}]", self.source, self.strict)
            for i, value in enumerate(self.value)
        ]

    def string(self, *, empty: bool = True, printable: bool = True) -> str:
        """Text; `printable` keeps control characters off the terminals that will show it."""
        if not isinstance(self.value, str):
            self._wrong("a string")
        if not self.value and not empty:
            self.fail("should not be empty")
        if "\x00" in self.value or any("\ud800" <= char <= "\udfff" for char in self.value):
            self.fail("contains a character that is not text (NUL or half a surrogate pair)")
        if printable and not self.value.isprintable():
            self.fail("contains control characters")
        return self.value

    def choice(self, *allowed: Choice) -> Choice:
        for option in allowed:
            if self.value == option:
                return option
        return self._wrong(" or ".join(f'"{option}"' for option in allowed))

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            self._wrong("true or false")
        return self.value

    def integer(self, low: int, high: int = 1 << 53) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            self._wrong("a whole number")
        if not low <= self.value <= high:
            self.fail(f"should be from {low} to {high}, but is {_short(self.value)}")
        return self.value

    def number(self, *, above: float | None = None) -> float:
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool):
            self._wrong("a number")
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail("should be a finite number")
        if above is not None and number <= above:
            self.fail(f"should be above {above:g}, but is {number:g}")
        return number

    def numbers(self, count: int) -> tuple[float, ...]:
        items = self.items()
        if len(items) != count:
            self.fail(f"should have {count} numbers, but has {len(items)}")
        return tuple(item.number() for item in items)

    def sha256(self) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", self.string()):
            self.fail("should be a SHA-256: 64 hexadecimal digits in lower case")
        return self.string()

    def relative_file(self, suffix: str) -> str:
        """A path inside the bundle's folder, with forward slashes, ending in `suffix`."""
        text = self.string(empty=False)
        path = PurePosixPath(text)
        if path.is_absolute() or ".." in path.parts or "\\" in text or ":" in text:
            raise UnsafePathError(
                f'{self.source}: "{self.key}" is {text!r}, which leads out of the folder. '
                "Paths are relative, with forward slashes and without '..'. Do not use this bundle "
                "unless you know where it comes from."
            )
        if not path.name.endswith(suffix) or path.name == suffix:
            self.fail(f"should name a {suffix} file, but is {text!r}")
        return text

    def free(self) -> dict[str, Any]:
        """An object that the schema leaves free, as it is."""
        _check_depth(self, self._mapping(), 0)
        return dict(self.value)

    def _mapping(self) -> Mapping[str, Any]:
        if not isinstance(self.value, dict):
            self._wrong("an object")
        return self.value

    def _child(self, name: str, value: Any) -> Node:
        key = f"{self.key}.{name}" if self.key else name
        return Node(value, key, self.source, self.strict)

    def _wrong(self, expected: str) -> NoReturn:
        got = JSON_TYPES.get(type(self.value), type(self.value).__name__)
        if isinstance(self.value, (str, int, float)):
            got = _short(self.value)
        self.fail(f"should be {expected}, but is {got}")


def _check_depth(node: Node, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        node.fail(f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_depth(node, item, depth + 1)


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}..."
