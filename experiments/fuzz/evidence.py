"""Bundles of evidence: one that is genuine, from a small vault, and ways to make it say something else."""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import files, keys, vault
from smark_jax.vault import bundles, customers, evidence, issuing, models, verdicts, verification


class _Case(NamedTuple):
    bundle: bytes
    suspect: Path
    base: Path
    root: str
    folder: tempfile.TemporaryDirectory  # lives as long as the process


@functools.cache
def _case() -> _Case:
    """Three customers of a model of 20,000 weights; the second one's copy leaked."""
    folder = tempfile.TemporaryDirectory()
    path, secret = Path(folder.name), keys.new().to_bytes().hex()
    base = {"kernel": np.random.default_rng(0).normal(size=(100, 200)).astype(np.float32)}
    files.write(path / "base", base)
    vault.create(path / "vault", secret)
    with vault.opened(path / "vault", secret) as desk:
        models.add(desk, "net", base)
        issued = issuing.issue(desk, "net", customers.resolve(desk, ["Ada", "Grace", "Emmy"]), path / "copies")
        verdicts.trace(desk, "net", [issued.files[1]])
        content = evidence.export(desk, 1).content
        return _Case(content, issued.files[1], path / "base", issued.commitment.root, folder)


def genuine(rng: np.random.Generator) -> bytes:
    return _case().bundle


def read(path: Path) -> verification.Report:
    """Verifies the bundle. Should another one than the genuine hold, that is the worst that could happen."""
    case = _case()
    report = verification.verify(path, case.suspect, case.base, root=case.root)
    if report.holds and json.loads(path.read_bytes()) != json.loads(case.bundle):
        raise AssertionError("a changed bundle holds")
    return report


def edit(data: bytes, rng: np.random.Generator) -> bytes:
    """A value somewhere in the JSON is replaced by one of another kind or size."""
    values = (None, -1, 10**30, 1e308, "", "zz", "../../etc/passwd", [], {}, [[]], True, "00" * 32, "x" * 10**5)
    document = json.loads(data)
    parent: Any = document
    for _ in range(int(rng.integers(1, 7))):
        inner = [value for _, value in _items(parent) if isinstance(value, dict | list) and value]
        parent = inner[int(rng.integers(len(inner)))] if inner else parent
    names = [name for name, _ in _items(parent)]
    parent[names[int(rng.integers(len(names)))]] = values[int(rng.integers(len(values)))]
    return json.dumps(document).encode()


def _items(parent: Any) -> Iterator[tuple[Any, Any]]:
    return iter(parent.items() if isinstance(parent, dict) else enumerate(parent))


def edited_bundle(rng: np.random.Generator) -> bytes:
    return edit(_case().bundle, rng)


def other_json(rng: np.random.Generator) -> bytes:
    """JSON, or nearly, that is no bundle."""
    texts = (b"[" * 100_000, b'{"bundle": ' * 20_000, b"1" * 10_000, b"\xff\xfe", b"NaN", b"", b"null", b"{}")
    return texts[int(rng.integers(len(texts)))]


FORGERIES = (edited_bundle, edited_bundle, edited_bundle, other_json)
REFUSAL = bundles.Unreadable
