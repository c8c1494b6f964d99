"""Measures the memory that a function takes, and how many lines of our code it runs."""

import gc
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def peak(run: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy took at once while it ran."""
    gc.freeze()  # what was there before, which takes seconds to look through, isn't traced
    gc.collect()  # so that collections come at the same points of each run
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.unfreeze()


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
