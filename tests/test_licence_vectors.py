"""The vectors of ``docs/reference/licence-protocol.md``: ours, and those of another implementation of that page."""

import hashlib
import math
import re
from pathlib import Path

import licence_reference as reference
import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy import stats

from smark_jax import keys, licence
from smark_jax.licence import conviction, deposits, documents, group, issuing, packages, requests, segments, transfer

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "licence-protocol.md"
N, PARTS, COORDINATES, SUSPECT, BUNDLE = 64, 8, 200, "ab" * 32, "cd" * 32
OFFER_KEY, OWNER, CUSTOMER, ARBITER = (bytes(range(start, start + 32)) for start in (0, 32, 64, 96))
TIME = "2026-11-28T10:00:00Z"
SCALARS = [reference.numbered("scalar", i) for i in range(N)]
BITS = [hashlib.sha256(f"choice {i}".encode()).digest()[0] & 1 for i in range(N)]


def ephemeral(part: int) -> bytes:
    return hashlib.sha256(f"ephemeral {part}".encode()).digest()


def written() -> dict[str, str]:
    """The vectors on the page: lines of a name, an equals sign and a value."""
    block = PAGE.read_text().partition("```vectors\n")[2].partition("```")[0]
    return dict(line.split(" = ", 1) for line in block.splitlines())


def little(number: int) -> bytes:
    return number.to_bytes(32, "little")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def independent() -> dict[str, str]:
    """All vectors, by :mod:`licence_reference`, hashlib and OpenSSL."""
    found: dict[str, str] = {}
    owner = Ed25519PrivateKey.from_private_bytes(OWNER)
    signer, judge = (
        Ed25519PrivateKey.from_private_bytes(reference.derive(s, "licence signing")) for s in (CUSTOMER, ARBITER)
    )
    opener = X25519PrivateKey.from_private_bytes(reference.derive(ARBITER, "licence deposits"))
    public = {
        who: key.public_key().public_bytes_raw()
        for who, key in (("o", owner), ("c", signer), ("a", judge), ("d", opener))
    }
    a = reference.scalar(OFFER_KEY)
    big_a = reference.times(a, reference.BASE)
    found["a"], found["A"] = little(a).hex(), reference.encode(big_a).hex()
    offer = {
        "created": TIME, "model": "m", "customer": "Ann", "serial": 3, "number": 1, "root": "00" * 32,
        "public_key": public["o"].hex(), "point": found["A"], "num_segments": N, "num_parts": PARTS,
    }  # fmt: skip
    text = reference.message("offer", offer)
    found["offer"], found["offer signature"] = sha256(text), owner.sign(text).hex()
    own = [reference.times(b, reference.BASE) for b in SCALARS]
    points = [reference.add(point, big_a) if bit else point for point, bit in zip(own, BITS, strict=True)]
    sent = [reference.encode(point) for point in points]
    found |= {"B_0": sent[0].hex(), "B_1": sent[1].hex(), "points": sha256(b"".join(sent))}
    rest = reference.numbered("rest")
    request = {
        "created": TIME, "offer": found["offer"], "attempt": 1, "identity": public["c"].hex(),
        "points": b"".join(sent).hex(), "rest": reference.encode(reference.times(rest, reference.BASE)).hex(),
    }  # fmt: skip
    bare = hashlib.sha256(reference.message("request", request)).digest()
    seed = hashlib.sha256(bytes.fromhex(found["offer"]) + b"".join(sent)).digest()
    members, part_of = reference.segments(seed, COORDINATES, N, PARTS)
    found |= {"seed": seed.hex(), "members": str(members[:8].tolist()), "parts": str(part_of[:8].tolist())}
    found["all members"] = sha256(members.astype("<u2").tobytes())
    pieces = []
    for part in range(PARTS):
        secret = X25519PrivateKey.from_private_bytes(ephemeral(part))
        ours, held = secret.public_key().public_bytes_raw(), np.flatnonzero(part_of == part)
        info = b"smark licence deposit v1" + ours + public["d"] + bare + part.to_bytes(4, "big")
        shared = secret.exchange(X25519PublicKey.from_public_bytes(public["d"]))
        openings = b"".join(little(SCALARS[i]) for i in held) + np.packbits([BITS[i] for i in held]).tobytes()
        key = HKDF(hashes.SHA256(), 32, None, info).derive(shared)
        pieces.append(ours + ChaCha20Poly1305(key).encrypt(bytes(12), ephemeral(part) + openings, None))
    found |= {"without deposit": bare.hex(), "sealed part 0": sha256(pieces[0])}
    arbiter = {"identity": public["a"].hex(), "deposits": public["d"].hex()}
    request["deposit"] = {"arbiter": arbiter, "pieces": [sha256(piece) for piece in pieces]}
    text = reference.message("request", request)
    found["request"], found["request signature"] = sha256(text), signer.sign(text).hex()
    context = bytes.fromhex(found["request"])
    shared = reference.times(a, points[0])
    for bit, point in enumerate((shared, reference.add(shared, reference.negative(reference.times(a, big_a))))):
        key = reference.transfer_key(context, 0, bytes.fromhex(found["A"]), sent[0], reference.encode(point))
        found[f"k_0^{bit}"] = key.hex()
    mine = reference.encode(reference.times(SCALARS[0], big_a))
    assert reference.transfer_key(context, 0, bytes.fromhex(found["A"]), sent[0], mine).hex() == found[f"k_0^{BITS[0]}"]
    key = bytes.fromhex(found["k_0^0"])
    found["sealed"] = ChaCha20Poly1305(key).encrypt(bytes(12), b"weights", None).hex()
    shared = reference.encode(reference.times(a * rest % reference.ORDER, reference.BASE))
    found["rest key"] = reference.derive(shared, "licence rest", found["request"]).hex()
    part_keys = [reference.derive(OFFER_KEY, "part", found["request"], str(part)) for part in range(PARTS)]
    signs = reference.signs(part_of[members], part_keys)
    found |= {"part key 0": part_keys[0].hex(), "signs": "".join("+-"[int(sign < 0)] for sign in signs[:32])}
    about = b"smark licence parts v1" + bytes.fromhex(SUSPECT) + context
    order = sorted(range(PARTS), key=lambda part: hashlib.sha256(about + part.to_bytes(4, "big")).digest())
    found["order"] = str(order)
    held = np.flatnonzero(part_of == order[0])
    opened = {"part": order[0], "scalars": b"".join(little(SCALARS[i]) for i in held).hex()}
    opened["bits"] = np.packbits([BITS[i] for i in held]).tobytes().hex()
    answer = {
        "created": TIME,
        "bundle": BUNDLE,
        "request": found["request"],
        "key": public["c"].hex(),
        "opened": [opened],
    }
    text = reference.message("answer", answer)
    found["answer"], found["answer signature"] = sha256(text), signer.sign(text).hex()
    t, u = math.sqrt(32), np.ones(32) / math.sqrt(32)
    tail = min(
        stats.norm.logsf(t) - math.log(4) - stats.norm.logsf(math.sqrt(2)), reference.reference.chernoff_log(t, u)
    )
    found["log10 p"] = f"{(math.log(2) + tail + math.log(PARTS * 2 * 3)) / math.log(10):.6f}"
    return found


def product() -> dict[str, str]:
    """All vectors, by smark_jax."""
    found: dict[str, str] = {}
    key, owner = keys.from_bytes(OFFER_KEY), Ed25519PrivateKey.from_private_bytes(OWNER)
    customer, arbiter = (licence.Identity(keys.from_bytes(secret)) for secret in (CUSTOMER, ARBITER))
    point = group.times_base(licence.scalar(key))
    found |= {"a": licence.scalar(key).hex(), "A": point.hex()}
    public = owner.public_key().public_bytes_raw().hex()
    offer = licence.sign_offer(licence.Offer(TIME, "m", "Ann", 3, 1, "00" * 32, public, point.hex(), N, PARTS), owner)
    found |= {"offer": documents.digest(offer.offer), "offer signature": offer.signature}
    choices = transfer.Choices(b"".join(map(little, SCALARS)), 1 - 2 * np.array(BITS, np.int8))
    sent, rest = transfer.points(choices, point), little(reference.numbered("rest"))
    found |= {"B_0": sent[:32].hex(), "B_1": sent[32:64].hex(), "points": sha256(sent)}
    rest_point = group.times_base(rest).hex()
    plain = licence.Request(TIME, found["offer"], 1, customer.public.identity, sent.hex(), rest_point)
    parts = segments.draw(requests.seed(plain), COORDINATES, N, PARTS)
    found |= {"seed": requests.seed(plain).hex(), "members": str(parts.members[:8].tolist())}
    found |= {"parts": str(parts.parts[:8].tolist()), "all members": sha256(parts.members.astype("<u2").tobytes())}
    bare = requests.undeposited(plain)
    pieces = [
        deposits.seal(arbiter.public, bare, part, requests.openings(choices, parts.of_part(part)), ephemeral(part))
        for part in range(PARTS)
    ]
    found |= {"without deposit": bare.hex(), "sealed part 0": sha256(pieces[0])}
    plain = plain._replace(deposit=documents.Deposit(arbiter.public, tuple(map(sha256, pieces))))
    request = licence.SignedRequest(offer, plain, documents.sign(customer.signing, plain))
    licence.check(request, pieces)
    digest = documents.digest(plain)
    found |= {"request": digest, "request signature": request.signature}
    both = transfer.owner_keys(licence.scalar(key), sent, bytes.fromhex(digest))[0]
    found |= {f"k_0^{bit}": one.to_bytes().hex() for bit, one in enumerate(both)}
    assert transfer.customer_keys(choices, point, sent, bytes.fromhex(digest))[0] == both[BITS[0]]
    found["sealed"] = packages._sealed(both[0], b"weights").hex()
    found["rest key"] = issuing._rest_key(group.times(rest, point), bytes.fromhex(digest)).to_bytes().hex()
    part_keys = segments.part_keys(key, digest, PARTS)
    signs = segments.all_signs(parts, part_keys)
    found |= {"part key 0": part_keys[0].to_bytes().hex(), "signs": "".join("+-"[int(sign < 0)] for sign in signs[:32])}
    order = licence.order(SUSPECT, request)
    found["order"] = str(order)
    asked = licence.Challenge(request, (order[0],), (part_keys[order[0]].to_bytes().hex(),), ())
    answer = licence.answer(asked, BUNDLE, choices, customer)
    found |= {"answer": documents.digest(answer.answer), "answer signature": answer.signature}
    found["log10 p"] = f"{conviction.test(np.ones(32), np.ones(32), PARTS, 2, N).log10_p:.6f}"
    return found


@pytest.fixture
def at_that_time(monkeypatch):
    monkeypatch.setattr("smark_jax._documents.now", lambda: TIME)


def test_the_vectors_of_the_page_are_those_of_another_implementation():
    assert independent() == written()


def test_the_vectors_of_the_page_are_ours(at_that_time):
    assert product() == written()


def test_the_second_implementation_has_the_published_group():
    """RFC 8032: the base point's order and encoding, and a key pair of its section 7.1."""
    assert reference.encode(reference.BASE).hex() == "58" + "66" * 31
    assert reference.times(reference.ORDER, reference.BASE) == reference.NEUTRAL
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    half = bytearray(hashlib.sha512(seed).digest()[:32])
    half[0], half[31] = half[0] & 248, half[31] & 63 | 64
    public = reference.encode(reference.times(int.from_bytes(half, "little"), reference.BASE))
    assert public.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def test_the_page_names_what_is_hashed():
    """Every label of the package's source stands on the page."""
    folder = Path(licence.__file__).parent
    labels = {one for path in folder.glob("*.py") for one in re.findall(r'b"(smark licence [\w ]+)', path.read_text())}
    assert len(labels) == 5
    assert all(label.strip() in PAGE.read_text() for label in labels)
