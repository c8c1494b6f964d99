"""Measures the memory that a function takes."""

import gc
import tracemalloc
from collections.abc import Callable


def peak(run: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy took at once while it ran."""
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
