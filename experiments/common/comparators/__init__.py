"""Codes and decoders from the literature behind one interface, to compare them on the same copies and attacks.

Every comparator has words of -1 and +1, which :func:`smark_jax.embedding.embed` takes like ours, and a decoder that
takes the same soft chips. Only code and decoder differ, never carrier, distortion or read-out.

============================ ======================================= =============================================
constructor                  code                                    accusation
============================ ======================================= =============================================
:func:`bibd`                 projective or affine plane, complement  hard threshold, AND logic; no bound known
:func:`orthogonal`           rows of a Hadamard matrix               correlation, our threshold; no bound known
:func:`tardos`               arcsine biases with a cut-off           symmetric score, bound on false accusations
:func:`nuida`                discrete biases for c colluders         symmetric score, bound on false accusations
============================ ======================================= =============================================

All words are kept in host memory, N x m bytes: comparators are for tables, not for a registry of 1e8 customers.
"""

from experiments.common.comparators.biased import centre, nuida, nuida_distribution, tardos
from experiments.common.comparators.chernoff import log_p_value, thresholds
from experiments.common.comparators.interface import Accusation, Comparator, Decision, Verdict
from experiments.common.comparators.orthogonality import orthogonal
from experiments.common.comparators.planes import bibd, bibd_capacity, incidence

__all__ = [
    "Accusation",
    "Comparator",
    "Decision",
    "Verdict",
    "bibd",
    "bibd_capacity",
    "centre",
    "incidence",
    "log_p_value",
    "nuida",
    "nuida_distribution",
    "orthogonal",
    "tardos",
    "thresholds",
]
