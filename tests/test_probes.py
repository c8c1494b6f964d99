import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smark_jax import blackbox, codes, keys, tracing

KEY = keys.from_bytes(bytes(32))
SHAPE = (24, 24, 1)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def probes():
    return blackbox.probes(KEY, 40, SHAPE, IMAGES)


@pytest.mark.parametrize("images", [None, IMAGES], ids=["patterns", "blends"])
def test_every_probe_carries_the_owners_commitment(images):
    found = blackbox.probes(KEY, 6, SHAPE, images)
    assert found.shape == (6, *SHAPE) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, blackbox.probes(KEY, 6, SHAPE, images))
    bits = blackbox.read_images(found, KEY).payload
    for number, row in enumerate(bits):
        text = np.packbits(row).tobytes()
        assert text[:32].hex() == keys.commitment(KEY)
        assert int.from_bytes(text[32:], "big") == number
    other = blackbox.probes(keys.from_bytes(bytes([1]) * 32), 6, SHAPE, images)
    assert (other != found).mean() > 0.5


def test_halves_are_halves_and_follow_the_pixels(probes):
    sides = blackbox.halves(probes, 10)
    assert (sides.sum(axis=1) == 0).all() and set(np.unique(sides)) == {-1, 1}
    np.testing.assert_array_equal(blackbox.halves(probes[::-1], 10), sides[::-1])
    assert abs(sides.mean(axis=0)).max() < 0.8  # no class is always inside
    changed = probes.copy()
    changed[0, 0, 0, 0] ^= 1
    assert (blackbox.halves(changed, 10) != sides).any(axis=1).tolist() == [True] + [False] * 39


def _answering(probes, word, num_classes=10, wrong=0.0, seed=0):
    """A suspect that answers by ``word``, but for a share of probes."""
    sides, rng = blackbox.halves(probes, num_classes), np.random.default_rng(seed)
    table = {image.tobytes(): i for i, image in enumerate(probes)}
    kept = np.where(rng.random(len(probes)) < wrong, -1, 1) * word

    def predict(images):
        rows = [table[image.tobytes()] for image in images]
        return np.array([rng.choice(np.flatnonzero(sides[i] == kept[i])) for i in rows])

    return predict


def test_answers_alone_accuse_whoever_they_follow(probes):
    probes = np.concatenate([probes, blackbox.probes(keys.from_bytes(bytes([2]) * 32), 264, SHAPE, IMAGES)])
    book = codes.codebook(keys.from_bytes(bytes([3]) * 32), range(200), 304)
    word = np.asarray(book[17])
    chips = blackbox.query(_answering(probes, word), probes, 10)
    np.testing.assert_array_equal(chips, word)
    noisy = blackbox.query(_answering(probes, word, wrong=0.2), probes, 10)
    assert [a.serial for a in tracing.trace(noisy, book, 1e-6).accused] == [17]
    chance = blackbox.query(lambda images: RNG.integers(0, 10, len(images)), probes, 10)
    assert not tracing.trace(chance, book, 1e-6).accused


def test_repeats_average_and_scores_count_by_their_largest(probes):
    word = np.where(RNG.random(40) < 0.5, -1, 1)
    answers = _answering(probes, word)
    scores = lambda images: np.eye(10, dtype=np.float32)[answers(images)]  # noqa: E731
    np.testing.assert_array_equal(blackbox.query(scores, probes, 10), word)
    calls = []

    def fickle(images):
        calls.append(len(images))
        found = answers(images)
        return found if len(calls) % 2 else (found + RNG.integers(0, 10, len(images))) % 10

    mixed = blackbox.query(fickle, probes, 10, repeats=4, batch_size=40)
    assert calls == [40] * 4
    assert set(np.unique(mixed * 2) % 1) == {0}  # quarters of -1 and +1: halves
    assert (np.sign(mixed) == word).mean() > 0.4 and np.abs(mixed).max() <= 1


def test_a_broken_query_goes_on_from_the_answers_it_paid_for(probes, tmp_path):
    word = np.where(RNG.random(40) < 0.5, -1, 1)
    answers, asked = _answering(probes, word), []

    def failing(images):
        if len(asked) == 3:
            raise ConnectionError("the API went away")
        asked.append(len(images))
        return answers(images)

    kept = blackbox.Answers(tmp_path / "answers.json", keys.derive(KEY, "answers"), {"target": "an API"})
    with pytest.raises(ConnectionError):
        blackbox.query(failing, probes, 10, batch_size=8, answers=kept)
    assert len(json.loads(blackbox.answers.unseal(kept.key, kept.path.read_bytes()))["answers"]) == 24
    later = []

    def working(images):
        later.append(len(images))
        return answers(images)

    np.testing.assert_array_equal(blackbox.query(working, probes, 10, batch_size=8, answers=kept), word)
    assert later == [8, 8]
    np.testing.assert_array_equal(blackbox.query(working, probes[::-1], 10, answers=kept), word[::-1])
    assert later == [8, 8]
    blackbox.query(working, probes, 10, repeats=2, answers=kept)
    assert later == [8, 8, 40]
    others = [(kept._replace(key=KEY), "somebody else wrote"), (kept._replace(about={}), "about")]
    for other, message in others:
        with pytest.raises(ValueError, match=message):
            blackbox.query(working, probes, 10, answers=other)
    with pytest.raises(ValueError, match="classes of 0 to 2"):
        blackbox.query(working, probes, 3, answers=kept)


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda images: np.zeros(3, int), r"class numbers of shape \(40,\)"),
        (lambda images: np.zeros((40, 7)), r"scores of shape \(40, 10\)"),
        (lambda images: np.full(40, 10), "classes of 0 to 9, but got 10 to 10"),
        (lambda images: np.zeros(40), "dtype float64"),
    ],
)
def test_wrong_answers_are_refused(probes, predict, message):
    with pytest.raises(ValueError, match=message):
        blackbox.query(predict, probes, 10)


def test_copies_learn_their_own_answers(probes):
    def apply(params, images):
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255 - 0.5
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    base = {
        "a": jnp.float32(RNG.normal(0, 0.05, (576, 64))),
        "b": jnp.float32(RNG.normal(0, 0.1, (64, 4))),
    }
    words = np.asarray(codes.codebook(KEY, [3, 4], 40))
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), base)
    options = {"epochs": 150, "batch_size": 30, "learning_rate": 3e-3}
    trained = blackbox.train_copies(copies, base, apply, IMAGES, probes, words, 4, probe_weight=1.0, **options)
    assert (trained.agreement > 0.9).all()
    for number, word in enumerate(words):
        params = jax.tree.map(lambda leaf, n=number: leaf[n], trained.params)
        chips = blackbox.query(lambda images, p=params: np.asarray(apply(p, images).argmax(axis=1)), probes, 4)
        assert (chips == word).mean() == pytest.approx(float(trained.agreement[number]), abs=0.03)
        assert (chips == words[1 - number]).mean() < 0.8
    with pytest.raises(ValueError, match="copies by probes"):
        blackbox.train_copies(copies, base, apply, IMAGES, probes, words[:1], 4)
    with pytest.raises(ValueError, match="batch_size of 1 to 60, but got 61"):
        blackbox.train_copies(copies, base, apply, IMAGES, probes, words, 4, batch_size=61)
    together = blackbox.train_copies(
        copies, base, apply, IMAGES, probes, words, 4, probe_weight=1.0, at_once=2, **options | {"epochs": 1}
    )
    apart = blackbox.train_copies(
        copies, base, apply, IMAGES, probes, words, 4, probe_weight=1.0, **options | {"epochs": 1}
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together.params, apart.params)
    # Without weight on probes the copies answer as the base: it was the probes' loss that taught them.
    untaught = blackbox.train_copies(copies, base, apply, IMAGES, probes, words, 4, probe_weight=0.0, **options)
    assert (untaught.agreement < 0.75).all()
    same = [(apply(base, IMAGES).argmax(axis=1) == answers).mean() for answers in _labels(apply, untaught.params)]
    assert min(same) > 0.9


def _labels(apply, copies):
    return jax.vmap(lambda params: apply(params, IMAGES).argmax(axis=1))(copies)


def test_probes_divide_the_base():
    """The base's probabilities of both halves, in float64, are more even than those of unchosen probes."""
    weights = RNG.normal(0, 0.02, (576, 6))

    def scores(images):
        return images.reshape(len(images), -1) / 255.0 @ weights

    def gaps(found):
        p = np.exp(scores(found))
        inside = (p * (blackbox.halves(found, 6) == 1)).sum(axis=1) / p.sum(axis=1)
        return np.abs(np.log(inside / (1 - inside)))

    chosen, first = (blackbox.probes(KEY, 20, SHAPE, IMAGES, s) for s in (scores, None))
    assert gaps(chosen).max() < np.median(gaps(first))
    numbers = [int.from_bytes(np.packbits(row).tobytes()[32:], "big") for row in blackbox.read_images(chosen, KEY)[0]]
    assert numbers == sorted(numbers) and 20 < numbers[-1] < 640
    np.testing.assert_array_equal(blackbox.probes(KEY, 640, SHAPE, IMAGES)[numbers], chosen)
    with pytest.raises(ValueError, match=r"probes: scores: expected logits of shape \(256, classes\)"):
        blackbox.probes(KEY, 20, SHAPE, IMAGES, lambda images: np.zeros(len(images)))
