"""A verdict as one HTML file that a lawyer can read, print and keep.

The page needs no network, no script and no second file; its own content security policy forbids them. All text from a
file or from the registry of customers is treated as hostile and escaped everywhere.
"""

from smark_jax.report.page import render

__all__ = ["render"]
