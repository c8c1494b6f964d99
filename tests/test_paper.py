"""The paper's sections at a tiny size, and references for what they compute themselves."""

import json
import math
import types

import pytest

pytest.importorskip("matplotlib")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from section_checks import CONSOLE, run_and_resume

import experiments.paper.__main__ as paper
from experiments.common import networks, sections
from experiments.paper import common, comparators, fidelity, parties, report, schemes, splits, summary, uniqueness
from smark_jax import attacks, data, keys, models, privacy, training


class Linear(nn.Module):
    """The least that parties can train: masks and noise do not care for the network."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(images.shape[0], -1) / 255.0)


@pytest.fixture
def tiny_networks(monkeypatch):
    """Networks of a few thousand weights in place of those that the tables use, and untrained ones for bases."""
    small = common.DataSet(*[common.NormNet(6)] * 3, 1)
    monkeypatch.setitem(common.DATA, "mnist_5k", small)
    train, test = data.load("mnist_5k", "train[:128]"), data.load("mnist_5k", "test[:100]")

    def untrained(network, config, seed, on_progress=None):
        apply_fn, base = models.apply_fn(network), models.init(network, jax.random.key(seed), train.images.shape[1:])
        return networks.Subject(apply_fn, apply_fn, base, train.images, train.labels, test.images, test.labels)

    monkeypatch.setattr(common, "train", untrained)


def test_intervals_are_those_of_scipy():
    values = [0.971, 0.968, 0.975, 0.962]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = common.interval(values)
    np.testing.assert_allclose([found["mean"] - found["half"], found["mean"] + found["half"]], [low, high])
    assert found["n"] == 4
    assert common.interval([0.5]) == {"mean": 0.5, "half": None, "n": 1}


def _params(rng):
    kernels = {name: rng.normal(size=shape).astype(np.float32) for name, shape in _SHAPES.items()}
    return {
        "A": {"kernel": kernels["A"]},
        "B": {"kernel": kernels["B"]},
        "Norm_0": {"scale": rng.normal(size=5).astype(np.float32), "bias": np.ones(5, np.float32)},
        "Norm_1": {"scale": rng.normal(size=4).astype(np.float32)},
    }


_SHAPES = {"A": (3, 3, 1, 8), "B": (3, 3, 2, 4)}


def test_losses_of_the_comparators_are_their_formulas():
    rng = np.random.default_rng(0)
    params, code = _params(rng), rng.choice([-1.0, 1.0], 7)
    wide, short = rng.normal(size=(7, 18)), rng.normal(size=(7, 9))
    # By loops in float64, from the papers: bits 0 and 1 for Uchida, -1 and 1 for the others.
    mean = [np.mean([params["B"]["kernel"][i, j, c, o] for o in range(4)], dtype=np.float64)
            for i in range(3) for j in range(3) for c in range(2)]  # fmt: skip
    scale = [*params["Norm_0"]["scale"].astype(np.float64), *params["Norm_1"]["scale"].astype(np.float64)]
    uchida = deepmarks = fedtracker = 0.0
    for row in range(7):
        projected = sum(wide[row, k] * mean[k] for k in range(18))
        signed = sum(short[row, k] * scale[k] for k in range(9))
        bit, odds = (code[row] + 1) / 2, 1 / (1 + math.exp(-projected))
        uchida -= (bit * math.log(odds) + (1 - bit) * math.log(1 - odds)) / 7
        deepmarks += (projected - code[row]) ** 2 / 7
        fedtracker += max(0.0, 0.1 - code[row] * signed) / 7
    for loss, projection, wanted in (
        (schemes.uchida_loss, wide, uchida),
        (schemes.deepmarks_loss, wide, deepmarks),
        (schemes.fedtracker_loss, short, fedtracker),
    ):
        aim = {"projection": jnp.asarray(projection, jnp.float32), "code": jnp.asarray(code, jnp.float32)}
        np.testing.assert_allclose(loss(params, aim), wanted, rtol=1e-5)
    signed = schemes.sign(params, 0.01, aim)
    assert schemes.fedtracker_loss(signed, aim) == 0 < schemes.fedtracker_loss(params, aim)
    np.testing.assert_array_equal(signed["B"]["kernel"], params["B"]["kernel"])


def test_no_norm_layers_no_scales():
    with pytest.raises(ValueError, match="expected a network with norm layers"):
        schemes.scales({"Dense_0": {"kernel": jnp.ones((2, 2))}})


def test_exact_codewords_of_a_plane_name_their_coalition():
    base = {"Conv_0": {"kernel": np.zeros((3, 3, 16, 2), np.float32)}}

    def solve(params, images, labels, epochs, seed, weight, aim):
        mean = np.linalg.lstsq(np.asarray(aim["projection"], np.float64), np.asarray(aim["code"]), rcond=None)[0]
        return {"Conv_0": {"kernel": np.repeat(mean.reshape(3, 3, 16, 1), 2, axis=-1).astype(np.float32)}}

    subject = types.SimpleNamespace(base=base, images=None, labels=None)
    world = schemes.World(subject, lambda loss: solve, 57, 7, 1, keys.from_bytes(bytes(32)), None)
    scheme = schemes.deepmarks(world, {"weight": 1, "colluders": 5})
    copies = {serial: scheme.embed(serial, 0) for serial in (0, 17, 30, 44, 56)}
    for serial, copy in copies.items():
        assert scheme.bit_errors(copy, serial) == (0, 57)
        assert scheme.accuse(copy) == {serial}
    for coalition in ((0, 17), (17, 30, 56), tuple(copies)):
        assert scheme.accuse(comparators._mean([copies[serial] for serial in coalition])) == set(coalition)
    assert scheme.accuse(base) == set()


def test_agreement_beyond_chance_is_that_of_exact_counting():
    rng = np.random.default_rng(1)
    words = rng.choice([-1, 1], (50, 40))
    read = np.where(np.arange(40) < 35, words[3], -words[3]) * rng.uniform(0.1, 1, 40)

    def tail(agree):
        return sum(math.comb(40, k) for k in range(agree, 41)) / 2**40

    for alpha in (50 * tail(35), 50 * tail(35) * (1 - 1e-9)):
        expected = {j for j in range(50) if 50 * tail(int((np.sign(read) == words[j]).sum())) <= alpha}
        assert schemes.improbable(read, words, alpha) == expected
    assert expected == set()
    assert schemes.improbable(np.tile(read, (50, 1)), words, 1e-3) == schemes.improbable(read, words, 1e-3) == {3}


def test_training_on_without_a_mark_is_fine_tuning():
    rng = np.random.default_rng(2)
    params = {"kernel": jnp.asarray(rng.normal(size=(12, 3)), jnp.float32)}
    images, labels = rng.normal(size=(150, 12)).astype(np.float32), rng.integers(0, 3, 150)

    def apply_fn(params, x):
        return x @ params["kernel"]

    mine = schemes.trainer(apply_fn, schemes.no_loss)(params, images, labels, 2, 5, 0, {})
    theirs = attacks.fine_tune(params, apply_fn, images, labels, epochs=2, seed=5)
    np.testing.assert_allclose(mine["kernel"], theirs["kernel"], atol=1e-6)
    assert float(jnp.abs(mine["kernel"] - params["kernel"]).max()) > 1e-3


def test_tuning_takes_the_most_traced_at_a_tolerable_loss():
    rows = [
        {"settings": 1, "drop": 0.0, "score": 0.5},
        {"settings": 2, "drop": 0.009, "score": 0.9},
        {"settings": 3, "drop": 0.004, "score": 0.9},
        {"settings": 4, "drop": 0.02, "score": 1.0},
    ]
    assert comparators.choose(rows) == 3
    assert comparators.choose([rows[3], {**rows[3], "settings": 5, "drop": 0.03}]) == 4


def test_dirichlet_deals_everything_once_and_unequally():
    labels = np.repeat(np.arange(10), 40).astype(np.int32)
    images = np.arange(400)[:, None]
    found = {}
    for concentration in (0.1, 100.0):
        x, y = splits.dirichlet(images, labels, 4, concentration, seed=3)
        assert x.shape == (4, 100, 1)
        assert y.shape == (4, 100)
        assert sorted(x.reshape(-1)) == list(range(400))
        np.testing.assert_array_equal(labels[x[..., 0]], y)
        found[concentration] = splits.imbalance(y)
    assert found[0.1] > 0.4 > 0.2 > found[100.0]
    assert splits.imbalance(np.tile(np.arange(10), (3, 1))) < 1e-12
    assert splits.imbalance(np.array([[0, 0], [1, 1]])) == 0.5


# optax.global_norm, which jax_privacy calls.
@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
def test_masks_do_not_change_training_and_noise_follows_the_seed(monkeypatch):
    monkeypatch.setitem(common.DATA, "mnist_5k", common.DataSet(*[Linear()] * 3, 1))
    monkeypatch.setattr(privacy, "plan", lambda sampling, epsilon, delta: privacy.Guarantee(8, delta, 1.0, sampling))
    train = data.load("mnist_5k", "train[:128]")
    way = parties._Way(2, parties.Config((2,), seeds=1, epochs=2, batch=32), train)
    images, labels = training.partition(train.images, train.labels, 2, 0)
    start = way.start(0)
    monkeypatch.setattr(way, "start", lambda seed: start)

    def moved(kind, seed):
        task = parties._Task(2, "IID", kind, seed)
        after = parties._train(task, way, images, labels, 2, lambda params, done: None)
        return np.asarray(after["Dense_0"]["kernel"] - start["Dense_0"]["kernel"])

    masked, plain = moved("masked", 0), moved("plain mean", 0)
    assert np.abs(plain).max() > 5e-3
    np.testing.assert_allclose(masked, plain, atol=1e-3)
    first, again, other = moved("private", 0), moved("private", 0), moved("private", 1)
    np.testing.assert_array_equal(first, again)
    # On pixels that are always black there is nothing but noise.
    black = np.flatnonzero(images.reshape(-1, 784).max(axis=0) == 0)
    assert np.abs(plain[black]).max() < 1e-6 < np.abs(first[black]).min()
    assert abs(np.corrcoef(first[black].ravel(), other[black].ravel())[0, 1]) < 0.2


def test_sections_run_and_resume(tiny_networks, tmp_path):
    tiny = {
        fidelity: fidelity.Config(2, (64,), (0.05, 0.1), epochs=1, copies=1, customers=57),
        uniqueness: uniqueness.Config(copies=10, customers=600, epochs=1, num_chips=64, strength=0.05),
        parties: parties.Config(
            (2,), 1, 1, copies=1, batch=64, num_chips=64, customers=57, train_images=128, kinds=("plain mean",)
        ),
        comparators: comparators.Config(
            1,
            1,
            (("FedTracker-like", ({"bits": 32, "rate": 0.03},)), ("ours", ({"bits": 64, "strength": 0.05},))),
            embedding_epochs=1,
            attack_epochs=1,
            copies=2,
            coalitions=(2,),
            order=7,
            held_out=64,
        ),
    }
    documents = run_and_resume(tiny, tmp_path)

    cells = documents["fidelity"]["result"]["rows"]
    assert [(row["chips"], row["traced"], row["bit_errors"], row["innocents"]) for row in cells] == [
        (64, 2, 0, 0),
        (64, 2, 0, 0),
    ]
    assert all(row["accuracy"]["n"] == 2 for row in cells)

    *real, control = documents["uniqueness"]["result"]["rows"]
    assert not any(row["bound_exceeded"] for row in real)
    assert all(abs(row["variance"] - 1) < 0.1 for row in real)
    assert control["bound_exceeded"]

    runs = {(run["split"], run["kind"]): run for run in documents["parties"]["result"]["runs"]}
    assert len(runs) == 2
    assert all(run["traced"] == 1 and run["innocents"] == 0 for run in runs.values())
    assert runs["Dirichlet(0.5)", "plain mean"]["imbalance"] > runs["IID", "plain mean"]["imbalance"]

    rows = {row["scheme"]: row["suspects"] for row in documents["comparators"]["result"]["rows"]}
    assert [rows["ours"][name]["caught"] for name in ("intact", "permuted", "average of 2")] == [2, 2, 2]
    assert all(row["unrelated model"]["innocents"] == 0 for row in rows.values())
    assert rows["FedTracker-like"]["intact"]["caught"] == 2 > rows["FedTracker-like"]["permuted"]["caught"]

    modules = {name: module for name, module in paper.SECTIONS.items() if name != "summary"}
    text = report.write(tmp_path, modules).read_text()
    for name in modules:
        assert f"## {name}" in text
        assert f"`python -m experiments.paper --only {name} --config custom`; seed 0; commit " in text


def test_summary_takes_figures_from_results_and_names_what_is_missing(tmp_path):
    folder = tmp_path / "collusion" / "results"
    folder.mkdir(parents=True)
    rows = [{"rate": 0.02, "decoder": "joint"}, {"rate": 0.0125, "decoder": "single"}]
    result = {"alpha": 0.1, "rows": rows, "controls": [{"rate": 0.9}]}
    identity = {"section": "null", "config": "full", "parameters": {}, "seed": 3}
    document = {**identity, "commit": "abc", "device": "a card", "seconds": 7.5, "result": result}
    (folder / "null.json").write_text(json.dumps(document))
    config = summary.current(summary.Config(root=str(tmp_path)))
    found = sections.run_section(summary, config, 0, tmp_path, CONSOLE)["result"]["rows"]
    measured = [row for row in found if row["figure"] != "not measured yet"]
    assert len(measured) == 1 < len(found)
    assert measured[0] | {"promise": ""} == {
        "promise": "",
        "file": "experiments/collusion/results/null.json",
        "figure": "worst rate 0.020 at alpha = 0.1; a broken decoder 0.90 (control)",
        "command": "python -m experiments.collusion --only null --config full --seed 3",
        "seed": 3,
        "commit": "abc",
        "device": "a card",
        "seconds": 7.5,
    }
    assert all(row["command"].startswith("python -m experiments.") for row in found)
    (folder / "null.json").write_text(json.dumps({**document, "seed": 4}))
    assert summary.current(config) != config


def test_summary_reads_the_results_of_this_repository():
    rows = summary.run(summary.Config(), 0, sections.Meter())["rows"]
    assert sum(row["figure"] != "not measured yet" for row in rows) >= 13
    assert all(row["commit"] and row["device"] for row in rows if row["seconds"])


def test_bars_in_names_do_not_break_a_markdown_table():
    text = report.markdown(report.Table("t", ("a", "|T|"), [("x|y", "1")]))
    assert text.splitlines()[2:] == [r"| a | \|T\| |", "| --- | ---: |", r"| x\|y | 1 |"]


def test_paper_says_what_to_do_without_the_data(monkeypatch, capsys, tmp_path):
    def load(name, split, data_dir=None):
        raise ConnectionError(f"{name!r} is not on this machine and could not be downloaded; ...")

    monkeypatch.setattr(data, "load", load)
    with pytest.raises(SystemExit):
        paper.main(["--data", "cifar10", "--out", str(tmp_path)])
    assert "TFDS_DATA_DIR" in capsys.readouterr().err


def test_paper_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        paper.main(["--help"])
    assert "--config full --data cifar10" in capsys.readouterr().out
