"""Maps the names in :class:`smark_jax.vault.documents.Versions` to algorithms.

A model names its algorithms when it is added, and commitments bind them. To change an algorithm, add an entry under a
new name here and put that name into :data:`NEW`. Keep the old entry: existing models still use the one they name.

Carriers, codes, decoders and shapes are looked up here. Ciphers are only checked by name: a second one must first
become an argument of the functions that draw, or models would commit to a name that has no effect.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from smark_jax import carriers, chacha, codes, keys
from smark_jax.vault.documents import Versions

WHITE = Versions()
"""The algorithms of a model without a shape, whose leaves are all marked alike, as older versions did."""
NEW = WHITE._replace(carrier="hadamard/3", code="signs/2", shape="function/1")
"""The algorithms of a new model with a shape."""


class Code(NamedTuple):
    """A code: from the code key, the codewords of given serials, and the codebook of serials 0 to N - 1."""

    words: Callable[..., Any]
    book: Callable[..., Any]


def _with_tail(
    key: carriers.Keys, spec: carriers.Spec, shape: carriers.Shape | None, num_chips: int
) -> carriers.Carrier:
    return carriers.draw(key, spec, num_chips)


def _without_tail(
    key: carriers.Keys, spec: carriers.Spec, shape: carriers.Shape | None, num_chips: int
) -> carriers.Carrier:
    return carriers.draw_even(key, spec.num_weights if shape is None else shape.num_coordinates, num_chips)


def _in_pieces(
    key: carriers.Keys, spec: carriers.Spec, shape: carriers.Shape | None, num_chips: int
) -> carriers.Carrier:
    found = carriers.piece_keys(key) if isinstance(key, keys.SecretKey) else key
    return (_with_tail if shape is None else _without_tail)(found, spec, shape, num_chips)


CIPHERS = {"chacha20/1": chacha.keystream}
"""Keystreams. Carriers and codes call ChaCha20 directly; a second cipher would become an argument of theirs."""
CARRIERS: dict[str, Callable[..., carriers.Carrier]] = {
    "hadamard/1": _with_tail,
    "hadamard/2": _without_tail,
    "hadamard/3": _in_pieces,
}
"""Draw a carrier from its key, the carrying leaves, the shape or None, and the number of chips."""
IN_PIECES = frozenset({"hadamard/3"})
"""Carriers that evidence can open in part; they can also be drawn from the keys of some of their pieces."""
CODES = {
    f"signs/{version}": Code(
        functools.partial(codes.codebook, version=version), functools.partial(codes.Codebook, version=version)
    )
    for version in (1, 2)
}
DECODERS = {"joint/1": "joint"}
"""Names in :data:`smark_jax.tracing.DECODERS`. Verdicts use the decoder that was committed to: choosing one after
looking at the suspect would void the p-values."""
SHAPES: dict[str | None, Callable[..., carriers.Shape] | None] = {None: None, "function/1": carriers.Shape.from_arrays}
"""Make a shape of the arrays in its file; None where all leaves are marked alike."""

_KNOWN: dict[str, Mapping[Any, object]] = {
    "cipher": CIPHERS,
    "carrier": CARRIERS,
    "code": CODES,
    "decoder": DECODERS,
    "shape": SHAPES,
}


def unknown(named: Versions) -> str | None:
    """Describes the first algorithm that this version of smark-jax does not know; None when it knows them all."""
    for kind, name in named._asdict().items():
        if name not in _KNOWN[kind]:
            return f"the {kind} {str(name)[:40]!r}"
    return None


def mark(
    named: Versions,
    key: carriers.Keys,
    spec: carriers.Spec,
    shape: carriers.Shape | None,
    num_chips: int,
    strength: float,
) -> carriers.Mark:
    """The mark of a model, by the algorithms that it names.

    Args:
      named: these algorithms.
      key: the carrier key; or keys of pieces, if the carrier is one of :data:`IN_PIECES`. Other pieces stay closed.
      spec: the carrying leaves.
      shape: the shape, from its file; None if the model names none.
      num_chips: m.
      strength: the model's own, on which the weights of a shaped mark's reading depend.

    Raises:
      SmarkError: when the shape lacks a carrying leaf, or there are more chips than coordinates.
    """
    part = None if shape is None else shape.of(spec)
    return carriers.Mark(spec, CARRIERS[named.carrier](key, spec, part, num_chips), part, strength)
