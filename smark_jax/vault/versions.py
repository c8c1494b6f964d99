"""Maps the names in :class:`smark_jax.vault.documents.Versions` to algorithms.

A model names its algorithms when it is added, and commitments bind them. To change an algorithm, add an entry under a
new name here and put that name into :data:`NEW`. Keep the old entry: existing models still use the one they name.

Carriers, codes and decoders are looked up here. Ciphers and shapes are only checked by name: a second one must first
reach the code that draws and marks, or models would commit to a name that changes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from smark_jax import carriers, chacha, codes
from smark_jax.vault.documents import Versions

NEW = Versions()
"""The algorithms of a new model."""


class Code(NamedTuple):
    """A code: from the code key, the codewords of given serials, and the codebook of serials 0 to N - 1."""

    words: Callable[..., Any]
    book: Callable[..., Any]


CIPHERS = {"chacha20/1": chacha.keystream}
"""Keystreams. Carriers and codes call ChaCha20 directly; a second cipher would become an argument of theirs."""
CARRIERS = {"hadamard/1": carriers.draw}
CODES = {"signs/1": Code(codes.codebook, codes.Codebook)}
DECODERS = {"joint/1": "joint"}
"""Names in :data:`smark_jax.tracing.DECODERS`. Verdicts use the decoder that was committed to: choosing one after
looking at the suspect would void the p-values."""
SHAPES: dict[str | None, None] = {None: None}
"""How marking strength is distributed over the weights: None marks all leaves alike."""

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
            return f"the {kind} {name!r}"
    return None
