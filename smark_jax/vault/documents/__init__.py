"""The documents that a vault stores, publishes and signs: JSON in a file, a NamedTuple in the program.

:func:`parse` is strict, since bundles and commitments may come from strangers: every field must be present and of the
right type, and no other field is allowed. Hashes and signatures cover the output of :func:`canonical`. Parsing a
document and writing it again gives the same bytes: a field whose default is :data:`MISSING` may be absent, and is then
not written either.
"""

from smark_jax.vault.documents.codec import (
    MISSING,
    Hash,
    Hex,
    Missing,
    Signature,
    Wrong,
    canonical,
    parse,
    plain,
    stored,
    text,
)
from smark_jax.vault.documents.evidence import Bundle, Claim, Exhibit, Opened, Signed, Stamp, Stamped, VerdictNamed
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
