"""The one place where a bundle's numbers are checked: an owner may have signed any, and a commitment may hold any."""

from collections.abc import Iterator
from typing import Any

from smark_jax.vault import bundles

LARGEST_ALPHA = 1e-3
"""The level up to which an arbiter accepts accusations who does not ask for another."""
# More than the longest honest bundle needs, and little enough that an arbiter's computer is not kept busy for long.
_MOST_COMMITMENTS, _MOST_STAMPS, _MOST_MULTIPLICATIONS = 10_000, 100, 10**10


def level(content: dict[str, Any], largest_alpha: float) -> str | None:
    """What is wrong with the committed alpha; None when it lies above 0 and is not above ``largest_alpha``."""
    alpha = content["commitment"]["header"]["alpha"]
    if not 0 < alpha <= largest_alpha:
        return f"alpha is {alpha:g}: more than 0 and at most {largest_alpha:g} is allowed"
    return None


def numbers(content: dict[str, Any]) -> str | None:
    """The first number of a bundle that is out of its range, in words; None when all are in theirs."""
    header = content["commitment"]["header"]
    for name, value, least, most in _ranges(content, header):
        if not least <= value <= most:
            bound = f"from {least:g} to {most:g}" if most < _ANY else f"at least {least:g}"
            return f"{name} is {value:g}: it should be {bound}"
    if not header["strength"] > 0 or not all(scale > 0 for _, _, scale in content["spec"]):
        return "strength or the scale of a leaf is not above 0"
    work = sum(header["num_chips"] * len(claim["support"]) ** 2 for claim in content["accused"])
    if work > _MOST_MULTIPLICATIONS:
        return f"the accusations take {work:g} multiplications: at most {_MOST_MULTIPLICATIONS:g} are made"
    return None


_ANY = 2.0**63


def _ranges(content: dict[str, Any], header: dict[str, Any]) -> Iterator[tuple[str, float, float, float]]:
    """Each number with its name, the least and the most it may be."""
    num_weights = 0
    for path, shape, _ in content["spec"]:
        size = 1
        for length in shape:
            yield f"a length of {path[:40]!r}", length, 1, _ANY
            size *= length
        num_weights += size
    suspect = content["suspect"]
    yield "log_maps", suspect.get("log_maps", 0), 0, _ANY
    yield "readout", suspect["reading"].get("readout", 1), 1, _ANY
    for left in suspect.get("left_out", ()):
        yield "the weights left out of a leaf", left["weights"], 0, _ANY
    chain = bundles.chain(content)
    yield "the number of commitments", len(chain), 1, _MOST_COMMITMENTS
    for item in chain:
        for name in ("customers", "decoder_version", "number"):
            yield f"{name} of the commitment", item["commitment"]["header"][name], 1, _ANY
        yield "the number of time stamps", len(item["timestamps"]), 0, _MOST_STAMPS
    yield "num_chips", header["num_chips"], 1, num_weights
    for name in ("num_suspects", "num_alignments"):
        yield name, content[name], 1, _ANY
    yield "num_customers", bundles.num_customers(content), 1, _ANY
    for name in ("number", "occasion"):
        yield f"{name} of the verdict", content["verdict"][name], 1, _ANY
    customers = {item["commitment"]["header"]["number"]: item["commitment"]["header"]["customers"] for item in chain}
    for opened in content["opened"]:
        number = bundles.proved_by(content, opened)
        yield "the commitment of an opened leaf", number, chain[0]["commitment"]["header"]["number"], max(customers)
        yield "the place of an opened leaf", opened["index"], 1, customers.get(number, 0)
        # Serials grow with the place, and begin at 0.
        yield "the serial of an opened leaf", opened["leaf"]["serial"], opened["index"] - 1, _ANY
    yield "the number of accused", len(content["accused"]), 1, header["num_chips"]
    largest = 1.01 * header["num_chips"] ** 0.5  # |T| <= |b|, but for rounding
    for claim in content["accused"]:
        yield "a statistic", claim["statistic"], -largest, largest
        yield "log10_p", claim["log10_p"], -_ANY, 0
        yield "a share", claim["share"], -0.01, 1.01
        yield "the size of a support", len(claim["support"]), 0, min(header["num_chips"], max(customers.values())) - 1
