"""The limits that every reader enforces, and the names of dtypes."""

import json
import math
import reprlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from smark_jax import _foreign
from smark_jax.errors import Unreadable

MAX_BYTES = 384 * 2**20
"""Default limit on a file's size and on the total size of its leaves: about 100 million float32 weights. A file and its
leaves are in memory together, so reading takes less than 1 GB."""

ANY_SIZE = 1 << 62
"""No limit, for a file that only its owner can write to."""

MAX_LEAVES = 100_000
"""The most leaves in a file."""

_MAX_NAME = 1000
_MAX_JSON_VALUES = 2**21  # about 70 bytes each; a leaf's header entry has ten values
_MAX_JSON_UNICODE = (
    8 * 2**20
)  # bytes of non-ASCII JSON: one rare character makes every character of a text take four bytes
_MAX_AXES = 32
_SHOWN = 120
_ADVICE = "Ask for the file again, as safetensors."

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""The dtypes of weights, by their names in safetensors."""

BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
"""The same dtypes, by their names in NumPy."""


class Foreign(NamedTuple):
    """Stands in for a leaf that is not an array of real numbers: what it is, and what to do about it."""

    problem: str
    advice: str


def check_name(name: object) -> str:
    """Checks that a leaf's name is short and printable, since tables and reports will show it."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise Unreadable(
            f"a leaf's name is {shown(name)}, not printable text of 1 to {_MAX_NAME:,} characters", _ADVICE
        )
    return name


def check_names(names: Iterable[str]) -> None:
    """Refuses repeated names, and more names than a network has leaves."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Unreadable(f"the leaf {shown(name)} occurs twice", _ADVICE)
        seen.add(name)
    check_number(len(seen))


def check_number(leaves: int) -> None:
    """Refuses files with no leaves or far too many."""
    if leaves == 0:
        raise Unreadable("it holds no arrays", "Is it a file of weights?")
    if leaves > MAX_LEAVES:
        raise Unreadable(f"it holds more than {MAX_LEAVES:,} leaves", "Leave out everything that is not a weight.")


def check_shape(name: str, shape: Any, dtype: np.dtype, num_bytes: int) -> tuple[int, ...]:
    """Checks that a leaf's shape is valid and takes exactly ``num_bytes``."""
    good = isinstance(shape, list | tuple) and len(shape) <= _MAX_AXES and all(type(n) is int for n in shape)
    if not good or not all(0 <= n < 2**48 for n in shape):
        raise Unreadable(f"leaf {shown(name)} has the shape {shown(shape)}", _ADVICE)
    if math.prod(shape) * dtype.itemsize != num_bytes or math.prod(n or 1 for n in shape) >= 2**48:
        raise Unreadable(
            f"leaf {shown(name)} of shape {shown(shape)}, {dtype.name}, has {num_bytes:,} bytes of data", _ADVICE
        )
    return tuple(shape)


def too_large(problem: str) -> Unreadable:
    """The error for a file beyond the caller's limit; the caller raises it."""
    desk = f"{problem}. Larger files are read by the library alone, where you trust them."
    return Unreadable(problem, "Raise max_bytes if you trust it.", desk=desk)


def json_text(data: bytes) -> str:
    """Decodes JSON after checking that it will take at most about 300 MB of Python objects.

    The number of values is bounded by counting commas and opening brackets. Those inside texts count too, but no honest
    file has two million.
    """
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > _MAX_JSON_VALUES:
        raise Unreadable(f"its JSON has {values:,} commas and brackets, more than {_MAX_JSON_VALUES:,}", _ADVICE)
    if not data.isascii() and len(data) > _MAX_JSON_UNICODE:
        raise Unreadable(f"its JSON of more than {_MAX_JSON_UNICODE:,} bytes is not in ASCII", _ADVICE)
    return data.decode()


def json_object(data: bytes, what: str, advice: str) -> dict[str, Any]:
    """The object that is written as JSON, in which no name occurs twice.

    Raises:
      Unreadable: when it is not JSON, takes too much memory, or is no object; ``what`` is what a refusal calls it.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Unreadable(f"a name in {what} occurs twice", advice)
        return found

    try:
        found = json.loads(json_text(data), object_pairs_hook=distinct)
    except Unreadable:
        raise
    except (ValueError, RecursionError):  # invalid JSON, invalid UTF-8, or a number with too many digits
        raise Unreadable(f"{what} is not JSON", advice) from None
    if not isinstance(found, dict):
        raise Unreadable(f"{what} is not a JSON object", advice)
    return found


def shown(value: object) -> str:
    """A value from a file in a form safe for a message: short, on one line, without control characters."""
    text = repr(value[:_SHOWN]) if isinstance(value, str) else reprlib.repr(value)
    return _foreign.clean(text, _SHOWN)
