"""Evidence bundles as files: one JSON document with the owner's Ed25519 signature, read without trusting it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from smark_jax import errors, keys
from smark_jax.files import _limits
from smark_jax.vault import _text, crypto

FORMAT, VERSION = "smark evidence", 1
LARGEST = 1 << 24
"""Bytes of the largest bundle that is read."""


def unreadable(what: str, got: str) -> errors.Unreadable:
    """The error for a file that is no bundle or no commitment; the caller raises it."""
    advice = "Ask for the file again: it may have been cut short, or be another one."
    return errors.Unreadable(f"evidence: expected {what}, but got {got}", advice)


# What a field holds: a type; one schema for all items of a list; a tuple of schemas for a list of just these; a number
# for hexadecimal text of so many bytes (0: of any length). `None` beside a type: the field may be null.
_Schema = Any


@dataclasses.dataclass(frozen=True)
class Optional:
    """A field that may be missing: bundles of older versions do without it."""

    schema: _Schema


_HEADER = {
    "alpha": float,
    "base": 32,
    "carrier_key": 32,
    "created": str,
    "customers": int,
    "decoder": str,
    "decoder_version": int,
    "model": str,
    "num_chips": int,
    "number": int,
    "previous": str | None,
    "probes_key": 32,
    "public_key": 32,
    "spec": 32,
    "strength": float,
}
COMMITMENT: _Schema = {
    "format": str,
    "version": int,
    "header": _HEADER,
    "header_path": [32],
    "root": 32,
}
_STAMPS = [{"time": str, "response": 0}]
_LEAF = {"customer": str, "salt": 32, "serial": int, "word": 0}
BUNDLE: _Schema = {
    "format": str,
    "version": int,
    "created": str,
    "smark_version": str,
    "commitment": COMMITMENT,
    "timestamps": _STAMPS,
    "later": Optional([{"commitment": COMMITMENT, "timestamps": _STAMPS}]),
    "carrier_key": 32,
    "spec": [(str, [int], float)],
    "verdict": {"number": int, "created": str, "occasion": int},
    "suspect": {
        "file": str,
        "sha256": 32,
        "content": 32,
        "format": str,
        "layout": [{"base": str, "suspect": str, "change": str}],
        "alignment": str | None,
        "reading": {"align": str | None, "given": dict, "rectify": bool, "readout": Optional(int)},
        "left_out": Optional([{"leaf": str, "weights": int, "reason": str}]),
        "log_maps": Optional(float),
    },
    "num_customers": Optional(int),
    "num_suspects": int,
    "num_alignments": int,
    "opened": [{"leaf": _LEAF, "commitment": Optional(int), "index": int, "path": [32]}],
    "accused": [{"serial": int, "support": [int], "statistic": float, "log10_p": float, "share": float}],
}


def chain(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The bundle's commitments with their time stamps, each one the ``previous`` of the next."""
    first = {name: content[name] for name in ("commitment", "timestamps")}
    return [first, *content.get("later", ())]


def num_customers(content: dict[str, Any]) -> int:
    """How many customers p-values count: those whom the verdict compared, and no fewer than any commitment has."""
    committed = (item["commitment"]["header"]["customers"] for item in chain(content))
    return max(content.get("num_customers", 0), *committed)


def proved_by(content: dict[str, Any], opened: dict[str, Any]) -> int:
    """The number of the commitment that an opened leaf stands under."""
    return opened.get("commitment", content["commitment"]["header"]["number"])


def signed(content: dict[str, Any], master: keys.SecretKey) -> bytes:
    """The file of a bundle."""
    signature = crypto.signing_key(master).sign(_message(content)).hex()
    return json.dumps({"bundle": content, "signature": signature}, indent=1).encode() + b"\n"


def genuine(content: dict[str, Any], signature: str) -> bool:
    """Whether the bundle was signed with the key that its commitment names."""
    key = bytes.fromhex(content["commitment"]["header"]["public_key"])
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(signature), _message(content))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(content: dict[str, Any]) -> bytes:
    return b"smark evidence v1\n" + _text.canonical(content)


def read(path: Path) -> tuple[dict[str, Any], str]:
    """A bundle's content and signature, every field of the kind it should be.

    Raises:
      Unreadable: when the file is no bundle.
    """
    document = read_json(path, {"bundle": BUNDLE, "signature": 64}, "an evidence bundle")
    content = document["bundle"]
    if (content["format"], content["version"]) != (FORMAT, VERSION):
        got = f"{content['format'][:40]!r} of version {content['version']}"
        raise unreadable(f"{FORMAT!r} of version {VERSION}", got)
    return content, document["signature"]


def read_json(path: Path, schema: _Schema, what: str) -> Any:
    """A JSON file whose every field is of the kind that the schema names.

    Raises:
      Unreadable: when it is larger than :data:`LARGEST`, no JSON, or has a field that is missing, unknown or wrong.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise unreadable(f"{what} of at most {LARGEST:,} bytes", "a larger file")
    try:
        document = json.loads(_limits.json_text(data), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        got = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:100]
        raise unreadable(f"{what} in {str(path)!r}", f"no JSON ({got})") from None
    wrong = _wrong(document, schema, "")
    if wrong is not None:
        raise unreadable(f"{what} in {str(path)!r}", f"a file in which field {wrong[:100]!r} is missing or invalid")
    return document


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")  # to the parser that calls it, as its own error


def _wrong(value: Any, schema: _Schema, name: str) -> str | None:
    """The name of the first field that is not as the schema says; None when all are."""
    if isinstance(schema, Optional):
        return _wrong(value, schema.schema, name)
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return name or "content"
        needed = {key for key, kind in schema.items() if not isinstance(kind, Optional)}
        different = (needed - value.keys()) | (value.keys() - schema.keys())
        if different:
            return ".".join(filter(None, (name, min(map(str, different)))))
        return next(filter(None, (_wrong(value[key], schema[key], f"{name}.{key}"[not name :]) for key in value)), None)
    if isinstance(schema, list | tuple):
        if not isinstance(value, list) or (isinstance(schema, tuple) and len(value) != len(schema)):
            return name
        kinds = schema if isinstance(schema, tuple) else schema * len(value)
        return next(filter(None, map(_wrong, value, kinds, [name] * len(value))), None)
    return None if _fits(value, schema) else name


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    if isinstance(kind, int):
        hexadecimal = isinstance(value, str) and set(value) <= set("0123456789abcdef") and len(value) % 2 == 0
        return hexadecimal and kind in (0, len(value) // 2)
    return isinstance(value, kind)
