"""What this process does with memory that it no longer uses."""

import ctypes
import sys

# mallopt's parameters, of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Lets the process keep memory that it frees, for its next need; at once, and until it ends.

    By default the C library of Linux (glibc) hands large blocks back to the system, which gives them out again as pages
    that must be cleared and mapped one by one. A training step on CPUs allocates the same blocks every time: the CNN's,
    with 4 parties on 2 cores, takes 0.65 of the time when they are kept (``make bench``). In return the process stays
    as large as it ever was, and somewhat larger. Call it before the first computation of a program that trains on CPUs.
    From outside: ``MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000`` in the environment.

    Returns:
      Whether the C library does so; False where it is not glibc, and nothing is changed.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    return all([library.mallopt(parameter, value) == 1 for parameter, value in settings])
