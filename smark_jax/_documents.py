"""Our own documents: JSON in a file, a NamedTuple in the program, one text for each value and one format of times.

:func:`parse` is strict, since some documents come from strangers: every field must be present and of the right type,
and no other field is allowed. Parsing a document and writing it again gives the same bytes: a field whose default is
:data:`MISSING` may be absent, and is then not written either.
"""

import datetime
import functools
import json
import math
import types
import typing
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")

Hex = Annotated[str, 0]
"""Bytes in hexadecimal."""
Hash = Annotated[str, 32]
"""32 bytes in hexadecimal."""
Signature = Annotated[str, 64]
"""64 bytes in hexadecimal."""


class Missing:
    """The type of :data:`MISSING`."""

    def __bool__(self) -> Literal[False]:
        return False

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()
"""The value of an absent field: an older version wrote the document, or there is nothing to state."""


class Wrong(Exception):
    """An error in one field of a document; the message gives the field's name and what is wrong with it."""

    def __init__(self, name: str, what: str = "is missing or invalid") -> None:
        super().__init__(f"field {name[:100]!r} {what}")


def parse(kind: type[T], value: Any) -> T:
    """Parses a JSON value as a document of this kind.

    Whole numbers must lie from 0 to 2^63 - 1, and real numbers must be finite.

    Raises:
      Wrong: naming the first field that is missing, unknown or of another type.
    """
    return _parse(kind, value, "")


def plain(document: Any) -> Any:
    """The document as a JSON value, the inverse of :func:`parse`. Lists are left as they are."""
    if isinstance(document, tuple):
        names = getattr(document, "_fields", None)
        if names is None:
            return [plain(item) for item in document]
        items = zip(names, document, strict=True)
        return {name.rstrip("_"): plain(item) for name, item in items if item is not MISSING}
    if isinstance(document, dict):
        return {name: plain(item) for name, item in document.items()}
    return document


def canonical(document: Any) -> bytes:
    """The canonical JSON text of a document, for hashing and signing: in ASCII, with sorted keys, no spaces, no NaN."""
    return json.dumps(plain(document), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def text(document: Any) -> str:
    """The canonical text as a string, which is what the vault stores."""
    return canonical(document).decode()


def pretty(document: Any) -> bytes:
    """The text of a file that people may read: one field per line, in the document's order."""
    return json.dumps(plain(document), indent=2).encode() + b"\n"


def now() -> str:
    """The time in UTC, to the second: ``2026-11-25T18:00:00Z``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The fields of a document by their JSON names, and the names of required fields."""
    hints = typing.get_type_hints(kind, include_extras=True)
    needed = frozenset(name.rstrip("_") for name in kind._fields if kind._field_defaults.get(name) is not MISSING)
    return {name.rstrip("_"): hints[name] for name in kind._fields}, needed


def _parse(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (kind,) = (one for one in arguments if one not in (Missing, types.NoneType))
        return _parse(kind, value, name)
    if origin is tuple:
        endless = arguments[-1] is Ellipsis
        if not isinstance(value, list) or not (endless or len(value) == len(arguments)):
            raise Wrong(name)
        kinds = arguments[:1] * len(value) if endless else arguments
        return tuple(_parse(one, item, name) for one, item in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise Wrong(name)
        return {key: _parse(arguments[1], item, name) for key, item in value.items()}
    if hasattr(kind, "_fields"):
        return _parse_fields(kind, value, name)
    if not _fits(value, kind):
        raise Wrong(name)
    return value


def _parse_fields(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise Wrong(name or "content")
    fields, needed = _fields(kind)
    full = {key: f"{name}.{key}".removeprefix(".") for key in (*value, *needed)}
    if lacks := needed - value.keys():
        raise Wrong(full[min(lacks)])
    if unknown := value.keys() - fields.keys():
        raise Wrong(full[min(unknown)], "is unknown to this version of smark-jax")
    found = {key: _parse(fields[key], item, full[key]) for key, item in value.items()}
    return kind(**{field: found[key] for field in kind._fields if (key := field.rstrip("_")) in found})


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    if typing.get_origin(kind) is Annotated:
        (_, size) = typing.get_args(kind)
        hexadecimal = isinstance(value, str) and set(value) <= set("0123456789abcdef") and len(value) % 2 == 0
        return hexadecimal and size in (0, len(value) // 2)
    return isinstance(value, kind)
