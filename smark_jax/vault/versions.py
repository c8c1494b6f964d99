"""Which algorithm a name of :class:`smark_jax.vault.documents.Versions` means.

A model names its algorithms when it is added, and commitments bind them. To change one, add an entry under a new name
here and put that name into :data:`NEW`: models that are there go on with the entry that they name, so keep it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from smark_jax import carriers, chacha, codes
from smark_jax.vault.documents import Versions

NEW = Versions()
"""What a new model is added with."""


class Code(NamedTuple):
    """A code: the codewords of some serials, and the codebook of serials 0 to N - 1, both from the code key."""

    words: Callable[..., Any]
    book: Callable[..., Any]


CIPHERS = {"chacha20/1": chacha.keystream}
"""Keystreams. A second one becomes an argument of the carriers and codes, which draw from ChaCha20 themselves."""
CARRIERS = {"hadamard/1": carriers.draw}
CODES = {"signs/1": Code(codes.codebook, codes.Codebook)}
DECODERS = {"joint/1": "joint"}
"""By the names of :data:`smark_jax.tracing.DECODERS`. Verdicts are reached by the one that was committed to: to choose
it after a look at the suspect would void the p-values."""
SHAPES: dict[str | None, None] = {None: None}
"""How strongly which weights are marked: all leaves alike."""

_KNOWN: dict[str, Mapping[Any, object]] = {
    "cipher": CIPHERS,
    "carrier": CARRIERS,
    "code": CODES,
    "decoder": DECODERS,
    "shape": SHAPES,
}


def unknown(named: Versions) -> str | None:
    """The first algorithm that this version of smark-jax does not know, in words; None when it knows them all."""
    for kind, name in named._asdict().items():
        if name not in _KNOWN[kind]:
            return f"the {kind} {name!r}"
    return None
