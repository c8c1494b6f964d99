"""Informed extraction: the soft chips in the difference between a suspect and the base model.

The base is subtracted because its weights are by far the largest noise that a read-out could contain.
"""

from smark_jax.extraction.reading import (
    Coverage,
    LeftOut,
    coverage,
    extract,
    extract_batch,
    extract_vectors,
    least_weights,
)
from smark_jax.extraction.vectors import extract_parts, shifts

__all__ = [
    "Coverage",
    "LeftOut",
    "coverage",
    "extract",
    "extract_batch",
    "extract_parts",
    "extract_vectors",
    "least_weights",
    "shifts",
]
