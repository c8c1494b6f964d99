"""Documents of licences with something changed: refused in one sentence, or of the same meaning as before.

The quick form changes a thousand; ``SMARK_STRESS=full`` changes ten thousand. Many end at the parser or at a signature.
So the attacker, an owner or a customer, also signs what it changed with its own key, which leads to the later checks.
"""

import functools
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import licence_reference as reference
import numpy as np
import pytest
from licences import ARBITER, BUNDLE, CUSTOMER, MALLORY, OWNER, SUSPECT, challenge, model, offer, packed, resigned

from smark_jax import _documents, errors, files, licence
from smark_jax.licence import documents, requests

COUNT = 10_000 if os.environ.get("SMARK_STRESS") == "full" else 1_000
ODD: tuple[Any, ...] = (
    *(-1, 0, 1, 7, 2**31, 2**62, 2**63, 2**64, 1.5, float("nan"), True, None, [], {}, [[]], "", "00", "zz", "0" * 63),
    *("0" * 64, "f" * 64, "F" * 64, "00" * 64, "\u0660", "\ud800", "x" * 1000, "2026", "\x1b[31m\nA line of its own"),
    # The neutral element, a point of order 4, one of order 8, 2^255 - 18 for 1, and points off the curve.
    *("01" + "00" * 31, "00" * 31 + "80", "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    *("ee" + "ff" * 30 + "7f", "02" + "00" * 31, "01" + "00" * 30 + "80", reference.encode(reference.BASE).hex()),
)


class World(NamedTuple):
    """Two customers of one owner, all that they sent each other, and a second attempt of the first."""

    offers: list[licence.SignedOffer]
    made: list[requests.Made]
    packages: list[bytes]
    copy: dict[str, np.ndarray]
    asked: list[licence.Challenge]
    answers: list[documents.SignedAnswer]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    offers = [offer(), offer(customer="Bob", serial=4)]
    drawn = [(offers[0], CUSTOMER, 1), (offers[1], MALLORY, 1), (offers[0], CUSTOMER, 2)]
    made = [licence.request(*one, ARBITER.public) for one in drawn]
    packages = [packed(model(), one.request) for one in made]
    path = tmp_path_factory.mktemp("copy") / "copy.safetensors"
    licence.unpack(packages[0], made[0].request, made[0].secrets, "it", lambda form: path)
    asked = [challenge(one.request, one.pieces, 2) for one in made]
    people = zip(asked, made, (CUSTOMER, MALLORY, CUSTOMER), strict=True)
    answers = [licence.answer(one, BUNDLE, own.secrets.choices, who) for one, own, who in people]
    answers.append(licence.answer_deposit(asked[0], BUNDLE, ARBITER))
    return World(offers, made, packages, files.read(path).leaves, asked, answers)


def spots(value: Any) -> list[tuple[Any, Any]]:
    """All places in a JSON value: the list or dictionary, and the key."""
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(item, dict | list):
            found += spots(item)
    return found


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one or two places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2))):
        places = spots(value)
        if not places:
            return value
        inside, key = rng.choice(places)
        kind = rng.choice(("odd", "odd", "byte", "byte", "cut", "drop", "double", "swap", "nudge"))
        item = inside[key]
        if kind == "byte" and isinstance(item, str) and item:
            place = rng.randrange(len(item))
            inside[key] = item[:place] + rng.choice("0123456789abcdefgX") + item[place + 1 :]
        elif kind == "cut" and isinstance(item, str | list):
            inside[key] = item[: rng.randrange(len(item) + 1)]
        elif kind == "drop":
            del inside[key]
        elif kind == "double":
            if isinstance(inside, dict):
                inside[f"{key}2"] = item
            else:
                inside.insert(key, item)
        elif kind == "swap":
            other, place = rng.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                inside[key] = json.loads(json.dumps(other[place]))
        elif kind == "nudge" and type(item) is int:
            inside[key] = item + rng.choice((-1, 1, 8))
        else:
            inside[key] = rng.choice(ODD)
    return value


def bent(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changed, cut, doubled or moved."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(4):
        case 0:
            place = rng.randrange(len(content))
            return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        case 1:
            return content[:start]
        case 2:
            return content[:end] + content[start:]
        case _:
            return content[:start] + rng.randbytes(end - start) + content[end:]


def reread(kind: Any, document: Any, rng: random.Random) -> Any:
    """The document as its changed file is read."""
    text = documents.dumps(document)
    if rng.random() < 0.3:
        return documents.loads(kind, bent(text, rng), "the file")
    return documents.loads(kind, json.dumps(changed(json.loads(text), rng)).encode(), "the file")


def forged(kind: Any, document: Any, rng: random.Random) -> Any:
    """A part of a document that its author changed, if it can still be written."""
    try:
        return _documents.parse(kind, changed(_documents.plain(document), rng))
    except _documents.Wrong as error:
        raise errors.SmarkError(f"licence: expected a document, but got one whose {error}.") from None


@functools.cache
def is_point(text: str) -> bool:
    return reference.is_point(bytes.fromhex(text))


def fine_offer(one: licence.Offer) -> bool:
    n, parts = one.num_segments, one.num_parts
    return is_point(one.point) and 64 <= n <= 65536 and 1 <= parts <= min(n, 256) and n % parts == 0


def offers(world: World, rng: random.Random) -> str:
    """Read by a customer."""
    one = rng.choice(world.offers)
    if rng.random() < 0.4:
        found = reread(documents.SignedOffer, one, rng)
        licence.check_offer(found)
        assert found == one
        return "the same"
    who = rng.choice((OWNER, OWNER, MALLORY))
    plain = forged(documents.Offer, one.offer, rng)
    licence.check_offer(licence.sign_offer(plain, who.signing))
    assert plain.public_key == who.public.identity and fine_offer(plain)
    return "another good one"


def requested(world: World, rng: random.Random) -> str:
    """Read by an owner."""
    one, other = rng.sample(world.made, 2)
    pieces = tuple(piece.hex() for piece in one.pieces)
    whole = documents.RequestFile(one.request, pieces)
    if rng.random() < 0.3:
        found = reread(documents.RequestFile, whole, rng)
        licence.check(found.request, [bytes.fromhex(piece) for piece in found.pieces])
        assert found == whole
        return "the same"
    signed, sent = one.request, one.pieces
    if rng.random() < 0.4:  # parts of two
        part, theirs = rng.choice(("offer", "signature", "request", "pieces", "all")), other.request
        if part == "pieces":
            sent = rng.choice((other.pieces, sent[::-1], sent[1:], ()))
        elif part == "all":
            plain = signed.request._replace(**{name: getattr(theirs.request, name) for name in rng.sample(FIELDS, 2)})
            signed = signed._replace(request=plain)
        else:
            signed = signed._replace(**{part: getattr(theirs, part)})
        licence.check(signed, sent)
        assert (signed, sent) == (one.request, one.pieces)
        return "the same"
    who = rng.choice((CUSTOMER, MALLORY))
    plain = forged(documents.Request, signed.request, rng)
    if rng.random() < 0.5:
        plain = plain._replace(identity=who.public.identity)
    licence.check(signed._replace(request=plain, signature=documents.sign(who.signing, plain)), sent)
    points = [plain.points[i : i + 64] for i in range(0, len(plain.points), 64)]
    assert plain.identity == who.public.identity and plain.offer == documents.digest(signed.offer.offer)
    assert plain.attempt >= 1 and len(points) == 64 == len(set(points)) and is_point(plain.rest)
    true = signed.request.points
    assert all(is_point(point) for i, point in enumerate(points) if point != true[64 * i : 64 * i + 64])
    assert plain.deposit and plain.deposit.pieces == tuple(documents.sha256(piece) for piece in sent)
    return "another good one"


FIELDS = [name for name in documents.Request._fields if name != "created"]


def package(world: World, rng: random.Random, path: Path) -> str:
    """Opened by the first customer."""
    made, content = world.made[0], world.packages[0]
    match rng.choice(("bent", "other", "head", "head", "body")):
        case "bent":
            content = bent(content, rng)
        case "other":
            content = rng.choice(world.packages[1:])
        case "head":
            who = rng.choice((OWNER, OWNER, OWNER, MALLORY))
            content = resigned(content, lambda head, body: (forged(documents.Package, head, rng), body), who, keep=True)
        case _:
            content = resigned(content, lambda head, body: (head, bent(body, rng)))
    licence.unpack(content, made.request, made.secrets, "it", lambda form: path)
    found = files.read(path).leaves
    assert found.keys() == world.copy.keys()
    assert all(np.array_equal(found[name], leaf) for name, leaf in world.copy.items())
    return "the same"


def challenged(world: World, rng: random.Random) -> str:
    """Read by an accused."""
    one, other = rng.sample(world.asked, 2)
    if rng.random() < 0.3:
        name = rng.choice(documents.Challenge._fields)
        found = one._replace(**{name: getattr(other, name)})
    else:
        found = forged(documents.Challenge, one, rng)
    licence.check_challenge(found, SUSPECT)
    assert found.request == one.request  # which is signed; the keys and what was opened before are the owner's word
    earlier = [item.part for item in found.earlier]
    left = [part for part in licence.order(SUSPECT, found.request) if part not in earlier]
    assert set(earlier) <= set(range(8)) and len(set(earlier)) == len(earlier)
    assert list(found.parts) == left[: len(found.parts)] and len(found.keys) == len(found.parts) > 0
    made = next(made for made in world.made if made.request == found.request)
    assert found.pieces in ((), tuple(made.pieces[part].hex() for part in found.parts))
    return "another good one"


def answered(world: World, rng: random.Random) -> str:
    """Read by anybody who verifies the first customer's answer, or its arbiter's."""
    number = rng.choice((0, 3))
    asked, signed, bundle = world.asked[0], world.answers[number], BUNDLE
    who = (CUSTOMER, None, None, ARBITER)[number]
    other = rng.choice(world.answers)
    match rng.choice(("file", "mixed", "signed", "signed", "asked")):
        case "file":
            (signed, *_) = reread(documents.AnswerFile, documents.AnswerFile((signed,)), rng).answers or (other,)
        case "mixed":
            plain, signature = rng.choice(((other.answer, signed.signature), (signed.answer, other.signature), other))
            signed = documents.SignedAnswer(plain, signature)
        case "asked":
            asked, bundle = rng.choice([(world.asked[1], bundle), (world.asked[2], bundle), (asked, "ee" * 32)])
        case _:
            author = rng.choice((who, who, MALLORY))
            if rng.random() < 0.3:  # the other choice
                first, *others = signed.answer.opened
                bits = (int(first.bits, 16) ^ 1 << rng.randrange(8)).to_bytes(1, "big").hex()
                plain = signed.answer._replace(opened=(first._replace(bits=bits), *others))
            else:
                plain = forged(documents.Answer, signed.answer, rng)
            if rng.random() < 0.3:
                plain = plain._replace(opened=plain.opened[::-1])
            signed = documents.SignedAnswer(plain, documents.sign(author.signing, plain))
    found = licence.opened_word(asked, signed, bundle)
    parts = requests.parts(asked.request.request, asked.request.offer.offer)
    word = world.made[0].secrets.choices.word
    assert asked == world.asked[0] and found.keys() == set(asked.parts)
    assert all((chips == word[parts.of_part(part)]).all() for part, chips in found.items())
    return "the same"


def test_changed_documents_are_refused_or_mean_what_they_meant(world, tmp_path):
    rng, ends = random.Random(0), Counter()
    targets = [offers, requested, challenged, answered, functools.partial(package, path=tmp_path / "copy.safetensors")]
    names = ["offer", "request", "challenge", "answer", "package"]
    for number in range(COUNT):
        target = number % len(targets)
        try:
            end = targets[target](world, rng)
        except errors.SmarkError as error:
            text, end = str(error), "refused"
            assert text.count("\n") <= 1 and text.count("expected ") == 1, text
            assert text.isprintable() or ("\n" in text and all(line.isprintable() for line in text.split("\n")))
        ends[names[target], end] += 1
    assert sum(ends.values()) == COUNT
    print(dict(sorted(ends.items())))
    for name in names:  # the control: each kind is mostly refused, and what is not is seen to mean what it meant
        assert ends[name, "refused"] > 0.4 * COUNT / len(names)
    assert all(ends[name, end] for name, end in (("offer", "another good one"), ("package", "the same")))
