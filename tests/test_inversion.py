"""Inversion against networks whose answer is known, against masks, and the experiment at a tiny size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parties import party_secrets
from test_parallel import apply_linear

from smark_jax import aggregation, attacks, data, parallel

SHAPE, CLASSES = (1, 6, 5, 1), 4


def linear_params(seed=0):
    rng = np.random.default_rng(seed)
    pixels = int(np.prod(SHAPE[1:]))
    return {"w": jnp.float32(rng.normal(size=(pixels, CLASSES))), "b": jnp.float32(rng.normal(size=CLASSES))}


def gradient_of(params, images, labels):
    return jax.grad(lambda p: parallel.cross_entropy(apply_linear(p, images), labels))(params)


def one_image(seed=1):
    return jnp.float32(np.random.default_rng(seed).uniform(size=SHAPE)), jnp.array([2])


def exact_image(gradient):
    """Column c of dW is the image times entry c of db, so that their quotient is the image: no search."""
    column = int(np.abs(gradient["b"]).argmax())
    return (np.asarray(gradient["w"])[:, column] / np.asarray(gradient["b"])[column]).reshape(SHAPE)


def masked(gradient, round=0, with_mask=True):
    """The gradient as words of one of five parties, decoded as if they were a sum of one."""
    fixed_point = aggregation.FixedPoint(clip=4.0, num_parties=5)
    words = aggregation.encode(gradient, fixed_point, jax.random.key(round))
    flat, unravel = jax.flatten_util.ravel_pytree(words)
    if with_mask:
        flat = flat + aggregation.pairwise_mask(aggregation.pair_keys(party_secrets(5))[0], 0, round, flat.size)
    return aggregation.decode(unravel(flat), fixed_point, 1)


def invert(gradient, *, params=None, **changed):
    arguments = {"shape": SHAPE, "labels": jnp.array([2]), "steps": 300} | changed
    return attacks.invert_gradient(apply_linear, params or linear_params(), gradient, jax.random.key(5), **arguments)


def test_cosine_finds_the_image_that_division_gives():
    image, label = one_image()
    gradient = gradient_of(linear_params(), image, label)
    reference = exact_image(gradient)
    np.testing.assert_allclose(reference, image, atol=1e-4)
    # The objective trades a little of the match for smoothness; these pixels are noise, far from smooth.
    assert np.square(invert(gradient, method="cosine").images - reference).mean() < 3e-3


def test_dlg_finds_the_image_that_division_gives_and_its_label():
    gradient = gradient_of(linear_params(), *one_image())
    found = invert(gradient, method="dlg", labels=None)
    np.testing.assert_allclose(found.images, exact_image(gradient), atol=1e-2)
    assert found.labels.tolist() == [2]


def test_cosine_disregards_the_scale_of_the_gradient():
    gradient = gradient_of(linear_params(), *one_image())
    scaled = jax.tree.map(lambda leaf: 1024 * leaf, gradient)  # A power of two: not one bit is rounded.
    np.testing.assert_allclose(invert(scaled, steps=20).images, invert(gradient, steps=20).images, atol=1e-4)


@pytest.mark.parametrize("label", range(CLASSES))
def test_infer_label_is_the_true_one(label):
    for seed in range(10):
        gradient = gradient_of(linear_params(seed), one_image(seed)[0], jnp.array([label]))
        assert int(attacks.infer_label(gradient["b"])) == label
        assert int(attacks.infer_label(gradient["w"].sum(axis=0))) == label  # no bias, inputs nowhere negative
        assert int((gradient["b"] < 0).sum()) == 1


def test_masked_gradient_gives_no_more_than_chance_and_the_encoding_alone_hides_nothing():
    errors = {True: [], False: []}
    for trial in range(4):
        image, label = one_image(trial)
        for with_mask, kept in errors.items():
            seen = masked(gradient_of(linear_params(), image, label), trial, with_mask)
            kept.append(float(np.square(invert(seen, labels=label).images - image).mean()))
    grey = 1 / 12  # the variance of uniform pixels: what guessing 0.5 costs
    assert min(errors[True]) > grey
    assert max(errors[False]) < grey / 10


def test_inversion_reports_its_steps_and_keeps_the_best():
    gradient, chunks = gradient_of(linear_params(), *one_image()), []
    few = invert(gradient, steps=30)
    more = invert(gradient, steps=120, on_chunk=chunks.append)
    assert chunks == [50, 50, 20]
    assert float(more.objective) < float(few.objective)
    assert float(more.images.min()) >= 0
    assert float(more.images.max()) <= 1


def test_inversion_runs_under_vmap():
    images = jnp.stack([one_image(seed)[0] for seed in range(3)])
    gradients = jax.vmap(lambda image: gradient_of(linear_params(), image, jnp.array([2])))(images)
    found = jax.vmap(lambda gradient: invert(gradient, steps=100).images)(gradients)
    assert np.square(found - images).mean() < 0.02


def test_inversion_refuses_bad_input():
    gradient = gradient_of(linear_params(), *one_image())
    for changed, message in (
        ({"method": "lbfgs"}, "a method among cosine, dlg"),
        ({"shape": (6, 5, 1)}, r"shape \(B, H, W, C\)"),
        ({"steps": 0}, "steps to be a whole number"),
        ({"labels": jnp.array([2, 2])}, "1 whole-number labels"),
        ({"labels": jnp.array([2.0])}, "argmax"),
        ({"labels": jnp.array([CLASSES])}, "below 4"),
    ):
        with pytest.raises(ValueError, match=message):
            invert(gradient, **changed)
    with pytest.raises(ValueError, match=r"leaf 'b': \(4,\).*got absent"):
        invert({"w": gradient["w"]})
    with pytest.raises(ValueError, match="finite gradient"):
        invert(gradient | {"b": gradient["b"].at[1].set(jnp.nan)})
    with pytest.raises(ValueError, match="other than zero"):
        invert(jax.tree.map(jnp.zeros_like, gradient))
    with pytest.raises(ValueError, match=r"infer_label.*shape \[classes\]"):
        attacks.infer_label(gradient["w"])


# The experiment


def test_inversion_sections_run_and_resume(tmp_path, monkeypatch):
    for package in ("matplotlib", "skimage"):
        pytest.importorskip(package)
    import section_checks

    from experiments.common import sections
    from experiments.inversion import single, sums

    tiny = {
        single: single.Config((single.Case("LeNet", "fresh", "dlg", steps=40, digits=2),)),
        sums: sums.Config((sums.Case("LeNet", "dlg", (1,), steps=40, trials=2),)),
    }
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(20, 28, 28, 1), dtype=np.uint8)
    monkeypatch.setattr(data, "load", lambda name, split: data.Dataset(noise, rng.integers(10, size=20), 10))
    documents = section_checks.run_and_resume(tiny, tmp_path)
    changed = dataclasses.replace(tiny[sums], cases=(sums.Case("LeNet", "dlg", (1,), steps=20),))
    again = sections.run_section(sums, changed, 0, tmp_path, section_checks.CONSOLE)
    assert [row["steps"] for row in again["result"]["rows"]] == [20]

    result = documents["single"]["result"]
    rows = {row["message"]: row for row in result["rows"]}
    assert rows["unmasked"]["psnr"] > result["control"]["psnr"] + 3 > rows["masked"]["psnr"] + 3
    assert (rows["unmasked"]["labels_right"], rows["unmasked"]["better_than_control"]) == (2, 2)
    assert rows["masked"]["better_than_control"] == 0
    for test in result["uniformity"]:
        refused = min(test["bytes_p"], test["bits_p"]) < result["level"]
        assert refused == (test["message"] == "unmasked")


def test_privacy_measures():
    pytest.importorskip("skimage")
    from experiments.inversion import common, single

    rng = np.random.default_rng(0)
    originals = rng.uniform(size=(5, 28, 28, 1)).astype(np.float32)
    noisy = (originals + 0.1 * np.where(originals > 0.5, -1, 1)).astype(np.float32)
    np.testing.assert_array_equal(common.matched(noisy[[3, 0, 4, 2, 1]], originals), noisy)
    measured = common.likeness(noisy[0], originals[0])
    np.testing.assert_allclose(measured[:2], [0.01, 20], rtol=1e-4)  # errors of exactly 0.1
    assert measured.ssim < common.likeness(originals[0] * 0.999, originals[0]).ssim <= 1

    # Of 200 uniform samples, tests at 1 % refuse about two each; of words short of one bit, all.
    uniform = [single.uniformity(rng.integers(2**32, size=4096, dtype=np.uint32)) for _ in range(200)]
    for name in ("bytes_p", "bits_p"):
        assert sum(test[name] < 0.01 for test in uniform) < 12
    short = single.uniformity(rng.integers(2**32, size=4096, dtype=np.uint32) & np.uint32(0xFFFFFFFE))
    assert max(short["bytes_p"], short["bits_p"]) < 1e-10


def test_inversion_help_lists_examples(capsys):
    for package in ("matplotlib", "skimage"):
        pytest.importorskip(package)

    import experiments.inversion.__main__ as experiment

    with pytest.raises(SystemExit):
        experiment.main(["--help"])
    assert "--only sums --seed 7" in capsys.readouterr().out
