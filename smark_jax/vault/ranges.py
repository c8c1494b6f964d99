"""Checks the ranges of a bundle's numbers, since an owner can sign and commit to any number."""

import math
from collections.abc import Iterator

from smark_jax.vault.documents import Bundle, Missing

LARGEST_ALPHA = 1e-3
"""The highest committed level that an arbiter accepts by default."""
# More than the longest honest bundle needs, but few enough not to keep an arbiter's computer busy for long.
_MOST_COMMITMENTS, _MOST_STAMPS, _MOST_MULTIPLICATIONS = 10_000, 100, 10**10
_ANY = 2.0**63


def level(bundle: Bundle, largest_alpha: float) -> str | None:
    """What is wrong with the committed alpha; None when it is above 0 and at most ``largest_alpha``."""
    alpha = bundle.header.alpha
    if not 0 < alpha <= largest_alpha:
        return f"alpha is {alpha:g}: more than 0 and at most {largest_alpha:g} is allowed"
    return None


def numbers(bundle: Bundle) -> str | None:
    """Describes the first number of a bundle that is out of range; None when all are in range."""
    for name, value, least, most in (*_of_model(bundle), *_of_commitments(bundle), *_of_claims(bundle)):
        if not least <= value <= most:
            bound = f"from {least:g} to {most:g}" if most < _ANY else f"at least {least:g}"
            return f"{name} is {value:g}: it should be {bound}"
    if not bundle.header.strength > 0 or not all(scale > 0 for _, _, scale in bundle.spec):
        return "strength or the scale of a leaf is not above 0"
    work = sum(bundle.header.num_chips * len(claim.support) ** 2 for claim in bundle.accused)
    if work > _MOST_MULTIPLICATIONS:
        return f"the accusations take {work:g} multiplications: at most {_MOST_MULTIPLICATIONS:g} are made"
    return None


_Range = tuple[str, float, float, float]
"""A number's name, the number, its minimum and its maximum."""


def _of_model(bundle: Bundle) -> Iterator[_Range]:
    for path, shape, _ in bundle.spec:
        for length in shape:
            yield f"a length of {path[:40]!r}", length, 1, _ANY
    suspect = bundle.suspect
    yield "log_maps", suspect.log_maps or 0, 0, _ANY
    if not isinstance(suspect.reading.readout, Missing):
        yield "readout", suspect.reading.readout, 1, _ANY
    for left in suspect.left_out or ():
        yield "the weights left out of a leaf", left.weights, 0, _ANY
    yield "num_chips", bundle.header.num_chips, 1, sum(math.prod(shape) for _, shape, _ in bundle.spec)
    yield "num_suspects", bundle.num_suspects, 1, _ANY
    yield "num_alignments", bundle.num_alignments, 1, _ANY
    yield "num_customers", bundle.customers, 1, _ANY
    yield "number of the verdict", bundle.verdict.number, 1, _ANY
    yield "occasion of the verdict", bundle.verdict.occasion, 1, _ANY


def _of_commitments(bundle: Bundle) -> Iterator[_Range]:
    chain = bundle.chain
    yield "the number of commitments", len(chain), 1, _MOST_COMMITMENTS
    for item in chain:
        header = item.commitment.header
        yield "customers of the commitment", header.customers, 1, _ANY
        yield "number of the commitment", header.number, 1, _ANY
        if not isinstance(header.decoder_version, Missing):
            yield "decoder_version of the commitment", header.decoder_version, 1, _ANY
        yield "the number of time stamps", len(item.timestamps), 0, _MOST_STAMPS
    customers = {item.commitment.number: item.commitment.header.customers for item in chain}
    for opened in bundle.opened:
        number = bundle.proved_by(opened)
        yield "the commitment of an opened leaf", number, bundle.header.number, max(customers)
        yield "the place of an opened leaf", opened.index_, 1, customers.get(number, 0)
        # Serials begin at 0 and grow with the place, so a serial is at least its place less 1.
        yield "the serial of an opened leaf", opened.leaf.serial, opened.index_ - 1, _ANY


def _of_claims(bundle: Bundle) -> Iterator[_Range]:
    num_chips = bundle.header.num_chips
    yield "the number of accused", len(bundle.accused), 1, num_chips
    largest = 1.01 * num_chips**0.5  # |T| <= |b|, up to rounding
    others = max(item.commitment.header.customers for item in bundle.chain) - 1
    for claim in bundle.accused:
        yield "a statistic", claim.statistic, -largest, largest
        yield "log10_p", claim.log10_p, -_ANY, 0
        yield "a share", claim.share, -0.01, 1.01
        yield "the size of a support", len(claim.support), 0, min(num_chips - 1, others)
