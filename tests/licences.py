"""The parties of a licence for tests, and what the protocol computes, without smark_jax: see :mod:`edwards`."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import carriers, codes, files, keys, licence
from smark_jax.licence import documents, group, segments

SUSPECT, BUNDLE = "ab" * 32, "cd" * 32


def secret(name: str) -> keys.SecretKey:
    return keys.from_bytes(hashlib.sha256(name.encode()).digest())


OWNER, CUSTOMER, ARBITER, MALLORY = (licence.Identity(secret(name)) for name in ("owner", "ann", "arbiter", "mallory"))
KEY = secret("of the offer")


def offer(num_segments: int = 64, num_parts: int = 8, key: keys.SecretKey = KEY, **fields: Any) -> licence.SignedOffer:
    point = group.times_base(licence.scalar(key)).hex()
    root, public = "00" * 32, OWNER.public.identity
    made = licence.Offer("2026-11-28T10:00:00Z", "m", "Ann", 3, 1, root, public, point, num_segments, num_parts)
    return licence.sign_offer(made._replace(**fields), OWNER.signing)


class Model(NamedTuple):
    base: dict[str, np.ndarray]
    mark: carriers.Mark
    word: np.ndarray


def model(base: dict[str, np.ndarray] | None = None, shape: carriers.Shape | None = None, m: int = 32) -> Model:
    """By default a matrix of 4,096 weights."""
    if base is None:
        base = {"a/kernel": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    word = np.asarray(codes.codebook(secret("code"), [3], m)[0])
    return Model(base, carriers.mark(secret("carrier"), base, m, shape=shape), word)


def packed(one: Model, signed: licence.SignedRequest, key: keys.SecretKey = KEY, **options: Any) -> bytes:
    return licence.package(signed, one.base, one.mark, one.word, key, OWNER.signing, **options)


def unpacked(content: bytes, signed: licence.SignedRequest, secrets: licence.Secrets, path: Path) -> dict:
    licence.unpack(content, signed, secrets, "the package", lambda form: path)
    return files.read(path).leaves


def challenge(signed: licence.SignedRequest, pieces=(), parts: int = 1, key: keys.SecretKey = KEY, earlier=()):
    """Of the first parts that the hash names."""
    taken = {one.part for one in earlier}
    chosen = tuple([part for part in licence.order(SUSPECT, signed) if part not in taken][:parts])
    found = segments.part_keys(key, documents.digest(signed.request), signed.offer.offer.num_parts)
    sealed = tuple(pieces[part].hex() for part in chosen) if pieces else ()
    return licence.Challenge(signed, chosen, tuple(found[i].to_bytes().hex() for i in chosen), tuple(earlier), sealed)


def resigned(content: bytes, change, identity=OWNER, *, keep: bool = False) -> bytes:
    """A package whose owner changed its head, its body, or both: ``change(package, body)`` gives the new ones.

    The body's hash is made right, unless a changed one is to be kept.
    """
    magic = b"smark licence package v1\n"
    start = len(magic) + 4
    length = int.from_bytes(content[start - 4 : start], "big")
    head = documents.loads(documents.SignedPackage, content[start : start + length], "it").package
    package, body = change(head, content[start + length :])
    package = package if keep else package._replace(body=hashlib.sha256(body).hexdigest())
    text = documents.dumps(documents.SignedPackage(package, documents.sign(identity.signing, package)))
    return magic + len(text).to_bytes(4, "big") + text + body


def canonical(document: Any) -> bytes:
    """As :func:`json.dumps` has it, of a document whose absent fields are left out."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(one) for name, one in value._asdict().items() if one is not documents.MISSING}
        return [plain(one) for one in value] if isinstance(value, tuple) else value

    return json.dumps(plain(document), sort_keys=True, separators=(",", ":")).encode()
