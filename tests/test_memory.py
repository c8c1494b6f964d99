"""Freed memory is kept by the process that asked for it, and by no other."""

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import numpy as np
from smark_jax import _memory
if sys.argv[1] == "keep" and not _memory.keep_freed():
    print("no glibc")
    sys.exit()
block = lambda: np.ones(10_000_000, np.float32)
block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_blocks_are_mapped_once_and_without_it_each_time():
    faults = {}
    for how in ("keep", "leave"):
        env = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}  # which would map 2 MB at a time
        run = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True, env=env)
        if run.stdout.strip() == "no glibc":
            pytest.skip("another C library")
        faults[how] = int(run.stdout)
    assert faults["keep"] < 1000 < 10_000 < faults["leave"]
