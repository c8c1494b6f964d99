"""Undoing rewrites that preserve a network's function: permuted, rescaled, flipped, mixed, split and dummy neurons.

::

    aligned = alignment.align(suspect, base, apply_fn, example_images)
    verdict = tracing.trace(extraction.extract(aligned.params, base, mark), book)

No description of the network is needed: :func:`trace_graph` reads its channel spaces off its jaxpr. Alignment uses only
the suspect and the base. An innocent's codeword cannot enter, so p-values hold as they do without alignment (aligning
to a customer's own copy would break them).
"""

from smark_jax.alignment.align import align
from smark_jax.alignment.graph import FIXED, Graph, Segment
from smark_jax.alignment.report import Alignment, Report, SpaceReport
from smark_jax.alignment.tracing import trace as trace_graph

__all__ = [
    "FIXED",
    "Alignment",
    "Graph",
    "Report",
    "Segment",
    "SpaceReport",
    "align",
    "trace_graph",
]
