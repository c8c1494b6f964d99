import itertools
import math

import pytest

pytest.importorskip("matplotlib")

import jax.numpy as jnp
import numpy as np
from scipy import stats
from section_checks import run_and_resume

import experiments.robustness.__main__ as robustness
from experiments.common import real
from experiments.robustness import (
    architectures,
    coalitions,
    innocents,
    real_networks,
    recipes,
    removal,
    rewrites,
    strength,
    suite,
)
from smark_jax import models

pytestmark = pytest.mark.usefixtures("small_cnn")


def test_rewritten_copies_are_traced_after_alignment_only(tmp_path):
    tiny = rewrites.Config(
        compositions=2,
        epochs=1,
        networks=("concatenating",),
        train_images=320,
        customers=1000,
        combined=("clique",),
        large=False,
    )
    document = run_and_resume({rewrites: tiny}, tmp_path)["rewrites"]
    (row,) = document["result"]["networks"]
    assert all(found["traced"] and not found["traced_unaligned"] for found in row["compositions"])
    assert max(found["logits"] for found in row["compositions"]) < 1e-3
    assert sum(found["wrong"] for found in row["compositions"]) == 0
    assert row["unrelated"] | {"similarity": 0, "innocent_mean": 0, "largest": 0} == {
        "refused": True,
        "similarity": 0,
        "accused": 0,
        "innocent_mean": 0,
        "largest": 0,
    }


def test_copies_of_a_transformer_are_traced_after_alignment_only(tmp_path):
    tiny = architectures.Config(1, 1, 1, ("ViT",), 1, 1, train_images=128, customers=1000, damages=("int8",))
    (row,) = run_and_resume({architectures: tiny}, tmp_path)["architectures"]["result"]["networks"]
    (found,), others = row["rewrites"], row["independents"]
    assert found["traced"] and not found["unaligned"]["traced"] and not row["unfollowed"]
    assert found["logits"] < 1e-3 and found["T"] == pytest.approx(row["intact"], abs=0.1)
    assert [(one["damage"], one["order"]) for one in row["damaged"]] == list(
        itertools.product(tiny.damages, architectures.ORDERS)
    )
    assert all(one["traced"] for one in row["damaged"])
    assert [(one["trained"], one["answer"], one["accused"]) for one in others] == [
        (trained, "not a copy", 0) for trained in (True, False)
    ]
    assert [one["form"] for one in row["forms"]] == list(architectures.FORMS)
    assert [one["reason"] for one in row["forms"] if one["answer"] == "error"] == []
    assert sum(one["wrong"] for one in (found, found["unaligned"], *row["damaged"], *row["forms"])) == 0


def test_removal_attacks_are_set_against_the_accuracy_they_keep(tmp_path):
    tiny = removal.Config(
        chips=(64,),
        embeddings=("trained",),
        most_epochs=1,
        epochs=1,
        max_drop=0.05,
        train_images=320,
        customers=1000,
        only=("none", "noise", "L2 burst", "distil"),
    )
    result = run_and_resume({removal: tiny}, tmp_path)["removal"]["result"]
    rows = result["rows"]
    assert len(rows) == 1 + 4 + 3 + 2
    assert all(row["traced"] for row in rows if row["attack"] in ("none", "noise"))
    # The control: students owe the copy no weight.
    assert not any(row["traced"] for row in rows if row["attack"] == "distil")
    assert sum(row["wrong"] for row in rows) == 0


def test_strength_is_set_against_what_attacks_leave(tmp_path):
    tiny = strength.Config(
        (0.01, 0.1), ("all",), copies=2, attack_epochs=1, epochs=1, train_images=320, networks=("CNN",)
    )
    result = run_and_resume({strength: tiny}, tmp_path)["strength"]["result"]
    rows, (found,) = result["rows"], result["calibrations"]
    assert found["all"]["strength"] > 0 and found["all"]["mean_drop"] <= tiny.max_drop
    assert found["all"]["worst_drop"] <= 3 * tiny.max_drop
    assert [(row["layers"], row["strength"]) for row in rows] == [("all", 0.01), ("all", 0.1)]
    weak, strong = (row["attacks"] for row in rows)
    assert all(strong[name]["T"] > weak[name]["T"] for name in ("fine-tune", "noise 0.5"))


def test_the_suite_sets_attacks_against_what_training_from_scratch_costs(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.TARGETS, "CNN", suite.Target(models.CNN(width=8), recipes.CNN, 1))
    tiny = suite.Config(
        ("CNN",),
        most_epochs=1,
        epochs=2,
        scratch_epochs=2,
        scratch_seeds=1,
        copies=2,
        num_chips=64,
        customers=1000,
        train_images=320,
        only=("none", "shift logits", "new dense layers", "R0"),
    )
    (found,) = run_and_resume({suite: tiny}, tmp_path)["suite"]["result"]["networks"]
    assert len(found["scratch"]["passes"]) == 8 and found["scratch"]["passes"][-1] == 2 * 320
    assert all(low <= high for low, high in itertools.pairwise(found["scratch"]["accuracy"]))
    rows = {(row["attack"], row["setting"]): row for row in found["rows"]}
    assert len(rows) == 1 + 2 + 2 + 1
    assert rows["none", ""]["traced"] and rows["none", ""]["accuracy"] == rows["shift logits", "1 rms"]["accuracy"]
    curve = list(zip(*found["scratch"].values(), strict=True))
    for row in rows.values():
        needed = next((passes for passes, accuracy in curve if accuracy >= row["accuracy"]), 2 * 320)
        assert row["cost"] == row["labelled"] / needed and row["training"] == row["trained"] / needed
    labelled, own = rows["new dense layers", "1 epoch"], rows["new dense layers", "own answers, 1 epoch"]
    assert (labelled["labelled"], labelled["trained"], labelled["unlabelled"]) == (320, 320, 0)
    assert (own["labelled"], own["trained"], own["unlabelled"]) == (0, 320, 320)
    assert rows["R0", "jitter 0.3"]["unlabelled"] == 320
    assert sum(row["wrong"] for row in found["rows"]) == 0


def test_innocents_are_accused_within_the_bound_and_by_the_control_always(tmp_path):
    tiny = innocents.Config(60, control=6, sources=1, epochs=1, num_chips=64, train_images=320)
    result = run_and_resume({innocents: tiny}, tmp_path)["innocents"]["result"]
    assert [row["suspects"] for row in result["rows"]] == [20, 20, 20]
    assert sum(row["accused"] for row in result["rows"]) <= stats.binom.isf(1e-4, 60, 0.1)
    assert result["control"] == {"suspects": 6, "accused": 6}


def test_robustness_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        robustness.main(["--help"])
    assert "--config full" in capsys.readouterr().out


def test_marks_on_real_networks_are_judged_by_their_answers(tmp_path, monkeypatch):
    """A stand-in of 9,000 random weights; the network itself needs a package."""
    rng = np.random.default_rng(0)
    shapes = {"_stem.weight": (64, 48), "_blocks.0.weight": (96, 64), "_fc.weight": (10, 96), "_fc.bias": (10,)}
    params = {name: np.float32(rng.normal(size=shape) / 8) for name, shape in shapes.items()}

    def apply_fn(p, x):
        x = x.reshape(x.shape[0], -1)
        for name in ("_stem", "_blocks.0"):
            x = jnp.tanh(x @ p[f"{name}.weight"].T)
        return x @ p["_fc.weight"].T + p["_fc.bias"][None]

    def crops(use, number):
        return real.Crops(rng.integers(0, 256, (number, 4, 4, 3), np.uint8), ("noise",) * number)

    network = real.Network(
        "stand-in", params, apply_fn, lambda images: np.float32(images / 128 - 1), 10, r"^_fc\.", (r"^_blocks\.",)
    )
    monkeypatch.setattr(real_networks, "NETWORKS", {"stand-in": lambda: network})
    monkeypatch.setattr(real, "natural_images", crops)
    tiny = real_networks.Config(
        networks=("stand-in",),
        marks=("channels",),
        shape_images=16,
        strength_images=16,
        judging_images=40,
        after=20,
        copies=2,
        customers=100,
        num_chips=64,
        only=("none", "int8", "new head", "new stage 1", "PCA 99 %"),
        coalitions=((128, 2),),
    )
    result = run_and_resume({real_networks: tiny}, tmp_path)["real_networks"]["result"]
    (found,) = result["networks"]
    (row,) = found["rows"]
    assert all(copy["T"] > 7.9 and copy["same"] > 30 and copy["change"] < 0.03 for copy in row["copies"])
    traced = {one["attack"]: one["traced"] for one in row["attacks"]}
    assert traced["none"] and traced["int8"] and traced["new head"]
    assert not any(one["wrong"] for one in row["attacks"])
    assert [(one["caught"], one["wrong"]) for one in row["coalitions"]] == [(2, 0)]


def test_coalitions_are_caught_within_shannons_limit(tmp_path):
    tiny = coalitions.Config(((64, (2,)),), seeds=1, customers=100, epochs=1, train_images=320)
    result = run_and_resume({coalitions: tiny}, tmp_path)["coalitions"]["result"]
    for row in coalitions.summary(result):
        assert row["all caught"] <= row["limit"] and row["wrong"] == 0
    assert coalitions.summary(result)[0]["all caught"] >= 1  # intact


def test_shannons_limit_is_that_of_its_definition():
    assert coalitions.bits_per_chip(1, np.inf) == pytest.approx(1)  # a sign
    assert coalitions.bits_per_chip(2, np.inf) == pytest.approx(1.5)  # -1, 0 or 1: 1/4, 1/2, 1/4
    assert coalitions.bits_per_chip(2, 1.0) == pytest.approx(0.5)
    for noise in (0.0, 0.5):
        found = coalitions.limit(64, 1000, noise)
        bits = [64 * coalitions.bits_per_chip(k, 1 / (k * noise) if noise else np.inf) for k in (found, found + 1)]
        assert math.log2(math.comb(1000, found)) <= bits[0]
        assert math.log2(math.comb(1000, found + 1)) > bits[1]


def test_harm_is_counted_and_measured_in_nats():
    before = np.log([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    after = np.log([[0.5, 0.4, 0.1], [0.3, 0.4, 0.3]])
    found = real_networks.harm(before, after)
    expected = [0.6 * np.log(0.6 / 0.5) + 0.3 * np.log(0.3 / 0.4), 0.4 * np.log(4 / 3) + 0.35 * np.log(7 / 8)]
    expected[1] += 0.25 * np.log(0.25 / 0.3)
    assert found["same"] == found["same_sure"] == 1
    assert found["kl"] == pytest.approx(np.mean(expected))
