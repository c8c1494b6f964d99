"""Packages: the copy that they make, what their owner can spoil, and what the customer says then."""

import itertools
import math
import re
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from licences import CUSTOMER, KEY, OWNER, model, offer, packed, resigned, unpacked

from smark_jax import errors, keys, licence
from smark_jax.licence import documents, group, issuing, packages, segments, transfer, variants
from smark_jax.licence.documents import FileRow


@pytest.fixture(scope="module")
def made():
    return licence.request(offer(), CUSTOMER)


@pytest.fixture(scope="module")
def owned():
    return model()


@pytest.fixture(scope="module")
def package(made, owned):
    return packed(owned, made.request)


DAMAGED = (
    "licence: expected a whole package, but got one that cannot be opened, although its owner signed it.\n"
    "Do not say more to the owner than that: 'smark licence complain' draws a new word and asks for a new one."
)


def damaged(content, made, folder):
    """Requires the one text that a customer may see, a small use of memory, and no file outside the named path."""
    before = {path.name for path in folder.parent.iterdir()}
    tracemalloc.start()
    with pytest.raises(licence.Damaged) as caught:
        unpacked(content, made.request, made.secrets, folder / "copy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value) == DAMAGED and caught.value.desk == DAMAGED.partition(": ")[2]
    assert peak < 2**28 and not list(folder.iterdir()) and {path.name for path in folder.parent.iterdir()} == before


def rest_key(made):
    context = bytes.fromhex(documents.digest(made.request.request))
    return issuing._rest_key(group.times(licence.scalar(KEY), bytes.fromhex(made.request.request.rest)), context)


def with_rest(package, body, made, *plain, compress=zlib.compress):
    """The head and the body with another rest, sealed with the right key."""
    sealed = [packages._sealed(rest_key(made), compress(one), number) for number, one in enumerate(plain)]
    old = sum(package.pieces) + 16 * len(package.pieces)
    package = package._replace(pieces=tuple(len(one) - 16 for one in sealed))
    return package, b"".join(sealed) + body[old:]


def place(package, body, **fields):
    return package._replace(leaves=(package.leaves[0]._replace(**fields),)), body


def rows(package, body, *rows, **fields):
    return package._replace(files=rows, **fields), body


def bomb(package, body, made, size):
    head, body = with_rest(package, body, made, bytes(1 << 26), *[bytes(1 << 26)] * (size - 1))
    return head._replace(files=(FileRow("", size << 26),)), body


HOSTILE = {
    "held 2^62": lambda p, b, m: place(p, b, held=2**62),
    "held 10^9": lambda p, b, m: place(p, b, held=10**9),
    "held one more": lambda p, b, m: place(p, b, held=4097),
    "held one less": lambda p, b, m: place(p, b, held=4095),
    "held none": lambda p, b, m: place(p, b, held=0),
    "no leaves": lambda p, b, m: (p._replace(leaves=()), b),
    "a leaf twice": lambda p, b, m: (p._replace(leaves=p.leaves * 2), b),
    "another leaf": lambda p, b, m: place(p, b, path="b/kernel"),
    "a tie to nothing": lambda p, b, m: place(p, b, tied=("b/kernel",)),
    "a tie to itself": lambda p, b, m: place(p, b, tied=("a/kernel",)),
    "another shape": lambda p, b, m: place(p, b, shape=(4096,)),
    "an empty shape": lambda p, b, m: place(p, b, shape=(0, 64), axes=(0,), directions=1),
    "directions of nothing": lambda p, b, m: place(p, b, axes=(), directions=1),
    "2^40 directions": lambda p, b, m: place(p, b, axes=(0,), directions=2**40),
    "axis 7": lambda p, b, m: place(p, b, axes=(7,), directions=4),
    "an axis twice": lambda p, b, m: place(p, b, axes=(0, 0), directions=4),
    "a shape beyond 2^64": lambda p, b, m: place(p, b, shape=(2**62, 2**62), axes=(0, 1), directions=4),
    "a file of 2^62": lambda p, b, m: rows(p, b, FileRow("", 2**62)),
    "a file of 0": lambda p, b, m: rows(p, b, FileRow("", 0)),
    "no files": lambda p, b, m: rows(p, b),
    "two files without a name": lambda p, b, m: rows(p, b, *[FileRow("", p.files[0].size // 2)] * 2),
    "a piece of 2^62": lambda p, b, m: (p._replace(pieces=(2**62,)), b),
    "a piece of 0": lambda p, b, m: (p._replace(pieces=(0,)), b),
    "a million pieces": lambda p, b, m: (p._replace(pieces=(1,) * 10**6), b),
    "one piece more": lambda p, b, m: (p._replace(pieces=(*p.pieces, 1)), b),
    "a piece that is not compressed": lambda p, b, m: with_rest(p, b, m, b"plain", compress=bytes),
    "a bomb": lambda p, b, m: bomb(p, b, m, 8),
    "a bomb with another size": lambda p, b, m: with_rest(p, b, m, bytes(1 << 28)),
    "nothing after the head": lambda p, b, m: (p, b""),
    "a byte more": lambda p, b, m: (p, b + b"\0"),
    "a byte less": lambda p, b, m: (p, b[:-1]),
    "noise": lambda p, b, m: (p, bytes(len(b))),
    "a rest of noise": lambda p, b, m: with_rest(p, b, m, bytes(p.files[0].size)),
    **{
        f"suffix {suffix[:20]!r}": lambda p, b, m, suffix=suffix: (p._replace(suffix=suffix), b)
        for suffix in ("/../../x", "/x", "\0", "x" * 5000, "\\..\\x", "\ud800")
    },
    **{
        f"name {name[:20]!r}": lambda p, b, m, name=name: rows(p, b, FileRow(name, p.files[0].size))
        for name in (
            "../x.safetensors",
            "/tmp/x",
            ".x",
            "..",
            ".",
            "a/b",
            "\0",
            "x" * 5000,
            "a\\b",
            "C:x",
            "\x1b[2J",
            "\ud800",
        )
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_spoiled_package_is_damaged_and_nothing_else(name, made, package, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    damaged(resigned(package, lambda head, body: HOSTILE[name](head, body, made)), made, folder)
