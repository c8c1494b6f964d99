"""What must be exact to the bit is tested at XLA's own level of optimisation too; the suite compiles at the lowest."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import QUICK

TESTS = Path(__file__).parent
EXACT = [
    "test_keys.py::test_long_keystream_over_several_passes_equals_cryptography",
    "test_aggregation.py::test_a_mask_is_the_signed_sum_of_the_pairs_streams",
    "test_aggregation.py::test_rounding_equals_the_reference_to_the_bit[0.37-5-16]",
    "test_aggregation.py::test_rounding_equals_the_reference_to_the_bit[0.01-3-32]",
    "test_carriers.py::test_transforms_equal_the_dense_matrix[1000-304]",
    "test_shipped_level.py::test_which_level_this_process_compiles_at",
]


def test_which_level_this_process_compiles_at():
    shipped = "SMARK_TESTS_AT_XLAS_OWN_LEVEL" in os.environ
    assert (QUICK not in os.environ.get("XLA_FLAGS", "")) == shipped


def test_streams_masks_rounding_and_carriers_are_exact_at_the_level_that_ships():
    environment = {**os.environ, "SMARK_TESTS_AT_XLAS_OWN_LEVEL": "1"}
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(QUICK, "").strip()
    if not environment["XLA_FLAGS"]:  # XLA would take anything else that is no flag for the name of a file
        del environment["XLA_FLAGS"]
    chosen = [str(TESTS / name) for name in EXACT]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
