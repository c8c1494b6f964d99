"""Measures the memory that a function takes, and how many lines of our code it runs."""

import gc
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def peak(run: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy took at once while it ran."""
    gc.collect(1)  # of what is new alone: what was there before isn't traced, and takes seconds to look through
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def counted(limit: int, run: Callable[[], T]) -> T:
    """Runs it, and fails once more lines of our code have run than the limit: all of them may take years."""
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if "smark_jax" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        assert lines < limit, f"more than {limit:,} lines run"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return run()
    finally:
        sys.settrace(before)
