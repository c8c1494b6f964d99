"""Bundles of evidence: one that is genuine, from a small vault, and ways to make it say something else."""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from smark_jax import errors, files, keys, vault
from smark_jax.vault import (
    commitments,
    customers,
    documents,
    evidence,
    issuing,
    models,
    reading,
    verdicts,
    verification,
)

NAMES = ("Ada", "Grace", "Emmy", "Linus", "Mary")
"""Customers in the order of their serials: three under commitment 1, two more under commitment 2."""
_SHAPES = {"bias": (8,), "first": (8, 28), "second": (8, 28), "third": (8, 28)}
_CHIPS = 64


class Suspect(NamedTuple):
    """A model in dispute: its file, the customers whose copies are in it, and the chips it reads."""

    path: Path
    guilty: frozenset[str]
    content: str
    chips: np.ndarray


class Scene(NamedTuple):
    """A small vault's evidence, and all that its owner has to lie with.

    Attributes:
      bundle: the file of a genuine bundle, which accuses Ada of her copy.
      roots: of commitments 1 and 2.
      base: file of the base.
      suspects: Ada's copy first; Emmy's, a mixture of Grace's and Mary's, the base, and models that are nobody's.
      leaves: all customers' leaves in the clear.
      master: the owner's key.
      folder: lives as long as the process.
    """

    bundle: bytes
    roots: tuple[str, str]
    base: Path
    suspects: tuple[Suspect, ...]
    leaves: tuple[dict[str, Any], ...]
    master: keys.SecretKey
    folder: tempfile.TemporaryDirectory


@functools.cache
def scene() -> Scene:
    """Five customers of a model of 680 weights; Ada's copy leaked. The same in every process."""
    folder = tempfile.TemporaryDirectory()
    path, secret, rng = Path(folder.name), "nothing that anybody should guess", np.random.default_rng(0)
    weights = lambda: {name: rng.normal(size=shape).astype(np.float32) for name, shape in _SHAPES.items()}  # noqa: E731
    base = weights()
    files.write(path / "base", base)
    with mock.patch.object(keys, "new", lambda: keys.from_bytes(bytes(range(32)))):
        vault.create(path / "vault", secret)
    with vault.opened(path / "vault", secret) as desk:
        model = models.add(desk, "net", base, num_chips=_CHIPS)
        first = issuing.issue(model, customers.resolve(desk, NAMES[:3]), path / "copies")
        second = issuing.issue(model, customers.resolve(desk, NAMES[3:]), path / "copies")
        copies = [files.read(file).leaves for file in (*first.files, *second.files)]
        mixed = {name: (copies[1][name] + copies[4][name]) / 2 for name in base}
        found = [("Ada", copies[0]), ("Emmy", copies[2]), ("Grace Mary", mixed), ("", base)]
        found += [("", weights()) for _ in range(4)]
        suspects = []
        for number, (guilty, leaves) in enumerate(found):
            files.write(file := path / f"suspect-{number}", leaves)
            chips = reading.read(leaves, base, model.mark, reading.Reading()).chips
            suspects.append(Suspect(file, frozenset(guilty.split()), files.content_hash(leaves), chips))
        verdicts.trace(model, [suspects[0].path])
        bundle = evidence.export(desk, 1).content
        opened = tuple(map(documents.plain, commitments.open_leaves(model, customers.registered(desk))))
        roots = first.commitment.root, second.commitment.root
        return Scene(bundle, roots, path / "base", tuple(suspects), opened, desk.master, folder)


def genuine(rng: np.random.Generator) -> bytes:
    return scene().bundle


def read(path: Path) -> verification.Report:
    """Verifies the bundle. Should another one than the genuine hold, that is the worst that could happen."""
    at = scene()
    report = verification.verify(path, at.suspects[0].path, at.base, root=at.roots[0])
    if report.holds and json.loads(path.read_bytes()) != json.loads(at.bundle):
        raise AssertionError("a changed bundle holds")
    return report


def edit(data: bytes, rng: np.random.Generator) -> bytes:
    """A value somewhere in the JSON is replaced by one of another kind or size."""
    values = (None, -1, 10**30, 1e308, "", "zz", "../../etc/passwd", [], {}, [[]], True, "00" * 32, "x" * 10**5)
    document = json.loads(data)
    parent, name = place(document, rng, int(rng.integers(1, 7)))
    parent[name] = values[int(rng.integers(len(values)))]
    return json.dumps(document).encode()


def place(document: Any, rng: np.random.Generator, depth: int) -> tuple[Any, Any]:
    """Somewhere in a document, so many levels down at most: a map or list, and a name or number in it."""
    parent: Any = document
    for _ in range(depth):
        inner = [value for _, value in _items(parent) if isinstance(value, dict | list) and value]
        parent = inner[int(rng.integers(len(inner)))] if inner else parent
    names = [name for name, _ in _items(parent)]
    return parent, names[int(rng.integers(len(names)))]


def _items(parent: Any) -> Iterator[tuple[Any, Any]]:
    return iter(parent.items() if isinstance(parent, dict) else enumerate(parent))


def edited_bundle(rng: np.random.Generator) -> bytes:
    return edit(scene().bundle, rng)


def other_json(rng: np.random.Generator) -> bytes:
    """JSON, or nearly, that is no bundle."""
    texts = (b"[" * 100_000, b'{"bundle": ' * 20_000, b"1" * 10_000, b"\xff\xfe", b"NaN", b"", b"null", b"{}")
    return texts[int(rng.integers(len(texts)))]


FORGERIES = (edited_bundle, edited_bundle, edited_bundle, other_json)
REFUSAL = errors.Unreadable
