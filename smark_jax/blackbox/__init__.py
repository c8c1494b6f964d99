"""Black-box methods, for suspects whose weights are hidden: payloads in images, and tracing by answers alone."""

from smark_jax.blackbox.answers import Answer, Answers, Predict, ask, digests, query
from smark_jax.blackbox.payload import PAYLOAD_BITS, Reading, mark_images, read_images
from smark_jax.blackbox.probes import Trained, commitment_payloads, halves, probes, train_copies

__all__ = [
    "PAYLOAD_BITS",
    "Answer",
    "Answers",
    "Predict",
    "Reading",
    "Trained",
    "ask",
    "commitment_payloads",
    "digests",
    "halves",
    "mark_images",
    "probes",
    "query",
    "read_images",
    "train_copies",
]
