"""Malicious owners who run the whole protocol: requests, packages, challenges, answers.

*Grinders* draw a million suspects until the hash names parts in the order they like, and a million keys until the signs
of a part fit what they hope for. *Spoilers* send packages with damaged variants, learn what survival tells, and name a
suspect with these variants and a few guesses. Both then replay old answers and ask for parts again.
"""

import hashlib
import math
from typing import Any

import numpy as np

from experiments.common import sections
from experiments.licence import owners, parties
from smark_jax import carriers, errors, extraction, keys, licence
from smark_jax.licence import conviction, documents, packages, requests, segments, variants

_FEW_SEGMENTS, _FEW_PARTS = 256, 2
_SPOILED = 2
_MOST_ATTEMPTS = 6
_PASS = 50_000
_HEAD = len(b"smark licence package v1\n")


def run(config: Any, seed: int, meter: sections.Meter) -> sections.Result:
    """Both kinds of owners; see :class:`experiments.licence.framing.Config`."""
    owner = parties.identity(seed, "owner")
    counts = {"tried": 0, "replayed": 0, "asked": 0}
    spoiled = {"packages": 0, "damaged": 0}
    ground = known = framed = 0
    for number in range(config.grinders):
        rng = np.random.default_rng([seed, 2000, number])
        one = meter.part(f"grinder_{number}", 0, lambda rng=rng: _grind(owner, rng, config))
        ground, known = ground + one["framed"], known + one["known"]
        _add(counts, one["refused"])
        meter.step("grinds tokens and keys")
    for number in range(config.spoilers):
        rng = np.random.default_rng([seed, 3000, number])
        one = meter.part(f"spoiler_{number}", 0, lambda rng=rng: _spoil(owner, rng, config.alpha))
        framed += one["framed"]
        _add(counts, one["refused"])
        _add(spoiled, one["spoiled"])
        meter.step("spoils packages, whole protocol")
    rows = [
        {"name": f"grinds {config.tokens:,} suspects and keys", "owners": config.grinders, "framed": ground},
        {"name": "spoils packages, whole protocol", "owners": config.spoilers, "framed": framed},
    ]
    return {"rows": rows, "known": known, "refused": counts, "spoiled": spoiled}


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for name, number in more.items():
        counts[name] += number


def _grind(owner: licence.Identity, rng: np.random.Generator, config: Any) -> dict[str, Any]:
    """Disputes about suspects and keys that were picked among many; ``known``: keys picked by the word itself."""
    key = keys.new()
    signed = parties.offer(owner, key, config.num_segments, config.num_parts)
    party = parties.agree(signed, key, licence.Identity(keys.new()))
    suspects = _favourite_suspects(party, config.tokens, rng)
    hoped = rng.choice([-1, 1], config.num_segments // config.num_parts)
    z = ground(hoped, config.tokens, rng)
    level, framed, earlier = math.log10(config.alpha), False, ()
    words: list[np.ndarray] = []
    for number in range(config.num_parts):
        suspect = suspects[number % len(suspects)]
        asked = parties.challenge(party, suspect, earlier)
        (part,) = asked.parts
        word = parties.answered(party, asked, suspect, documents.sha256(b"%d" % number))[part]
        found = conviction.test(z, word, config.num_parts, 1, config.num_segments)
        framed |= found.log10_p <= level
        words.append(word)
        earlier = (*earlier, documents.Earlier(part, documents.sha256(b"%d" % number)))
    seen = conviction.test(ground(words[0], config.tokens, rng), words[0], config.num_parts, 1, config.num_segments)
    return {"framed": bool(framed), "known": bool(seen.log10_p <= level), "refused": _again(party, earlier)}


def _favourite_suspects(party: parties.Party, tokens: int, rng: np.random.Generator) -> list[str]:
    """Of many suspects' hashes, those under which the parts come in increasing order, or nearly so."""
    digest = bytes.fromhex(documents.digest(party.signed.request))
    start, best, found = rng.bytes(24), 0, [documents.sha256(rng.bytes(32))]
    for number in range(tokens):
        suspect = hashlib.sha256(start + number.to_bytes(8, "big")).digest()
        before, length = b"", 0
        while length < party.signed.offer.offer.num_parts:
            text = b"smark licence parts v1" + suspect + digest + length.to_bytes(4, "big")
            following = hashlib.sha256(text).digest()
            if following < before:
                break
            before, length = following, length + 1
        if length > best:
            best, found = length, []
        if length == best:
            found.append(suspect.hex())
    return found


def ground(wanted: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Of the signs that many keys give a part, one coordinate a segment, those that agree best with what is wanted.

    A key's signs are a keystream of their own: here, random bytes.
    """
    packed, most, best = np.packbits(wanted > 0), -1, wanted
    for start in range(0, tokens, _PASS):
        rows = min(_PASS, tokens - start)
        bits = np.frombuffer(rng.bytes(rows * len(packed)), np.uint8).reshape(rows, -1)
        differ = np.bitwise_count(bits ^ packed).sum(axis=1, dtype=np.int64)
        far = np.abs(2 * differ - len(wanted))  # the test is two-sided
        if far.max() > most:
            most = int(far.max())
            best = 2.0 * np.unpackbits(bits[far.argmax()], count=len(wanted)) - 1
    return best.astype(float)


def _again(party: parties.Party, earlier: tuple[documents.Earlier, ...]) -> dict[str, int]:
    """Tries an old answer under a new bundle, and a challenge for a part that its own list calls open."""
    suspect, bundle = documents.sha256(b"again"), documents.sha256(b"new bundle")
    asked = parties.challenge(party, suspect)
    old = licence.answer(asked, documents.sha256(b"0"), party.secrets.choices, party.customer)
    replayed = _refused(lambda: licence.opened_word(asked, old, bundle))
    again = asked._replace(earlier=(*(one for one in earlier if one.part == asked.parts[0]),))
    return {
        "tried": 1,
        "replayed": int(replayed),
        "asked": int(_refused(lambda: licence.check_challenge(again, suspect))),
    }


def _refused(act: Any) -> bool:
    try:
        act()
    except errors.SmarkError:
        return True
    return False


def _spoil(owner: licence.Identity, rng: np.random.Generator, alpha: float) -> dict[str, Any]:
    """Spoils until a word survives or the customer gives up, and takes the customer to court about every part."""
    base = {"kernel": rng.normal(size=(64, 64)).astype(np.float32)}
    mark, word = carriers.mark(keys.new(), base, 64), rng.choice([-1, 1], 64)
    key = keys.new()
    signed = parties.offer(owner, key, _FEW_SEGMENTS, _FEW_PARTS)
    customer = licence.Identity(keys.new())
    party = parties.agree(signed, key, customer)
    damaged, told = 0, (np.empty(0, int), np.empty(0, int))
    for attempt in range(1, _MOST_ATTEMPTS + 1):
        if attempt > 1:
            party = parties.agree(signed, key, customer, attempt)
        which, kept = rng.choice(_FEW_SEGMENTS, _SPOILED, replace=False), rng.integers(0, 2, _SPOILED)
        content = licence.package(party.signed, base, mark, word, key, owner.signing)
        if opens(spoil(content, party, owner, which, kept), party):
            told = which, kept
            break
        damaged += 1
    spoiled = {"packages": damaged + bool(len(told[0])), "damaged": damaged}
    return {"spoiled": spoiled, **_accuse(party, base, mark, told, rng, alpha)}


def spoil(content: bytes, party: parties.Party, owner: licence.Identity, which: np.ndarray, kept: np.ndarray) -> bytes:
    """A package of which one variant of each of these segments is damaged, signed anew.

    Args:
      content: a whole package of one float32 leaf.
      party: whose it is.
      owner: signs it.
      which: segments.
      kept: of each, the variant that stays whole, 0 or 1.
    """
    plain, request = party.signed.offer.offer, party.signed.request
    opened = packages.head(content, plain.public_key, documents.digest(request), "package")
    leaves = opened.package.leaves
    total = sum(place.held for place in leaves)
    found = segments.draw(requests.seed(request), total, plain.num_segments, plain.num_parts)
    lengths = 4 * np.bincount(found.members, minlength=found.number) + 16
    begins = sum(opened.package.pieces) + 16 * len(opened.package.pieces) + 2 * (np.cumsum(lengths) - lengths)
    body = bytearray(content[opened.start :])
    for segment, bit in zip(which.tolist(), kept.tolist(), strict=True):
        body[int(begins[segment] + (1 - bit) * lengths[segment])] ^= 1
    changed = opened.package._replace(body=documents.sha256(bytes(body)))
    head = documents.dumps(documents.SignedPackage(changed, documents.sign(owner.signing, changed)))
    return content[:_HEAD] + len(head).to_bytes(4, "big") + head + bytes(body)


def opens(content: bytes, party: parties.Party) -> bool:
    """Whether the customer can open a package; False when it is refused as damaged."""
    try:
        parties.opened(content, party)
    except packages.Damaged:
        return False
    return True


def _accuse(
    party: parties.Party,
    base: dict[str, np.ndarray],
    mark: carriers.Mark,
    told: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    alpha: float,
) -> dict[str, Any]:
    """Names a suspect that carries what survival told, and guesses in further segments; one dispute about each part."""
    found, attempt = parties.divided(party, mark), party.signed.request.attempt
    part_keys = parties.part_keys_of(party)
    signs, strength = segments.all_signs(found, part_keys), float(mark.strength)
    bits = np.full(found.number, -1)
    bits[told[0]] = told[1]
    for part in range(_FEW_PARTS):
        numbers = rng.permutation(found.of_part(part))
        more = owners.enough(alpha, _FEW_PARTS, attempt) - int((bits[numbers] >= 0).sum())
        bits[numbers[bits[numbers] < 0][: max(0, more)]] = rng.integers(0, 2, max(0, more))
    cut, whole = (variants.cut(base, mark, found, signs, size) for size in (strength, 0.0))
    chosen = [(cut if bit >= 0 else whole).variants[n][max(bit, 0)] for n, bit in enumerate(bits.tolist())]
    suspect = variants.join(whole.rest, whole.places, whole.bases, chosen, found)
    values = licence.shifts(extraction.shifts(suspect, base, mark), mark)
    framed, earlier, about = False, (), documents.sha256(suspect["kernel"].tobytes())
    for number in range(_FEW_PARTS):
        asked = parties.challenge(party, about, earlier)
        bundle = documents.sha256(b"%d" % number)
        found_guilty = licence.convict(values, asked, parties.answered(party, asked, about, bundle))
        framed |= found_guilty.log10_p <= math.log10(alpha)
        earlier = (*earlier, documents.Earlier(asked.parts[0], bundle))
    return {"framed": bool(framed), "refused": _again(party, earlier)}
