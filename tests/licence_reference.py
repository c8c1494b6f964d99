"""The licences' protocol as ``docs/reference/licence-protocol.md`` states it, in integers and by OpenSSL's ciphers.

It imports nothing of smark_jax, and not libsodium, whose points the product has.
"""

import hashlib
import json
import math

import numpy as np
import reference
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

PRIME, ORDER = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, PRIME) % PRIME
_ROOT = pow(2, (PRIME - 1) // 4, PRIME)

Point = tuple[int, int]
NEUTRAL: Point = (0, 1)


def add(one: Point, other: Point) -> Point:
    """The sum on -x^2 + y^2 = 1 + d x^2 y^2, whose formula has no exceptions."""
    (a, b), (c, d) = one, other
    k = _D * a * b * c * d % PRIME
    return (
        (a * d + b * c) * pow(1 + k, -1, PRIME) % PRIME,
        (b * d + a * c) * pow(1 - k, -1, PRIME) % PRIME,
    )


def negative(point: Point) -> Point:
    return -point[0] % PRIME, point[1]


def times(number: int, point: Point) -> Point:
    found = NEUTRAL
    for bit in f"{number:b}":
        found = add(found, found)
        found = add(found, point) if bit == "1" else found
    return found


def encode(point: Point) -> bytes:
    """RFC 8032, section 5.1.2."""
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def decode(text: bytes) -> Point | None:
    """RFC 8032, section 5.1.3; None where there is no such point, or this is not its canonical encoding."""
    whole = int.from_bytes(text, "little")
    y, odd = whole & (1 << 255) - 1, whole >> 255
    square = (y * y - 1) * pow(_D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    x = x * _ROOT % PRIME if (x * x - square) % PRIME else x
    if len(text) != 32 or y >= PRIME or (x * x - square) % PRIME or (x == 0 and odd):
        return None
    return (x if x & 1 == odd else PRIME - x), y


def is_point(text: bytes) -> bool:
    point = decode(text)
    return point not in (None, NEUTRAL) and times(ORDER, point) == NEUTRAL


_Y = 4 * pow(5, -1, PRIME) % PRIME
BASE = decode(_Y.to_bytes(32, "little"))
assert BASE


def derive(key: bytes, *labels: str) -> bytes:
    joined = b"".join(len(label).to_bytes(4, "big") + label.encode() for label in labels)
    return reference.hkdf_sha256(key, b"smark-jax v1" + joined)


def scalar(key: bytes) -> int:
    """The owner's a."""
    return int.from_bytes(derive(key, "transfer", "low") + derive(key, "transfer", "high"), "little") % ORDER


def numbered(label: str, number: int = 0) -> int:
    """The scalar of a test vector."""
    return int.from_bytes(hashlib.sha512(f"{label} {number}".encode()).digest(), "little") % ORDER


def message(kind: str, content: dict) -> bytes:
    return f"smark licence v1 {kind}\n".encode() + json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def transfer_key(context: bytes, number: int, owner: bytes, sent: bytes, shared: bytes) -> bytes:
    start = b"smark licence transfer v1" + len(context).to_bytes(4, "big") + context + number.to_bytes(4, "big")
    return hashlib.sha256(start + owner + sent + shared).digest()


def stream(key: bytes, nonce: int, size: int) -> bytes:
    """ChaCha20's keystream (RFC 8439) from block 0; the nonce's first word is ``nonce``, its others are 0."""
    start = bytes(4) + nonce.to_bytes(4, "little") + bytes(8)
    return Cipher(algorithms.ChaCha20(key, start), None).encryptor().update(bytes(size))


def permutations(seed: bytes, label: str, count: int, size: int) -> list[list[int]]:
    """The numbers below ``size`` in the order of random numbers, ``count`` times."""
    key = hashlib.sha256(b"smark licence segments v1 " + label.encode() + seed).digest()
    low = (1 << max(1, (size - 1).bit_length())) - 1
    a_pass, found = max(1, 2**20 // size), []
    for number in range(count):
        text = stream(key, number // a_pass, 8 * size * (number % a_pass + 1))[-8 * size :]
        drawn = [int.from_bytes(text[8 * i : 8 * i + 8], "little") & ~low | i for i in range(size)]
        found.append([one & low for one in sorted(drawn)])
    return found


def segments(seed: bytes, coordinates: int, number: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The segment of each coordinate, and the part of each segment."""
    rows = permutations(seed, "members", math.ceil(coordinates / number), number)
    part_of = np.empty(number, int)
    for place, segment in enumerate(permutations(seed, "parts", 1, number)[0]):
        part_of[segment] = place % parts
    return np.concatenate(rows)[:coordinates], part_of


def signs(part_of: np.ndarray, part_keys: list[bytes]) -> np.ndarray:
    """Of all coordinates, whose parts are given."""
    found = np.empty(len(part_of))
    for part, key in enumerate(part_keys):
        here = np.flatnonzero(part_of == part)
        text = stream(key, 0, 4 * math.ceil(len(here) / 32))
        found[here] = [1 - 2 * (text[i // 8] >> i % 8 & 1) for i in range(len(here))]
    return found


def owners_change(carrier, word: np.ndarray, strength: float) -> np.ndarray:
    """What the owner's word adds in units of the scales, coordinate by coordinate, in float64."""
    matrix = reference.carrier_matrix(*map(np.asarray, carrier.arrays), carrier.num_weights)
    return strength * math.sqrt(carrier.num_carrying / len(word)) * word.astype(np.float64) @ matrix
