"""Protocol objects as bytes for Flower's records: JSON whose objects name one of our own types, never pickle."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from smark_jax import _validate, keys
from smark_jax.aggregation.protocol import messages, parameters, party

RECORD = "smark"
"""Name of the ConfigRecord that carries protocol objects in a Flower message."""
WORDS = "smark.words"
"""Name of the ArrayRecord that carries masked words."""

_TYPES = {
    kind.__name__: kind
    for kind in (
        parameters.Setup,
        party.Party,
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


def dump(value: Any) -> bytes:
    """Protocol objects, and tuples, dicts, bytes, texts and numbers of them, as bytes."""
    return json.dumps(_plain(value), separators=(",", ":")).encode()


def load(data: bytes) -> Any:
    """What :func:`dump` wrote.

    Raises:
      ValueError: when the bytes are anything else.
    """
    try:
        return _object(json.loads(data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        cause = "Do server and clients run the same version of smark_jax?"
        raise _validate.fail("federation", "a protocol object", f"other bytes ({error})", cause) from None


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
        return None  # words travel beside, as an array
    return value


def _object(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_object(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "type" in value:
        return _TYPES[value["type"]](*(_object(field) for field in value["fields"]))
    if "dict" in value:
        return {_object(k): _object(v) for k, v in value["dict"]}
    if "key" in value:
        return keys.from_bytes(base64.b64decode(value["key"], validate=True))
    return base64.b64decode(value["bytes"], validate=True)


def put(content: RecordDict, **items: Any) -> RecordDict:
    """Adds protocol objects to a message's content by name; the words of a Masked become an array of their own."""
    content[RECORD] = ConfigRecord({name: dump(item) for name, item in items.items() if item is not None})
    for item in items.values():
        if isinstance(item, messages.Masked):
            content[WORDS] = ArrayRecord({"words": Array(item.words)})
    return content


def take(content: RecordDict) -> dict[str, Any]:
    """The protocol objects of a message's content by name; empty when it holds none."""
    if RECORD not in content.config_records:
        return {}
    items = {name: load(data) for name, data in content.config_records[RECORD].items() if isinstance(data, bytes)}
    for name, item in items.items():
        if isinstance(item, messages.Masked):
            words = content.array_records[WORDS]["words"].numpy()
            items[name] = item._replace(words=np.asarray(words))
    return items


def tree(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    """The arrays by name, in order of name.

    Raises:
      ValueError: when one is not of floats: fixed point has no place for it.
    """
    found = {name: arrays[name].numpy() for name in sorted(arrays)}
    for name, array in found.items():
        if not np.issubdtype(array.dtype, np.floating):
            cause = "Keep counters and other integers out of the ArrayRecord that is aggregated."
            raise _validate.fail("federation", "arrays of floats", f"{array.dtype} in {name!r}", cause)
    return found


def record(arrays: Mapping[str, Any], like: ArrayRecord) -> ArrayRecord:
    """Arrays by name as a record in the order and with the dtypes of another."""
    return ArrayRecord({name: Array(np.asarray(arrays[name], like[name].dtype)) for name in like})
