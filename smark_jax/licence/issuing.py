"""The last step of a licence: the owner packs a copy without knowing the customer's word, and the customer opens it."""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jaxtyping import Num

from smark_jax import carriers, embedding, files, keys
from smark_jax._types import AnyArray
from smark_jax.carriers import Mark
from smark_jax.licence import documents, group, packages, requests, segments, transfer, variants
from smark_jax.licence.documents import SignedRequest

SHARE = math.sqrt(0.5)
"""Each of the two words takes this share of the mark's strength: together they cost what one word of a copy costs."""


def package(
    signed: SignedRequest,
    base: Mapping[str, np.ndarray],
    mark: Mark,
    word: Num[AnyArray, " m"],
    key: keys.SecretKey,
    signing: Ed25519PrivateKey,
    *,
    strength: float | None = None,
    write: Callable[[Path, Mapping[str, np.ndarray]], object] = files.write,
    suffix: str = ".safetensors",
) -> bytes:
    """A package for a request: the copy with the owner's word, and both variants of each segment of the secret one.

    Args:
      signed: the request, which is checked.
      base: the model's leaves by name.
      mark: the model's.
      word: the customer's codeword, which the owner knows, shape [m].
      key: the owner's, of this offer alone: it gives the scalar of the transfers and, with the request, the signs of
        the segments.
      signing: the owner's, which signed the offer.
      strength: of both words together; the mark's own by default.
      write: writes leaves as a file or folder in the model's form.
      suffix: what the name of such a file ends with.

    Raises:
      SmarkError: when the request is not whole, or the model has fewer coordinates than the request has choices.
    """
    requests.check(signed)
    offer, request = signed.offer.offer, signed.request
    strength = SHARE * float(mark.strength if strength is None else strength)
    found = segments.draw(requests.seed(request), segments.num_coordinates(mark), offer.num_segments, offer.num_parts)
    mark = mark._replace(spec=carriers.with_ties(mark.spec, dict(base)))
    copy = embedding.embed(dict(base), mark, word, strength)
    copy = {name: np.asarray(leaf) for name, leaf in copy.items()}
    digest = documents.digest(request)
    signs = segments.all_signs(found, segments.part_keys(key, digest, offer.num_parts))
    made = variants.cut(copy, mark, found, signs, strength)
    context = bytes.fromhex(digest)
    secret = requests.scalar(key)
    sealing = packages.Keys(
        _rest_key(group.times(secret, bytes.fromhex(request.rest)), context),
        transfer.owner_keys(secret, bytes.fromhex(request.points), context),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        write(path, made.rest)
        form = packages.read_form(path)
    return packages.pack(made, form, suffix, digest, sealing, signing)


def unpack(
    content: bytes, signed: SignedRequest, secrets: requests.Secrets, where: str, write: Callable[[Path], Path]
) -> documents.Package:
    """Opens a package and writes the customer's copy, in the form of the base.

    Args:
      content: the package's bytes.
      signed: the customer's request.
      secrets: of that request.
      where: the file's name, for messages.
      write: gets the form's suffix, empty for a folder, as a path to name; returns where to write the copy.

    Returns:
      The package's head.

    Raises:
      Unreadable: when it is no package.
      SmarkError: when it is not for this request, or was changed on its way.
      Damaged: when its owner spoiled it.
    """
    offer, request = signed.offer.offer, signed.request
    context = bytes.fromhex(documents.digest(request))
    opened = packages.head(content, offer.public_key, context.hex(), where)
    owner = bytes.fromhex(offer.point)
    chosen = transfer.customer_keys(secrets.choices, owner, bytes.fromhex(request.points), context)
    rest = _rest_key(group.times(secrets.rest, owner), context)
    with tempfile.TemporaryDirectory() as folder:
        with packages.whole():
            packages.check(opened.package, len(content))
            total = sum(place.held for place in opened.package.leaves)
            found = segments.draw(requests.seed(request), total, offer.num_segments, offer.num_parts)
            made = packages.unpack(content, opened, rest, chosen, secrets.choices.bits, found, Path(folder))
            form = packages.form_of(opened.package, Path(folder))
        path = write(Path(form.suffix))
        with packages.whole():
            form.write(path, made)
    return opened.package


def _rest_key(shared: bytes, context: bytes) -> keys.SecretKey:
    return keys.derive(keys.from_bytes(shared), "licence rest", context.hex())
