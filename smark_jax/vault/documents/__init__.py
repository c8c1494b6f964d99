"""The documents that a vault stores, publishes and signs: JSON in a file, a NamedTuple in the program.

:mod:`smark_jax._documents` converts them. Hashes and signatures cover the output of :func:`canonical`.
"""

from smark_jax._documents import (
    MISSING,
    Hash,
    Hex,
    Missing,
    Signature,
    Wrong,
    canonical,
    parse,
    plain,
    text,
)
from smark_jax.vault.documents._stored import stored
from smark_jax.vault.documents.evidence import (
    Bundle,
    Claim,
    Exhibit,
    Opened,
    Piece,
    Signed,
    Stamp,
    Stamped,
    VerdictNamed,
)
from smark_jax.vault.documents.settings import Commitment, Header, Leaf, LeafRow, Model, Shape, Versions, rows, spec
from smark_jax.vault.documents.verdicts import Accused, Answers, CommitmentNamed, Coverage, Reading, Suspect, Verdict

__all__ = [
    "MISSING",
    "Accused",
    "Answers",
    "Bundle",
    "Claim",
    "Commitment",
    "CommitmentNamed",
    "Coverage",
    "Exhibit",
    "Hash",
    "Header",
    "Hex",
    "Leaf",
    "LeafRow",
    "Missing",
    "Model",
    "Opened",
    "Piece",
    "Reading",
    "Shape",
    "Signature",
    "Signed",
    "Stamp",
    "Stamped",
    "Suspect",
    "Verdict",
    "VerdictNamed",
    "Versions",
    "Wrong",
    "canonical",
    "parse",
    "plain",
    "rows",
    "spec",
    "stored",
    "text",
]
