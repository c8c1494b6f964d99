"""The training step over real processes, against one process and against float64."""

import sys
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import reference

from experiments.distributed import launch
from smark_jax import parallel


def start(processes: int, folder: Path, case: str = "trains", absent: int = 0, timeout: float = 150) -> None:
    port = launch.free_port()
    command = [sys.executable, "-W", "error", worker.__file__, str(processes)]
    launch.run(
        [[*command, str(index), str(port), str(folder), case] for index in range(processes - absent)], timeout=timeout
    )


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, np.ndarray]]:
    return {engine: worker.train(engine) for engine in worker.ENGINES}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_each_other_and_with_one_process_bit_for_bit(
    processes, one_process, whole_verdict, tmp_path
):
    start(processes, tmp_path)
    for engine in worker.ENGINES:
        for index in range(processes):
            with np.load(tmp_path / f"{engine}{index}.npz") as got:
                assert set(got) == set(one_process[engine])
                for name, expected in one_process[engine].items():
                    np.testing.assert_array_equal(got[name], expected, err_msg=f"{name} of process {index}, {engine}")
    for index in range(processes):
        with np.load(tmp_path / f"traced{index}.npz") as got:
            assert got["progress"][-1] == whole_verdict["progress"][-1] == 200_000
            for name in whole_verdict.keys() - {"progress"}:
                np.testing.assert_array_equal(got[name], whole_verdict[name], err_msg=f"{name} of process {index}")
        with np.load(tmp_path / f"refusals{index}.npz") as refused:
            assert "the same params in every process, but got others in process [1]" in str(refused["other params"])
            assert f"a row for each of {4 // processes} parties" in str(refused["all rows"])
            assert f"at least one party in each of {processes} processes" in str(refused["idle process"])
            assert "expected 5 devices" in str(refused["too many parties"])
            for name in ("other chips", "other levels", "other decoders"):
                assert "the same chips, codebook and settings in every process" in str(refused[name])
            assert processes == 4 or "expected the same key" in str(refused["crooked keys"])


@pytest.fixture(scope="module")
def whole_verdict() -> dict[str, np.ndarray]:
    found = worker.traced(collective=False)
    assert sorted(found["serial"]) == sorted(worker.COLLUDERS)
    return found


def test_one_process_is_float64_gradient_descent(one_process):
    """The reference of the test above has one of its own."""
    params, images, labels, _ = worker.problem()
    w, b = np.float64(params["w"]), np.float64(params["b"])
    for _ in range(worker.ROUNDS):
        dw, db = np.zeros_like(w), np.zeros_like(b)
        for x, y in zip(np.float64(images), labels, strict=True):
            _, gw, gb = reference.softmax_cross_entropy_gradient(w, b, x, y)
            scale = min(1.0, worker.CLIP / np.sqrt(np.square(gw).sum() + np.square(gb).sum()))
            dw, db = dw + scale * gw / worker.PARTIES, db + scale * gb / worker.PARTIES
        w, b = w - worker.RATE * dw, b - worker.RATE * db
    for result in one_process.values():
        np.testing.assert_allclose(result["w"], w, atol=5e-6)
        np.testing.assert_allclose(result["b"], b, atol=5e-6)


@pytest.mark.parametrize(
    ("case", "absent", "reason"),
    [
        ("dies", 0, "process 1 of 2 ended with code 9"),
        ("raises", 0, "the data of this process are missing"),
        ("missing", 1, "process 0 of 1 ended with code"),
    ],
)
def test_a_lost_process_ends_all_with_the_reason(case, absent, reason, tmp_path):
    with pytest.raises(RuntimeError, match=reason):
        start(2, tmp_path, case, absent, timeout=60)


def test_a_late_process_is_ended():
    with pytest.raises(RuntimeError, match=r"process 0 of 1 did not end within 0\.5 seconds"):
        launch.run([[sys.executable, "-c", "import time; time.sleep(60)"]], timeout=0.5)


def test_one_process_owns_every_party():
    assert parallel.own_parties(3) == range(3)
