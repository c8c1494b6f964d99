"""Strangers' files that would take far more memory than their size: each reader's peak, relative to the file."""

import json
import struct
from collections.abc import Callable

import msgpack
import numpy as np
import pytest
from memory import peak

from smark_jax import files
from smark_jax.files import _limits, _msgpack
from smark_jax.vault import bundles

MB = 2**20
RARE = "\U0001f600"  # one such character makes Python keep every character of a text in four bytes


def reads(path) -> Callable[[], object]:
    return lambda: files.read(path)


def refused(run: Callable[[], object], match: str) -> Callable[[], object]:
    def wrapped() -> None:
        with pytest.raises(ValueError, match=match):
            run()

    return wrapped


def leaf(number: int = 4) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb(((number,), "float32", bytes(4 * number))))


def test_a_long_text_beside_the_weights_takes_no_more_than_the_file(tmp_path):
    """Of 100 MB it took 700: as bytes, and as text of four bytes a character."""
    text = msgpack.packb({"kernel": leaf(), "note": RARE + "a" * 4 * MB})
    (tmp_path / "suspect").write_bytes(text)
    assert set(files.read(tmp_path / "suspect").leaves) == {"kernel"}
    assert peak(reads(tmp_path / "suspect")) < len(text) + MB
    # The control: what Python makes of it.
    assert peak(lambda: msgpack.unpackb(text)) > 4 * len(text)


TREES = {
    "blobs": b"\xdd" + (4_000).to_bytes(4, "big") + b"\xc4\x00" * 4_000,
    "extensions": b"\xdd" + (4_000).to_bytes(4, "big") + b"\xd4\x01\x00" * 4_000,
    "maps of one": b"\xdd" + (4_000).to_bytes(4, "big") + b"\x81\xa1a\xc0" * 4_000,
    "lists of one": b"\xdd" + (4_000).to_bytes(4, "big") + b"\x91\xc0" * 4_000,
    "large numbers": b"\xdd" + (4_000).to_bytes(4, "big") + b"\xcb" + bytes(8) + (b"\xcf" + b"\xff" * 8) * 3_999,
    "long keys": msgpack.packb({f"{k:04d}{RARE}" + "a" * 900: None for k in range(2_000)}),
    "one long beginning": msgpack.packb({RARE + "a" * 900: {f"{k:04d}": 1 for k in range(3_000)}}),
}


@pytest.mark.parametrize("name", TREES)
def test_small_values_are_counted_for_at_least_what_they_take(name, monkeypatch, tmp_path):
    """The budget's prices are upper bounds, measured by Python itself; and beyond the budget a file is refused."""
    data = TREES[name]
    walk = _msgpack._Walk(memoryview(data))

    taken = peak(lambda: _msgpack._collect(walk.value(0), "", {}) if name == "one long beginning" else walk.value(0))
    counted = _msgpack._MAX_MEMORY - walk._memory
    slots = 9 * (_msgpack._MAX_VALUES - walk._left)  # of lists; the number of values has a limit of its own
    leaves = 200 * 3_000 if name == "one long beginning" else 0
    assert taken < counted + slots + leaves + 60_000
    monkeypatch.setattr(_msgpack, "_MAX_MEMORY", counted // 4)
    (tmp_path / "suspect").write_bytes(data)
    bounded = peak(refused(reads(tmp_path / "suspect"), "far more memory"))
    assert bounded < counted // 4 + slots + 3 * len(data) + 60_000


def test_a_tree_of_as_many_leaves_as_are_allowed_is_within_the_budget(monkeypatch, tmp_path):
    """A tenth of both: 10,000 leaves with names of 60 characters."""
    monkeypatch.setattr(_msgpack, "_MAX_MEMORY", _msgpack._MAX_MEMORY // 10)
    tree = {f"block_with_a_long_name_{k:05d}": {"attention_projection": {"kernel": leaf(1)}} for k in range(10_000)}
    (tmp_path / "suspect").write_bytes(msgpack.packb({"params": tree}))
    assert len(files.read(tmp_path / "suspect").leaves) == 10_000


@pytest.mark.parametrize("part", [b"[],", b"{},", b'"",', b"1e9,"])
def test_json_of_many_small_values_is_refused_before_it_is_parsed(part, monkeypatch, tmp_path):
    """The header of safetensors, and an evidence bundle: 64 MB of empty lists took 1.6 GB."""
    monkeypatch.setattr(_limits, "_MAX_JSON_VALUES", 1_000)
    monkeypatch.setattr(bundles, "LARGEST", 200_000)  # room is made for so much
    header = b'{"a":[' + part * 30_000 + b"0]}"
    (tmp_path / "suspect").write_bytes(struct.pack("<Q", len(header)) + header)
    assert peak(refused(reads(tmp_path / "suspect"), "commas and brackets")) < 3 * len(header) + 60_000
    (tmp_path / "bundle").write_bytes(header)
    assert peak(refused(lambda: bundles.read(tmp_path / "bundle"), "commas and brackets")) < 4 * len(header) + 60_000
    if part in (b"[],", b"{},"):  # the control: what Python makes of it
        assert peak(lambda: json.loads(header)) > 10 * len(header)


def test_json_that_is_not_ascii_is_shorter_by_as_much_as_it_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(_limits, "_MAX_JSON_UNICODE", MB)
    monkeypatch.setattr(bundles, "LARGEST", 3 * MB)
    for text, most in ((RARE + "a" * 2 * MB, 4.0), ("a" * 2 * MB, 3.5)):
        (tmp_path / "bundle").write_text(json.dumps({"bundle": text}, ensure_ascii=False))
        taken = peak(refused(lambda: bundles.read(tmp_path / "bundle"), "evidence"))
        assert taken < most * len(text)


@pytest.mark.parametrize("order", ["<f4", ">f4", ">f8", ">f2"])
def test_an_npz_array_is_in_memory_once_beside_the_file(order, tmp_path):
    values = (np.arange(400_000) % 1000).astype(order).reshape(400, 1000)
    np.savez(tmp_path / "c.npz", a=values)
    np.savez(tmp_path / "f.npz", a=np.asfortranarray(values))
    for name, times in (("c.npz", 1), ("f.npz", 2)):  # what is in Fortran's order is turned
        found = files.read(tmp_path / name).leaves["a"]
        np.testing.assert_array_equal(found, values)
        assert found.dtype == values.dtype.newbyteorder("=")
        size = (tmp_path / name).stat().st_size
        assert peak(reads(tmp_path / name)) < size + times * values.nbytes + 3 * MB
