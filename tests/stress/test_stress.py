"""The quick form of every stress test; with ``SMARK_STRESS=full`` in the environment the full form instead.

The full form takes hours, and writes the results that are kept in ``tests/stress/results``.
"""

import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from smark_jax.vault import crypto
from stress.crash import __main__ as crasher
from stress.crash import kills
from stress.fuzz import __main__ as fuzzer
from stress.fuzz import accusations, targets, worker

FULL = os.environ.get("SMARK_STRESS") == "full"
RESULTS = str(Path(__file__).parent / "results")
quick = pytest.mark.skipif(FULL, reason="SMARK_STRESS=full runs the full form")
full = pytest.mark.skipif(not FULL, reason="hours; SMARK_STRESS=full runs it")


@full
def test_200_kills_among_1000_copies():
    with pytest.raises(SystemExit, match=r"^0$"):
        crasher.main(["--kills", "200", "--copies", "1000", "--out", RESULTS])


@full
def test_100000_malformed_files():
    assert fuzzer.main(["--config", "full", "--out", RESULTS]) == 0


@full
def test_10000_false_bundles():
    workers = str(os.cpu_count() or 1)
    assert accusations.main(["--config", "full", "--workers", workers, "--out", RESULTS]) == 0


@quick
def test_kill_9_at_random_moments_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(crypto, "_N", 2**10)  # the vaults are opened quickly, by the processes too
    rng = random.Random(1)
    issued = kills.issue(tmp_path / "issue", 1, 60, rng)
    traced = kills.trace(tmp_path / "trace", 1, 60, rng)
    assert (issued["losses"], traced["losses"]) == ([], [])
    assert (issued["kills"], traced["kills"]) == (1, 1)


@quick
def test_random_false_bundles_convict_nobody_and_do_without_range_checks():
    """As ``SMARK_STRESS=full`` does with 10,000."""
    result = accusations.fuzz(0, 0, 100)
    assert result["failures"] == []
    assert result["false_convictions_without_range_checks"] > 0
    assert result["ends"]["the true bundle: true"] == 1


@quick
def test_the_fuzzer_finds_nothing_in_us_and_everything_in_a_careless_reader(tmp_path, monkeypatch):
    assert fuzzer.main(["--cases", "120", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert found["read"] + found["refused"] == 120 and found["refused"] > 60 and found["peak_bytes"] < 1e9

    def careless(path):
        content = path.read_bytes()
        return pickle.loads(content) if content[:1] == b"\x80" else np.load(path, allow_pickle=True)["a"]

    broken = targets.TARGETS[0]._replace(read=careless)
    monkeypatch.setattr(worker, "TARGETS", (broken,))
    failures = worker.run(0, 0, 300)["failures"]
    assert any(failure["what"] == "it ran what the file holds" for failure in failures)
    assert any("Error" in failure["what"] for failure in failures)


@quick
def test_the_fuzzer_shows_examples(capsys):
    with pytest.raises(SystemExit):
        fuzzer.main(["--help"])
    assert "--cases 100000" in capsys.readouterr().out
