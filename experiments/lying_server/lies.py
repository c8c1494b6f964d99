"""Lies: alterations of any field of any message."""

import contextlib
import copy
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from smark_jax import keys
from smark_jax.federation import wire

_NUMBERS = (0, 1, -1, 2, 3, 4, 2**31, 2**32, 2**64, 10**50, 0.5, float("nan"), float("inf"), 1e30, 1e-30, True, None)


def alter(rng: np.random.Generator, value: Any) -> Any:
    """The same kind of thing with something wrong in it, or something else altogether."""
    if rng.random() < 0.05:
        return [None, 7, b"", "text", (), {}][rng.integers(6)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return [*_NUMBERS, value + 1, -value][rng.integers(len(_NUMBERS) + 2)]
    if isinstance(value, bytes):
        return _bytes(rng, value)
    if isinstance(value, str):
        return ["", value + "x", "victim", "arrays", "a" * 1000][rng.integers(5)]
    if isinstance(value, dict):
        return _dict(rng, value)
    if hasattr(value, "_fields"):
        name = value._fields[rng.integers(len(value._fields))]
        return value._replace(**{name: alter(rng, getattr(value, name))})
    return _tuple(rng, tuple(value)) if isinstance(value, tuple | list) else value


def _bytes(rng: np.random.Generator, value: bytes) -> bytes:
    flipped = bytes([value[0] ^ 1]) + value[1:] if value else b"\0"
    return [flipped, value[:-1], value + value, b"", keys.new().to_bytes()][rng.integers(5)]


def _tuple(rng: np.random.Generator, value: tuple) -> tuple:
    if not value:
        return (1,)
    place = rng.integers(len(value))
    rest = value[:place] + value[place + 1 :]
    return [rest, (*value, value[place]), rest[:1], (*rest, alter(rng, value[place])), value[::-1]][rng.integers(5)]


def _dict(rng: np.random.Generator, value: dict) -> dict:
    if not value:
        return {1: b"x"}
    names = list(value)
    one, other = names[rng.integers(len(names))], names[rng.integers(len(names))]
    rest = {name: item for name, item in value.items() if name != one}
    swapped = {**value, one: value[other], other: value[one]}
    return [rest, swapped, {**rest, 9: value[one]}, {**rest, one: alter(rng, value[one])}, {}][rng.integers(5)]


def alter_content(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """A message's records with a lie in the protocol's or in any other one; some are of Flower's types only."""
    lied = copy.deepcopy(content)
    names = list(lied)
    name = names[rng.integers(len(names))]
    record = lied[name]
    choice = rng.integers(6)
    if choice == 0:
        del lied[name]
    elif choice == 1:  # a decoy in front
        lied = RecordDict({"decoy": copy.deepcopy(record), **dict(lied.items())})
    elif choice == 2:
        del lied[name]
        lied[f"{name}2"] = record
    elif isinstance(record, ArrayRecord):
        lied[name] = _arrays(rng, record)
    elif isinstance(record, ConfigRecord) and len(record):
        _config(rng, record, name)
    return lied


def _config(rng: np.random.Generator, record: ConfigRecord, name: str) -> None:
    keys_ = list(record)
    key = keys_[rng.integers(len(keys_))]
    value = record[key]
    if rng.random() < 0.15:
        del record[key]
    elif name == wire.RECORD and isinstance(value, bytes):
        data = _bytes(rng, value)
        with contextlib.suppress(ValueError):  # in case it was altered before
            data = wire.dump(alter(rng, wire.load(value))) if rng.random() < 0.7 else data
        record[key] = [data, value[: len(value) // 2], b"[" * 5000, 5][rng.choice(4, p=[0.85, 0.05, 0.05, 0.05])]
    else:
        record[key] = [0.0, 1e9, float("nan"), "text", -1.0][rng.integers(5)]


def _arrays(rng: np.random.Generator, record: ArrayRecord) -> ArrayRecord:
    lied = {}
    for name, array in record.items():
        values = array.numpy().copy()
        choice = rng.integers(7)
        if choice == 0:
            values[:] = 1e4  # ruins the model
        elif choice == 1:
            values += 1e-3
        elif choice == 2:
            values[0] = np.nan
        elif choice == 3:
            values = values[:-1]
        elif choice == 4:
            values = values.astype(np.int32)
        elif choice == 5:
            values = values.astype(np.float64)
        lied[name] = Array(values)
        if choice == 6:
            lied[name] = Array("float32", (3,), "numpy.ndarray", b"no array")
    return ArrayRecord(lied)
