r"""Codewords that the owner provably drew: own words are committed to first, and a public value draws the issued ones.

*Draft.* Before the public value V exists, the owner commits to the own words o_j of serials 0 to C - 1, which come from
the code key, and to all else that a reading rests on (base, carrying leaves, shape, carrier key, strength, alpha). The
draft is the root of a Merkle tree: its first leaf is that header, and leaf j + 1 is

.. math:: H(\text{"own word "} \mid \text{salt}_j \mid j \mid o_j)

with 32 bytes of salt, j in 8 bytes (big-endian) and o_j packed as in :class:`smark_jax.vault.documents.Leaf`.

*Draw.* V is the signature of an RFC 3161 time stamp over the draft's file, or a beacon's value. The word that a copy
carries is :math:`w_j = o_j \oplus p_j`, where p_j is the stream of the public key SHA-256(V) at serial j
(:mod:`smark_jax.codes`). Whatever o_j is, w_j is uniform if V could not be foreseen. V is not the time stamp's whole
file, since whoever holds that can rewrite its parts that nobody signed, and so try values without asking for any.

*Serials.* Once V is known, an owner may still give a customer one serial or another. So an arbiter counts all serials
that could have been chosen (:func:`choices`). A draft's serials are all that its model ever has.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from smark_jax import _documents, _validate, chacha, keys
from smark_jax.vault import crypto, documents, folder, merkle, models, store, timestamps
from smark_jax.vault.documents import Beacon, Draft, DraftHeader, Draw, Drawn, DrawNamed, OwnWord, Token

FORMAT, VERSION = "smark draft", 1
CAPACITY, MOST = 1 << 16, 1 << 22
"""How many serials a draft covers by default, and at most."""
_SERIALS_PER_PASS = 4096
# Fewer random bytes could be foreseen by trying; the longest signatures have a few hundred.
_FEWEST_BYTES, _MOST_BYTES = 16, 4096
_BEACON = re.compile(r"\s*(\S.{0,99}?)\s+round\s+(\S{1,100}?)\s*:\s*(?:0x)?([0-9a-fA-F]+)\s*", re.IGNORECASE)


def draft(
    model: models.OpenModel, capacity: int | None = None, on_done: Callable[[int], None] = lambda n: None
) -> Draft:
    """The model's draft; made and kept when it is asked for the first time.

    Args:
      model: of an open vault, of which nobody has a copy.
      capacity: C, the number of serials. By default that of the draft which exists, or 65,536.
      on_done: called with the number of own words that were hashed.

    Raises:
      SmarkError: when copies exist, the draft has another capacity, or it would not cover those who are registered.
    """
    there = get(model)
    if there is not None:
        if capacity not in (None, there.header.capacity):
            cause = "A draft is made once: leave --capacity out, or add the model again under another name."
            got = f"{capacity:,}, where the draft of {model.name} has {there.header.capacity:,}"
            raise _validate.fail("draw", "the draft's own capacity", got, cause)
        return there
    capacity = CAPACITY if capacity is None else capacity
    _validate.positive("draw", "capacity", capacity)
    registered = store.num_customers(model.vault.connection)
    if not registered <= capacity <= MOST:
        cause = "Serials count up over all models of a vault, and a draft covers the first ones: set --capacity."
        got = f"{capacity:,}, where {registered:,} customers are registered"
        raise _validate.fail("draw", f"a capacity of at most {MOST:,} for all customers to come", got, cause)
    _refuse_issued(model)
    made = _make(model, capacity, on_done)
    with store.transaction(model.vault.connection):
        _refuse_issued(model)
        if get(model) is None:
            rows = {"drafts": [(model.name, documents.text(made))]}
            folder.record(model.vault, "words drafted", rows, model=model.name, root=made.root)
    return get(model) or made


def get(model: models.OpenModel) -> Draft | None:
    """The model's draft; None when none was made."""
    text = store.draft(model.vault.connection, model.name)
    return documents.stored(Draft, text) if text else None


def drawn(model: models.OpenModel) -> Drawn | None:
    """The model's draft and its draw; None where words are the owner's own."""
    first, second = get(model), model.draw
    return Drawn(first, second) if first and second else None


def named(model: models.OpenModel) -> DrawNamed | documents.Missing:
    """What a commitment's header states about the draw."""
    found = drawn(model)
    return DrawNamed(found.draft.root, found.draw.key.to_bytes().hex()) if found else documents.MISSING


def by_token(model: models.OpenModel, response: bytes) -> Draw:
    """The draw by an RFC 3161 response about the draft's file.

    Raises:
      SmarkError: when there is no draft, or the response is not granted, is about something else, or has not exactly
        one signature.
    """
    return _by_token(_existing(model), response)


def _by_token(of: Draft, response: bytes) -> Draw:
    time = timestamps.check(of.published, response, what="draft", command="draw")
    return Draw(timestamps.signature(response).hex(), token=Token(time, response.hex()))


def by_beacon(text: str) -> Draw:
    """The draw by a beacon's value, written as ``drand round 123: HEX``.

    Raises:
      SmarkError: when it has another form, or fewer than 16 bytes.
    """
    found = _BEACON.fullmatch(text)
    digits = found[3].lower() if found else ""
    if not found or not found[1].isprintable() or not _fits(digits):
        cause = "Write the beacon's name, its round and its value, as the beacon published them after your draft."
        expected = "NAME round NUMBER: VALUE, with a value of 16 bytes or more in hexadecimal"
        raise _validate.fail("draw", expected, repr(text), cause)
    return Draw(digits, beacon=Beacon(found[1], found[2]))


def _fits(digits: str) -> bool:
    return len(digits) % 2 == 0 and _FEWEST_BYTES <= len(digits) // 2 <= _MOST_BYTES


def wrong(of: Draft, draw: Draw) -> str | None:
    """Why a draw does not follow from a draft; None when it does.

    Raises:
      MissingExtra: when time stamps cannot be read here.
    """
    if bool(draw.token) == bool(draw.beacon) or not _fits(draw.value):
        return "it names no source of the value, or two, or too short a value"
    if draw.token and _by_token(of, bytes.fromhex(draw.token.response)) != draw:
        return "the value is not the signature of the time stamp, or the stamp states another time"
    return None


def record(model: models.OpenModel, draw: Draw) -> None:
    """Draws the model's words: from now on each is its own word XOR the public one.

    Raises:
      SmarkError: when there is no draft, words were drawn already, or copies exist.
    """
    with store.transaction(model.vault.connection):
        if model.draw is not None:
            cause = "Words are drawn once: a choice among several values would be a choice of words."
            raise _validate.fail("draw", "a model whose words were not drawn", f"{model.name}, whose were", cause)
        _existing(model)
        _refuse_issued(model)
        rows = {"draws": [(model.name, documents.text(draw))]}
        folder.record(model.vault, "words drawn", rows, model=model.name, value=draw.key.to_bytes().hex())


def _existing(model: models.OpenModel) -> Draft:
    found = get(model)
    if found is None:
        cause = f"Write the draft first, and publish it: smark draw VAULT {model.name} --out DRAFT.json."
        raise _validate.fail("draw", "a draft that came before the value", f"none of {model.name}", cause)
    return found


def _refuse_issued(model: models.OpenModel) -> None:
    if store.latest_commitment(model.vault.connection, model.name) is not None:
        cause = "Its words are committed to and cannot change: add the model again under another name, and draw before."
        raise _validate.fail("draw", "a model of which nobody has a copy", f"{model.name}, which was issued", cause)


def issuable(model: models.OpenModel, serials: Sequence[int]) -> Drawn | None:
    """What new copies' words are drawn with, after checking that these serials have words.

    Raises:
      SmarkError: when a draft still waits for its value, or a serial is beyond the draft's.
    """
    found = drawn(model)
    if found is None and get(model) is not None:
        cause = (
            f"Draw first: smark draw VAULT {model.name} --token FILE, or --beacon TEXT. To issue without, add the "
            "model again under another name."
        )
        raise _validate.fail("issue", "words that are drawn, as their draft was made", "a draft without value", cause)
    if found and max(serials) >= (capacity := found.draft.header.capacity):
        cause = "Words beyond were not committed to: add the model again under another name, with a larger --capacity."
        raise _validate.fail("issue", f"serials below the draft's {capacity:,}", f"{max(serials):,}", cause)
    return found


def own_words(model: models.OpenModel, serials: Sequence[int]) -> dict[int, OwnWord]:
    """Own words of these serials with their paths to the draft's root, for evidence.

    Raises:
      SmarkError: when the vault's keys do not give the draft that was made.
    """
    of = get(model)
    assert of is not None  # asked for drawn words only
    tree = [header_leaf(of.header), *_leaves(model, of.header.capacity)]
    if merkle.root(tree).hex() != of.root:
        raise _validate.fail("evidence", "the draft's own words", "others", "Restore the vault from your backup.")
    paths = merkle.paths(tree, [serial + 1 for serial in serials])
    found = {}
    for serial, path in zip(serials, paths, strict=True):
        ((salt, word),) = _pairs(model, range(serial, serial + 1))
        found[serial] = OwnWord(word.hex(), salt.hex(), tuple(node.hex() for node in path))
    return found


def header_leaf(header: DraftHeader) -> bytes:
    """The hash of a draft's header."""
    return merkle.leaf_hash(b"draft " + documents.canonical(header))


def leaf(serial: int, salt: bytes, word: bytes) -> bytes:
    """The hash of an own word."""
    return merkle.leaf_hash(b"own word " + salt + serial.to_bytes(8, "big") + word)


def choices(serials: Sequence[int], capacity: int) -> tuple[int, float]:
    r"""For how many customers a test of these serials pays, and the logarithm of the number of ranges it chose from.

    An owner gives out serials when V is known. Let range k be the serials below 2^k, for k up to the least K with
    :math:`2^K \ge C`. A test of serials in range k counts 2^k customers, and is paid for K + 1 times, once for each
    range: then the probability of any false accusation over all ranges is at most alpha, whichever serials were given
    out. Who gives them out in order pays for at most twice the customers.
    """
    return 1 << max(serials).bit_length(), math.log((capacity - 1).bit_length() + 1)


def common(model: models.OpenModel) -> dict[str, Any]:
    """What the headers of drafts and commitments both state: all that a reading of the model rests on, and when."""
    vault, settings = model.vault, model.settings
    return {
        "alpha": settings.alpha,
        "base": settings.base,
        "carrier_key": keys.commitment(models.carrier_key(vault, model.name)),
        "created": _documents.now(),
        "model": model.name,
        "num_chips": settings.num_chips,
        "public_key": crypto.public_key(vault.master),
        "spec": models.spec_digest(documents.rows(settings.spec)),
        "strength": settings.strength,
        "versions": settings.versions,
        "shape": settings.shape.digest if settings.shape else documents.MISSING,
    }


def _make(model: models.OpenModel, capacity: int, on_done: Callable[[int], None]) -> Draft:
    code_key = keys.commitment(models.code_key(model.vault, model.name))
    header = DraftHeader(capacity=capacity, code_key=code_key, **common(model))
    tree = [header_leaf(header)]
    for hashed in _leaves(model, capacity):
        tree.append(hashed)
        if len(tree) % _SERIALS_PER_PASS == 0:
            on_done(len(tree))
    return Draft(FORMAT, VERSION, header, *merkle.headed(tree))


def _leaves(model: models.OpenModel, capacity: int) -> Iterator[bytes]:
    for start in range(0, capacity, _SERIALS_PER_PASS):
        serials = range(start, min(start + _SERIALS_PER_PASS, capacity))
        for serial, (salt, word) in zip(serials, _pairs(model, serials), strict=True):
            yield leaf(serial, salt, word)


def _pairs(model: models.OpenModel, serials: range) -> Iterator[tuple[bytes, bytes]]:
    """Salt and own word of serials in a row: the salt is half a block of the keystream of the salts' key."""
    words = np.packbits(model.own_words(serials) < 0, axis=1)
    key = keys.derive(model.vault.master, model.name, "own salts").to_words()
    blocks = chacha.openssl(key, np.zeros(3, np.uint32), serials.start, len(serials) * chacha.BLOCK_WORDS)
    salts = blocks.reshape(len(serials), -1)[:, :8].astype("<u4").tobytes()
    for row, word in enumerate(words):
        yield salts[32 * row : 32 * row + 32], word.tobytes()
