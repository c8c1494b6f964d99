"""Encodes protocol objects as bytes for Flower's records: JSON whose objects name our own types, never pickle."""

import base64
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from smark_jax import _validate, keys
from smark_jax.aggregation.protocol import messages, parameters, party, policy
from smark_jax.federation import task

RECORD = "smark"
"""Name of the ConfigRecord that carries protocol objects in a Flower message."""
_NAMES = {np.floating: "floats", np.uint32: "uint32"}
WORDS = "smark.words"
"""Name of the ArrayRecord that carries masked words."""

_TYPES = {
    kind.__name__: kind
    for kind in (
        parameters.Setup,
        party.Party,
        policy.Policy,
        task.Format,
        messages.Challenge,
        messages.Introduction,
        messages.Keys,
        messages.Shares,
        messages.Masked,
        messages.Confirm,
        messages.Reveal,
        messages.ShareRequest,
        messages.MaskRequest,
        messages.ConfirmRequest,
        messages.UnmaskRequest,
    )
}


class Items(NamedTuple):
    """The protocol objects of a message, each absent where it is None.

    Attributes:
      hello: asks a participant for its identity.
      setup: asks a participant for its keys.
      requests: of later stages, each with its round's number.
      format: of the update that is asked for.
      identity: a participant's answer to ``hello``.
      keys: a participant's answer to ``setup``.
      shares: a participant's answer to a ShareRequest.
      masked: a participant's answer to a MaskRequest.
      confirm: a participant's answer to a ConfirmRequest.
      reveal: a participant's answer to an UnmaskRequest.
    """

    hello: messages.Challenge | None = None
    setup: parameters.Setup | None = None
    requests: tuple[tuple[int, messages.Request], ...] | None = None
    format: task.Format | None = None
    identity: messages.Introduction | None = None
    keys: messages.Keys | None = None
    shares: messages.Shares | None = None
    masked: messages.Masked | None = None
    confirm: messages.Confirm | None = None
    reveal: messages.Reveal | None = None

    @property
    def answers(self) -> tuple[messages.Message, ...]:
        """A participant's messages to the round's server."""
        found = (self.keys, self.shares, self.masked, self.confirm, self.reveal)
        return tuple(item for item in found if item is not None)


@functools.cache
def _kinds() -> dict[str, object]:
    """The type of each item where it is present."""
    return {name: typing.get_args(kind)[0] for name, kind in typing.get_type_hints(Items).items()}


def dump(value: Any) -> bytes:
    """Encodes protocol objects, and tuples, dicts, bytes, texts and numbers, as bytes."""
    return json.dumps(_plain(value), separators=(",", ":")).encode()


def load(data: bytes, kind: Any = Any) -> Any:
    """Decodes what :func:`dump` wrote.

    Args:
      data: the bytes; they may come from anybody.
      kind: the required type of the result. The fields of protocol objects are always checked against their types.

    Raises:
      SmarkError: when the bytes are anything else.
    """
    try:
        value = _object(json.loads(data))
        if not _conforms(value, kind):
            raise TypeError(f"no {getattr(kind, '__name__', kind)}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        cause = "Do server and clients run the same version of smark_jax?"
        raise _validate.fail("federation", "a protocol object", f"other bytes ({error})", cause) from None
    return value


def _conforms(value: Any, kind: Any) -> bool:
    """Whether a value matches a type annotation down to its last element; a bool is not an int."""
    if kind is Any:
        return True
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_conforms(value, one) for one in inner)
    if origin is tuple:
        if inner[-1:] == (Ellipsis,):
            return type(value) is tuple and all(_conforms(item, inner[0]) for item in value)
        return type(value) is tuple and len(value) == len(inner) and all(map(_conforms, value, inner))
    if origin is Mapping:
        return type(value) is dict and all(_conforms(k, inner[0]) and _conforms(v, inner[1]) for k, v in value.items())
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**53)
    return type(value) is kind


@functools.cache
def _fields(name: str) -> tuple[Any, ...]:
    """The types of a protocol object's fields; NoneType for the words, which travel separately as an array."""
    hints = typing.get_type_hints(_TYPES[name])
    return tuple(type(None) if field == "words" else hints[field] for field in _TYPES[name]._fields)


def _plain(value: Any) -> Any:
    if isinstance(value, keys.SecretKey):
        return {"key": base64.b64encode(value.to_bytes()).decode()}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, tuple) and type(value).__name__ in _TYPES:
        return {"type": type(value).__name__, "fields": [_plain(field) for field in value]}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, np.ndarray):
        return None  # words travel separately, as an array
    return value


def _object(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_object(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "type" in value:
        fields = _object(value["fields"])
        if not _conforms(fields, tuple[_fields(value["type"])]):
            raise TypeError(f"fields of {value['type']}")
        return _TYPES[value["type"]](*fields)
    if "dict" in value:
        return {_object(k): _object(v) for k, v in value["dict"]}
    if "key" in value:
        return keys.from_bytes(base64.b64decode(value["key"], validate=True))
    return base64.b64decode(value["bytes"], validate=True)


def put(content: RecordDict, items: Items) -> RecordDict:
    """Adds protocol objects to a message's content; the words of ``masked`` become a separate array."""
    present = {name: item for name, item in items._asdict().items() if item is not None}
    content[RECORD] = ConfigRecord({name: dump(item) for name, item in present.items()})
    if items.masked:
        content[WORDS] = ArrayRecord({"words": Array(items.masked.words)})
    return content


def take(content: RecordDict) -> Items:
    """The protocol objects of a message's content.

    Raises:
      SmarkError: when the content holds something else in their place.
    """
    if RECORD not in content:
        return Items()
    found, kinds = content[RECORD], _kinds()
    if not isinstance(found, ConfigRecord) or not set(found) <= set(kinds):
        got = f"{sorted(found)}"
        cause = "Do server and clients run the same version of smark_jax?"
        raise _validate.fail("federation", f"items of {sorted(kinds)}", got, cause)
    items = Items(**{name: load(data if isinstance(data, bytes) else b"", kinds[name]) for name, data in found.items()})
    if items.masked is None:
        return items
    words = tree(content[WORDS] if WORDS in content else None, np.uint32).get("words")
    return items._replace(masked=items.masked._replace(words=np.zeros(0, np.uint32) if words is None else words))


def tree(arrays: object, kind: Any = np.floating) -> dict[str, np.ndarray]:
    """The arrays of an ArrayRecord by name, sorted by name.

    Raises:
      SmarkError: when it is not an ArrayRecord, or one of its arrays is of another dtype, which cannot be encoded.
    """
    if not isinstance(arrays, ArrayRecord):
        raise _validate.fail("federation", "an ArrayRecord", type(arrays).__name__, "Was a record lost on the way?")
    try:
        found = {name: arrays[name].numpy() for name in sorted(arrays)}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise TypeError("an archive")  # np.load opens archives, too
    except Exception as error:  # on a stranger's bytes NumPy raises anything from BadZipFile to MemoryError
        raise _validate.fail("federation", "arrays of NumPy", f"others ({error})", "Were they damaged?") from None
    for name, array in found.items():
        if not np.issubdtype(array.dtype, kind):
            cause = "Keep counters and other integers out of the ArrayRecord that is aggregated."
            raise _validate.fail("federation", f"arrays of {_NAMES[kind]}", f"{array.dtype} in {name!r}", cause)
    return found


def record(arrays: Mapping[str, Any], like: ArrayRecord) -> ArrayRecord:
    """Makes a record of arrays, in the order and with the dtypes of the record ``like``."""
    return ArrayRecord({name: Array(np.asarray(arrays[name], like[name].dtype)) for name in like})
