"""GGUF files: read as the package ``gguf`` understands them, written in place, refused when malformed."""

import struct
from pathlib import Path

import numpy as np
import pytest
from stress.fuzz import mutations

from smark_jax import errors, files

SMALL = Path(__file__).parent / "data/small.gguf"  # by tests/make_fixtures/gguf_file.py
EXPECTED = dict(np.load(SMALL.with_name("small_gguf.npz")))


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*, tensors=1, notes=b"", shape=(4,), kind=0, offset=0, content=bytes(16), name="w", version=3, alignment=32):
    """A file of one note at most and one tensor, by hand."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, bool(notes)) + notes
    listed = text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + listed + bytes(-len(head + listed) % alignment) + content


def test_tensors_are_read_as_the_package_reads_them():
    found = files.read(SMALL)
    assert found.format == "gguf" and found.leaves.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        leaf = found.leaves[name]
        assert leaf.dtype.name == ("bfloat16" if name == "BF16" else expected.dtype.name)
        np.testing.assert_array_equal(leaf.astype(expected.dtype), expected, strict=True)


def test_a_copy_is_the_base_byte_for_byte_but_for_the_numbers(tmp_path):
    leaves = files.read(SMALL).leaves
    floats = ("f32", "f16", "f64", "BF16")
    changed = leaves | {name: leaves[name] * leaves[name].dtype.type(2) for name in floats}
    files.write(tmp_path / "copy", changed, like=SMALL)
    before, after = (np.frombuffer(path.read_bytes(), np.uint8) for path in (SMALL, tmp_path / "copy"))
    numbers = sum(leaves[name].nbytes for name in floats)
    assert len(before) == len(after) and 0 < (before != after).sum() <= numbers
    found = files.read(tmp_path / "copy").leaves
    assert all(np.array_equal(found[name], changed[name]) for name in changed)
    with pytest.raises(errors.SmarkError, match="which is quantised there"):
        files.write(tmp_path / "copy", leaves | {"Q8_0": leaves["Q8_0"] + 1}, like=SMALL)


def test_the_last_axis_comes_first_in_the_file(tmp_path):
    (tmp_path / "w").write_bytes(gguf(shape=(3, 2), content=np.arange(6, dtype="<f4").tobytes()))
    assert files.read(tmp_path / "w").leaves["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_numbers_begin_where_the_alignment_says(tmp_path):
    note, content = text("general.alignment") + struct.pack("<II", 4, 8), np.arange(4, dtype="<f4").tobytes()
    written = {n: gguf(notes=note, alignment=8, content=content, name="w" * n) for n in range(1, 33)}
    assert len({len(one) for one in written.values()}) > 1
    for n, one in written.items():
        (tmp_path / "w").write_bytes(one)
        assert files.read(tmp_path / "w").leaves["w" * n].tolist() == [0, 1, 2, 3]


MALFORMED = {
    "version": (gguf(version=4), "version 4"),
    "no tensors": (gguf(tensors=0), "no arrays"),
    "too many": (gguf(tensors=2**40), "more than 100,000 leaves"),
    "beyond the end": (gguf(content=bytes(15)), "goes on after the end"),
    "offset": (gguf(offset=2**60), "goes on after the end"),
    "shape": (gguf(shape=(2**40, 2**40)), "has the shape|bytes of data"),
    "axes": (gguf(shape=(1,) * 9), "9 axes"),
    "name": (gguf(name="\x1b[2J"), "a leaf's name is"),
    "long name": (gguf(name="a" * 5_000), "a name in it has 5,000 bytes"),
    "type": (gguf(kind=6), "of the type 6 of ggml"),
    "blocks": (gguf(kind=8, shape=(33,)), "not in blocks of 32"),
    "cut": (gguf()[:40], "in the middle of a value"),
    "note": (gguf(notes=text("a") + struct.pack("<I", 77)), "of the kind 77"),
    "list of lists": (gguf(notes=text("a") + struct.pack("<IIQ", 9, 9, 1)), "values of the kind 9"),
    "endless list": (gguf(notes=text("a") + struct.pack("<IIQ", 9, 8, 2**60)), "values of the kind 8"),
    "large": (gguf(kind=8, shape=(2**30,)), "take more than"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case, tmp_path):
    content, said = MALFORMED[case]
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(errors.Unreadable, match=said) as caught:
        files.read(tmp_path / "w")
    assert str(caught.value).isprintable()


def test_mutations_are_read_or_refused(tmp_path):
    rng, refused = np.random.default_rng(0), 0
    for case in range(300):
        (tmp_path / "w").write_bytes(mutations.BREAKS[case % len(mutations.BREAKS)](SMALL.read_bytes(), rng) or b"GGUF")
        try:
            files.read(tmp_path / "w")
        except errors.Unreadable:
            refused += 1
    assert 50 < refused < 300
