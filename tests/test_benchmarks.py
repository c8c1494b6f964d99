"""The benchmark: statistics of races, both sides against references, and what is said where PyTorch is missing."""

import dataclasses
import importlib.util
import io
import itertools
import json
import re
import time

import numpy as np
import pytest
import rich.console
from scipy import special, stats

pytest.importorskip("matplotlib")

import section_checks

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import (
    accelerator,
    accelerator_report,
    commands,
    compare,
    floor_side,
    network_sizes,
    race,
    scaling,
    shape_cost,
)

ALONE = race.Setting(threads=1, accelerator=False, torch=False)
NO_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


def laps(*seconds, arm="a"):
    return {"arm": arm, "side": "jax", "params": {}, **race.summary(seconds)}


@pytest.mark.parametrize("power", [0, 0.5, 1, 2.5])
def test_exponents_of_exact_power_laws_are_found(power):
    sizes = np.array([3, 70, 1000, 1e6])
    assert scaling.exponent(sizes, 7e-5 * sizes**power) == pytest.approx(power, abs=1e-9)


def test_d_log_d_is_within_the_limit_and_a_power_of_1_2_is_not():
    sizes = np.logspace(5, 8, 7)
    assert 1 < scaling.exponent(sizes, sizes * np.log(sizes)) < scaling.CURVES["D"][1]

    def fit(power):
        points = [{"curve": "D", "side": "jax", "arm": "spread", "size": size, "median": size**power} for size in sizes]
        return scaling.fits(points)[0]["met"]

    assert fit(1) and not fit(1.2)


def test_summary_is_median_and_quartiles():
    seconds = np.random.default_rng(0).exponential(size=12)
    found = race.summary(seconds.tolist())
    assert [found["quartiles"][0], found["median"], found["quartiles"][1]] == pytest.approx(
        np.quantile(seconds, (0.25, 0.5, 0.75))
    )
    assert race.summary([2.0])["median"] == 2


def test_a_ratio_does_not_mind_a_machine_that_drifts_but_one_of_medians_does():
    # Nine times as slow from the fourth round on, which a side escapes twice.
    slow = laps(2.0, 2.0, 2.0, 18.0, 18.0, 18.0, 18.0)
    fast = laps(1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0)
    assert race.ratio(slow, fast) == 2
    assert slow["median"] / fast["median"] != 2


def test_arms_run_in_turn_after_a_lap_to_warm_up_and_a_missing_side_is_left_out():
    params = {"megabytes": 1, "matrix": 64, "threads": 1}
    entries = [
        race.Entry("floor", "rates", params, ("copy",)),
        race.Entry("torch", "losses", {}),
        race.Entry("floor", "rates", params, ("matmul",)),
    ]
    notes = []
    timings = race.race(entries, ALONE, 2, on_lap=notes.append)
    assert notes[2:] == ["floor: copy", "floor: matmul"] * 3
    assert [len(timing["laps"]) for timing in timings] == [2, 2]
    assert timings[1]["facts"] == {"amount": [2 * 64**3] * 2}
    assert all(0 < timing["median"] < 5 and timing["imported_mb"] <= timing["peak_mb"] for timing in timings)


def test_memory_is_the_case_s_own():
    small, large = (
        race.race([race.Entry("floor", "rates", {"megabytes": size, "matrix": 8, "threads": 1}, ("copy",))], ALONE, 1)
        for size in (1, 101)
    )
    assert large[0]["peak_mb"] - small[0]["peak_mb"] == pytest.approx(200, abs=10)


def test_a_worker_that_dies_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)no such case.*status 1.*KeyError"):
        race.Worker(race.Entry("floor", "no such case", {}), ALONE)


def test_floors():
    rates = floor_side.Rates(copy=1e9, matmul=1e10, keystream=1e8)
    floor = lambda case, arm, **params: floor_side.floor(rates, case, arm, params)  # noqa: E731
    assert floor("weights", "copy", num_weights=10**9) == pytest.approx(8)
    assert floor("weights", "spread", num_weights=10**9) == pytest.approx(4.25)
    assert floor("verdict", "verdict", num_customers=10**6, num_chips=304) == pytest.approx(0.64 + 0.064)
    assert floor("verdict", "verdict", num_customers=10**6, num_chips=513) == pytest.approx(1.28 + 0.128)
    # The CNN's 421,642 weights, less biases, times the places where each is used.
    used = 784 * 288 + 196 * 18_432 + 401_408 + 1280
    assert floor("train", "plain", parties=2, batch=5) == pytest.approx(10 * 6 * used / 1e10)
    assert floor("party", "party", parties=3, num_words=25) == pytest.approx(200 / 1e8)
    assert floor("disk", "issue") is None


def test_shapes_have_the_published_numbers_of_weights():
    count = lambda leaves: sum(int(np.prod(shape)) for shape in leaves.values())  # noqa: E731
    assert count(network_sizes.resnet18()) == 11_689_512
    assert count(network_sizes.resnet50()) == 25_557_032
    assert count(network_sizes.vit_b16()) == 86_567_656
    assert count(network_sizes.vit_l16()) == 304_326_632
    assert count(network_sizes.layers(1003)) == 1003


@pytest.mark.parametrize("at_most", [True, False])
def test_targets(at_most):
    above, below = (compare.target("x", value, 5, at_most=at_most)["met"] for value in (6, 4))
    assert (above, below) == (not at_most, at_most)
    assert compare.target("x", 5, 5, at_most=at_most)["met"]
    assert compare.target("x", compare.times(None, laps(1.0)), 5, at_most=at_most)["met"] is None


def test_our_side_does_what_it_times():
    from experiments.benchmarks import jax_side

    case = jax_side.weights(5000, 64, 0)
    assert case["extract"]() == {"wrong_chips": 0}
    assert jax_side.verdict(500, 304, "single", 0)["verdict"]() == {"right": True}
    assert set(jax_side.CASES) >= {"losses", "train", "copies", "disk", "party", "model"}


def linear_race(entries, setting, rounds, *, seconds=0, on_lap=None):
    """A race of workers whose laps take a nanosecond a unit of the size, PyTorch's twice as long."""
    arms = {"rates": ("copy", "matmul", "keystream"), "party": ("party", "aggregate")}
    blank = {"device": "cpu", "first_lap": 1.0, "imported_mb": 100, "peak_mb": 200, "device_peak_mb": None}
    return [
        {
            **laps(*[1e-9 * (1 + (entry.side == "torch")) * max(entry.params.values())] * rounds, arm=arm),
            **blank,
            "side": entry.side,
            "case": entry.case,
            "params": entry.params,
            "facts": {"amount": [1e3] * rounds} if entry.case == "rates" else {},
        }
        for entry in entries
        if entry.side != "torch" or setting.torch
        for arm in entry.arms or arms.get(entry.case, ("arm",))
    ]


@pytest.mark.parametrize("torch", [True, False])
def test_scaling_fits_its_curves_resumes_and_says_whether_pytorch_took_part(tmp_path, monkeypatch, torch):
    monkeypatch.setattr(race, "setting", lambda: ALONE._replace(torch=torch))
    monkeypatch.setattr(race, "race", linear_race)
    monkeypatch.setattr(race.importlib.metadata, "version", lambda name: "1")
    curves = {"customers": (), "copies": (), "parties": ()}
    tiny = scaling.Config(1, 0.1, (4096, 8192, 16384), (1000, 2000), **curves, dense_gigabytes=1e-2)
    tiny = dataclasses.replace(tiny, weights_of_chips=500)
    result = section_checks.run_and_resume({scaling: tiny}, tmp_path)["scaling"]["result"]
    fits = {(row["curve"], row["side"], row["arm"]): row for row in result["fits"]}
    assert fits["D", "jax", "spread"]["exponent"] == pytest.approx(1) and fits["D", "jax", "embed"]["met"]
    assert fits["m", "jax", "despread"]["sizes"] == [1000, 2000]
    # 4 * 8192 * 304 bytes are just within the 10 MB that PyTorch's projection may take.
    assert fits.get(("D", "torch", "spread"), {}).get("sizes") == ([4096, 8192] if torch else None)
    assert all(timing["floor"] > 0 for timing in result["timings"])

    text = io.StringIO()
    made = [compare.target("speed", None, 20, at_most=False), compare.target("cost", 3, 15, at_most=True, unit="%")]
    found = {**result, "targets": made}
    compare.show(rich.console.Console(file=text, width=200), json.loads(json.dumps(found)))
    compare.picture(tmp_path / "compare.png", found)
    assert ("PyTorch is not installed" in text.getvalue()) == (not torch)
    assert "not measured" in text.getvalue() and "3 %" in text.getvalue()


def test_costs_of_shapes(tmp_path, monkeypatch):
    from experiments.benchmarks import shape_cost_side

    def in_this_process(entry, setting):
        (arm,) = entry.arms
        facts = shape_cost_side.CASES[entry.case](**entry.params)[arm]()
        return {"network": entry.params["network"], "arm": arm, "device": "cpu", "seconds": 1.0, "facts": facts}

    monkeypatch.setattr(race, "setting", lambda: ALONE)
    monkeypatch.setattr(shape_cost, "lap", in_this_process)
    tiny = shape_cost.Config(("CNN",), 4, ("dense",), 80_000, 64)
    result = section_checks.run_and_resume({shape_cost: tiny}, tmp_path)["shape_cost"]["result"]
    shape, alone, embed, extract = (found["facts"] for found in result["laps"])
    assert shape["weights"] == compare.CNN_WEIGHTS and shape["bases"] and 0 < shape["stored"] < shape["weights"]
    assert 0 < alone["change"] < 0.05
    assert embed["copies"] > 0 and extract["copies"] > 0
    assert [row["measured"] for row in result["targets"][-2:]] == [embed["copies"], extract["copies"]]
    text = io.StringIO()
    shape_cost.show(rich.console.Console(file=text, width=200), result)
    assert "memory of extract: dense" in text.getvalue()


def test_commands_are_run_in_two_vaults_and_the_second_counts(tmp_path, monkeypatch):
    laps = iter([[("trace", 9.0, 500.0)], [("trace", 2.5, 250.0)]])
    monkeypatch.setattr(race, "setting", lambda: ALONE)
    monkeypatch.setattr(commands, "_commands", lambda *settings: next(laps))
    result = section_checks.run_and_resume({commands: commands.Config((7,))}, tmp_path)["commands"]["result"]
    row = {"command": "trace", "customers": 7, "first_seconds": 9.0, "seconds": 2.5, "peak_mb": 250.0}
    assert result["rows"] == [row]
    text = io.StringIO()
    commands.show(rich.console.Console(file=text, width=200), result)
    assert "2.50" in text.getvalue()


class InThisProcess:
    """A worker without a process of its own."""

    def __init__(self, entry, setting):
        side = importlib.import_module(f"experiments.benchmarks.{entry.side}_side")
        self.entry, self.imported, self.device = entry, 100, side.device()
        self.case = side.CASES[entry.case](**entry.params)
        self.arms = entry.arms or tuple(self.case)

    def lap(self, arm):
        began = time.perf_counter()
        facts = self.case[arm]() or {}
        return {"seconds": time.perf_counter() - began, "facts": facts, "peak": 200, "device_peak": None}

    def close(self):
        pass


TINY = accelerator.Config(
    minutes=60,
    rounds=1,
    seconds=0.1,
    num_weights=(5000,),
    mask_words=(1000,),
    batch=2,
    model="ResNet-18",
    copies=2,
    customers=(500, 10**9),
    megabytes=1,
    matrix=64,
)


def test_an_accelerator_is_checked_and_timed_and_its_faults_are_told(tmp_path, monkeypatch, small_cnn, capsys):
    monkeypatch.setattr(race, "Worker", InThisProcess)
    monkeypatch.setattr(race, "devices", lambda: race.Devices("cpu", "cpu", 1))
    monkeypatch.setitem(network_sizes.NAMED, "ResNet-18", lambda: network_sizes.layers(5000))
    result = section_checks.run_and_resume({accelerator: TINY}, tmp_path)["accelerator"]["result"]
    assert [check["passed"] for check in result["checks"]] == [True] * 7
    assert result["checks"][0]["found"] == "0 of 131,232 words differ from OpenSSL's"
    timings = [timing for row in result["rows"] for timing in row["timings"]]
    assert all(timing["floor"] > 0 and timing["compile"] >= 0 for timing in timings)
    assert not any("folder" in timing["params"] for timing in timings)
    assert [row["name"] for row in result["rows"] if "left_out" in row] == ["N = 1,000,000,000"]
    assert accelerator_report.faults(result) == []

    text = io.StringIO()
    accelerator_report.show(rich.console.Console(file=text, width=80), result)
    assert "No accelerator: measured on CPU." in text.getvalue() and "…" not in text.getvalue()
    assert "verdict, N = 1,000,000,000: left out: would take about" in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= 80

    result["rows"][0]["timings"][-1]["facts"]["wrong_chips"] = [0, 3]
    monkeypatch.setattr(accelerator, "run", lambda config, seed, meter: result)
    monkeypatch.setattr(accelerator, "picture", lambda path, result: None)
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(["--only", "accelerator", "--config", "full", "--out", str(tmp_path / "fault")])
    assert ended.value.code == 1 and "Wrong on this device: extract, D = 5,000" in capsys.readouterr().out
    written = json.loads((tmp_path / "fault" / "accelerator.json").read_text())
    assert written["parameters"]["minutes"] == accelerator.QUICK.minutes  # without a device, not the full sizes


def other_cipher(checks, monkeypatch):
    monkeypatch.setattr(checks.chacha, "_rotate", lambda word, bits: (word << bits) | (word >> (31 - bits)))


def other_stream(checks, monkeypatch):
    stream = checks._stream
    monkeypatch.setattr(checks, "_stream", lambda *args: stream(*args) ^ np.uint32(1))


def other_transform(checks, monkeypatch):
    mixed = checks._mixed
    monkeypatch.setattr(checks, "_mixed", lambda columns: (1 + 2**-12) * mixed(columns))  # half of TF32's spacing


def other_gradient(checks, monkeypatch):
    descended = checks._descended
    monkeypatch.setattr(checks, "_descended", lambda *args: (1 + 2**-12) * descended(*args))


def other_engine(checks, monkeypatch):
    step = checks.parallel.train_step

    def train_step(apply_fn, optimizer, fixed_point, *, engine):
        bits = 32 if engine == "pmap" else 24
        return step(apply_fn, optimizer, dataclasses.replace(fixed_point, bits=bits), engine=engine)

    monkeypatch.setattr(checks.parallel, "train_step", train_step)


def refused(checks, monkeypatch):
    def score(*args, **kwargs):
        raise ValueError("no such operation\nand more")

    monkeypatch.setattr(checks.scoring, "score", score)


@pytest.mark.parametrize(
    ("spoil", "names", "found"),
    [
        (other_cipher, ["keystream"], "words differ"),
        (other_stream, ["keystream", "masks", "codewords", "scores", "copy"], "differ|wrong"),
        (other_transform, ["carrier"], "relative error .e-0[34]"),
        (other_gradient, ["training step"], "equal; relative error .e-0[34]"),
        (other_engine, ["training step"], "differ"),
        (refused, ["scores"], "^ValueError: no such operation$"),
    ],
)
def test_checks_of_a_device_see_what_is_wrong(monkeypatch, spoil, names, found):
    from experiments.benchmarks import device_checks

    spoil(device_checks, monkeypatch)
    arms = device_checks.checks(2, 0)
    for name in names:
        result = arms[name]()
        assert not result["passed"] and re.search(found, result["found"]), result


def test_a_check_that_takes_its_process_down_fails_and_the_others_go_on(monkeypatch):
    class Dying(InThisProcess):
        def __init__(self, entry, setting):
            self.arms = ("first", "second", "third")

        def lap(self, arm):
            if arm == "second":
                raise RuntimeError("The worker ended with status -6: its last words:\nCheck failed: ok")
            return {"facts": {"passed": True, "found": "fine"}}

    monkeypatch.setattr(race, "Worker", Dying)
    checks = accelerator._checks(race.Entry("device", "checks", {}), ALONE, lambda note: None)
    assert [check["passed"] for check in checks] == [True, False, True]
    assert checks[1]["found"] == "Check failed: ok"


def test_a_row_is_expected_to_take_as_long_as_a_smaller_one_and_longer_for_its_laps():
    row = accelerator.Row("N", (race.Entry("jax", "verdict", {}),), 1, 1000, ("verdict", {}))
    before = [
        {"case": "train", "size": 1, "wall": 99.0, "timings": [laps(1.0)]},
        {"case": "verdict", "size": 100, "wall": 10.0, "timings": [laps(2.0, 2.0, 2.0)]},
    ]
    assert accelerator.expected(row, before[:1]) == 20
    # Of ten seconds, four laps took eight; now there are two, each ten times as long.
    assert accelerator.expected(row, before) == pytest.approx(2 + 2 * 20)


def test_devices_name_folders():
    names = {"NVIDIA H100 80GB HBM3": "NVIDIA-H100-80GB-HBM3", "TPU v5 lite": "TPU-v5-lite", "../cpu": "cpu"}
    assert {kind: accelerator.folder(kind) for kind in names} == names


def test_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["--help"])
    assert "--config full" in capsys.readouterr().out


@NO_TORCH
class TestPyTorchSide:
    """Against float64 NumPy, SciPy, and the network in Flax."""

    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(32, 1000)) / 1000**0.5
    weights = rng.normal(size=1000)
    code = rng.choice([-1.0, 1.0], 32)

    @pytest.fixture
    def side(self):
        from experiments.benchmarks import torch_side

        return torch_side

    @pytest.fixture
    def system(self):
        from experiments.benchmarks import torch_system

        return torch_system

    def tensors(self):
        import torch

        return [torch.tensor(value, dtype=torch.float32) for value in (self.weights, self.matrix, self.code)]

    def test_losses(self, system):
        chips = np.array([sum(a * b for a, b in zip(row, self.weights, strict=True)) for row in self.matrix])
        uchida = np.mean([np.log(1 + np.exp(-b * y)) for b, y in zip(self.code, chips, strict=True)])
        assert float(system.uchida_loss(*self.tensors())) == pytest.approx(uchida, rel=1e-5)
        assert float(system.deepmarks_loss(*self.tensors())) == pytest.approx(
            np.mean((chips - self.code) ** 2), rel=1e-5
        )

    def test_spread_spectrum(self, system):
        weights, matrix, code = self.tensors()
        copy = system.embedded(weights, matrix, code, 0.03)
        scale = 0.03 * np.sqrt(np.mean(self.weights**2)) * np.sqrt(1000 / 32)
        np.testing.assert_allclose(copy, self.weights + scale * self.code @ self.matrix, atol=1e-5)
        moved = np.sqrt(np.mean((copy.numpy() - self.weights) ** 2) / np.mean(self.weights**2))
        assert moved == pytest.approx(0.03, rel=0.2)
        np.testing.assert_allclose(
            system.extracted(copy, weights, matrix), scale * self.matrix @ self.matrix.T @ self.code, atol=1e-5
        )

    def test_statistics_and_p_values(self, system):
        import torch

        words = np.concatenate([system.signs(count, 20, 5 + block).numpy() for block, count in enumerate((64, 36))])
        assert words.shape == (100, 20) and set(np.unique(words)) == {-1, 1}
        assert stats.binomtest(int((words > 0).sum()), words.size).pvalue > 1e-3
        chips = self.rng.normal(size=20)
        expected = words @ chips / np.linalg.norm(chips)
        for score in (system.statistics, system.statistics_by_tables):
            found = score(torch.tensor(chips, dtype=torch.float32), 100, 5, 64)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        tail = special.ndtr(-np.abs(expected)) / (4 * special.ndtr(-(2**0.5)))
        np.testing.assert_allclose(system.log_p_values(found), np.log(np.minimum(1, 200 * tail)), atol=1e-4)

    def test_the_network_is_the_one_in_flax(self, system):
        import jax

        from smark_jax import files, models

        network = models.CNN()
        params = models.init(network, jax.random.key(0), (28, 28, 1))
        images = self.rng.integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
        copy = system.network(files.flatten(params))
        assert sum(weight.numel() for weight in copy.parameters()) == compare.CNN_WEIGHTS
        np.testing.assert_allclose(
            copy(system.pixels(images)).detach(), models.apply_fn(network)(params, images), atol=1e-4
        )

    def test_it_does_what_it_times(self, side):
        assert side.weights(5000, 64, 0)["extract"]() == {"wrong_chips": 0}
        for arm in side.verdict(500, 304, 0).values():
            assert arm() == {"right": True}
        for case, params in (("losses", (500, 8)), ("copies", (3, 500, 8)), ("train", (2, 4))):
            for arm in side.CASES[case](*params, 0).values():
                arm()

    def test_fine_tuning_stops_at_no_bit_errors(self, side, tmp_path):
        import jax

        from smark_jax import files, models

        params = models.init(models.CNN(), jax.random.key(0), (28, 28, 1))
        images, labels = self.rng.integers(0, 256, (64, 28, 28, 1), dtype=np.uint8), np.arange(64) % 10
        digits = {f"{split}_images": images for split in ("train", "test")}
        digits |= {f"{split}_labels": labels for split in ("train", "test")}
        path = tmp_path / "model.npz"
        np.savez(path, **digits, **{f"weights:{name}": leaf for name, leaf in files.flatten(params).items()})
        for arm, _ in itertools.product(side.tune(str(path), 16, 0).values(), range(2)):
            assert 0 <= arm()["steps"] < 200
