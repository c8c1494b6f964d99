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
# # What the aggregator sees
#
# A gradient is not a summary that hides its images. Here somebody who sees what one party sends tries to get that
# party's digit back: from the bare gradient, from the masked message, and from the sum of several parties, which masks
# do not hide. Needs `pip install "smark-jax[notebooks]"`.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree

from smark_jax import aggregation, attacks, data, keys, models, parallel


def uniform(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -0.5, 0.5)


class LeNet(nn.Module):
    """The network of "Deep leakage from gradients" (Zhu et al. 2019): small and smooth, the attacker's best case."""

    @nn.compact
    def __call__(self, x):
        for strides in (2, 2, 1):
            x = nn.sigmoid(nn.Conv(12, (5, 5), strides, kernel_init=uniform, bias_init=uniform)(x))
        return nn.Dense(10, kernel_init=uniform, bias_init=uniform)(x.reshape(x.shape[0], -1))


apply_fn, params = models.apply_fn(LeNet()), models.init(LeNet(), jax.random.key(0), (28, 28, 1))
test = data.load("mnist_5k", "test")
images, labels = test.images[:4].astype(np.float32) / 255, jnp.asarray(test.labels[:4])

# %% [markdown]
# ## What four parties send
#
# Each has one digit. Its gradient becomes fixed-point words, and a mask made from keys that it shares with each other
# party is added, modulo 2^32. The masks of all parties sum to zero.

# %%
gradient = jax.jit(jax.grad(lambda p, x, y: parallel.cross_entropy(apply_fn(p, x), y)))
gradients = [gradient(params, images[i : i + 1], labels[i : i + 1]) for i in range(4)]
fixed_point = aggregation.FixedPoint(clip=2.0, num_parties=4)
pair_keys = aggregation.pair_keys([keys.derive(keys.from_bytes(bytes(32)), f"party {i}") for i in range(4)])
_, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.uint32), params))

bare, masked = [], []
for party, own in enumerate(gradients):
    rounding = aggregation.rounding_key(pair_keys[party], party, 0)
    bare.append(ravel_pytree(aggregation.encode(own, fixed_point, rounding))[0])
    masked.append(bare[-1] + aggregation.pairwise_mask(pair_keys[party], party, 0, bare[-1].size))
print("sum of masked words == sum of bare words:", bool((sum(masked) == sum(bare)).all()))

figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained", sharey=True)
for axis, words, title in zip(
    axes, (bare[0], masked[0]), ("party 0's words, bare", "party 0's words, masked"), strict=True
):
    axis.hist(np.asarray(words, np.float64), np.linspace(0, 2**32, 65), color="C0")
    axis.set(title=title, xlabel="word", ylabel="count", yscale="log")
plt.show()

# %% [markdown]
# ## Three attackers, the same attack
#
# DLG looks for images whose gradient is the one seen. The first attacker sees party 0's bare words, the second its
# masked ones, the third the sum of all four parties. All of them know the network, and are even told the labels.

# %%
total = sum(masked)  # what an honest aggregator ends with
seen = {
    "bare message": (aggregation.decode(unravel(bare[0]), fixed_point, 1), 1),
    "masked message": (aggregation.decode(unravel(masked[0]), fixed_point, 1), 1),
    "sum of four": (jax.tree.map(lambda leaf: leaf / 4, aggregation.decode(unravel(total), fixed_point, 4)), 4),
}
found = {
    name: np.asarray(
        attacks.invert_gradient(
            apply_fn,
            params,
            message,
            jax.random.key(1),
            shape=(count, 28, 28, 1),
            labels=labels[:count],
            method="dlg",
            steps=100 * count,
        ).images
    )
    for name, (message, count) in seen.items()
}


def psnr(image, original):
    return -10 * np.log10(np.mean((image - original) ** 2))


figure, axes = plt.subplots(4, 4, figsize=(6.4, 7), layout="constrained")
for row, (name, batch) in enumerate({"what the parties have": images, **found}.items()):
    for column in range(4):
        axis = axes[row, column]
        axis.set(xticks=[], yticks=[])
        if column < len(batch):
            axis.imshow(batch[column, ..., 0], cmap="gray", vmin=0, vmax=1)
            note = f"party {column}" if row == 0 else f"{psnr(batch[column], images[column]):.0f} dB"
            axis.set_xlabel(note)
        else:
            axis.axis("off")
    axes[row, 0].set_title(name, loc="left", fontsize=10)
figure.suptitle("Images, and their likeness to the original (PSNR)")
plt.show()

# %% [markdown]
# The bare message is the digit. The masked one is noise to whoever lacks the keys, and the attack ends in noise. But
# the **sum is not hidden**: training needs it, and the sum of four still shows three of the digits. More parties blur
# it without any guarantee; differential privacy is the remedy that has one.
#
# Go on: `docs/privacy.md` measures this on more digits, networks and parties, `docs/differential-privacy.md` adds the
# noise, `docs/federation.md` runs the protocol between organisations, with drop-outs.
