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
# # Mark a classifier, leak a copy, trace it
#
# A small CNN on real digits, trained here in well under a minute, and twenty customers.
# Needs `pip install "smark-jax[demo]"`.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from smark_jax import attacks, carriers, codes, data, embedding, extraction, keys, models, tracing

train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
network = models.CNN()
apply_fn = models.apply_fn(network)
base = models.init(network, jax.random.key(0), (28, 28, 1))
base = attacks.fine_tune(base, apply_fn, train.images, train.labels, epochs=2)
print("accuracy of the base:", models.accuracy(apply_fn, base, test.images, test.labels))

# %% [markdown]
# ## Issue twenty copies
#
# The `mark` says which weights carry and holds the secret direction of each of the 304 chips, and each customer has a
# codeword. All of it follows from one master key.

# %%
master = keys.from_bytes(bytes(range(32)))  # for a notebook that repeats itself; otherwise keys.new()
mark = carriers.mark(keys.derive(master, "carrier"), base)
codebook = codes.codebook(keys.derive(master, "code"), range(20))
copies = embedding.embed_batch(base, mark, codebook, strength=0.03)
copy = jax.tree.map(lambda leaf: leaf[7], copies)
print("accuracy of customer 7's copy:", models.accuracy(apply_fn, copy, test.images, test.labels))

# %% [markdown]
# ## What a chip looks like
#
# The copy's chips, read against the base: the intact copy shows its codeword exactly; after fine-tuning and pruning,
# noise has joined it, and the signs still stand.

# %%
tuned = attacks.fine_tune(copy, apply_fn, train.images, train.labels, epochs=1, seed=1)
leak = attacks.prune(tuned, 0.5)
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
for axis, (name, model) in zip(axes, {"intact copy": copy, "fine-tuned, then half pruned": leak}.items(), strict=True):
    chips = np.asarray(extraction.extract(model, base, mark))
    axis.scatter(np.arange(304), chips, c=np.asarray(codebook[7]), cmap="coolwarm", s=8)
    axis.set(title=name, xlabel="chip", ylabel="read-out" if axis is axes[0] else None)
figure.tight_layout()

# %% [markdown]
# ## Trace it
#
# Each customer's statistic has mean 0 and variance 1 unless it is their copy. The threshold keeps the probability of
# accusing any innocent customer below one in a million.

# %%
verdict = tracing.trace(extraction.extract(leak, base, mark), codebook, alpha=1e-6)
figure, axis = plt.subplots(figsize=(10, 2.5))
axis.bar(
    range(20),
    verdict.statistics,
    color=["C3" if s in {a.serial for a in verdict.accused} else "0.6" for s in range(20)],
)
axis.axhline(verdict.threshold, color="k", lw=1)
axis.axhline(-verdict.threshold, color="k", lw=1)
axis.set(xlabel="customer", ylabel="statistic T", xticks=range(20))
for accused in verdict.accused:
    print(f"customer {accused.serial}: T = {accused.statistic:.1f}, p < 1e{math.floor(accused.log10_p) + 1}")

# %% [markdown]
# ## A model that is nobody's copy accuses nobody

# %%
other = models.init(network, jax.random.key(1), (28, 28, 1))
other = attacks.fine_tune(other, apply_fn, train.images, train.labels, epochs=1, seed=2)
print("accused:", tracing.trace(extraction.extract(other, base, mark), codebook).accused)
print(
    "largest statistic:",
    float(jnp.abs(tracing.trace(extraction.extract(other, base, mark), codebook).statistics).max()),
)

# %% [markdown]
# Go on: `how_a_fingerprint_hides` turns the two knobs of a mark, `bring_your_own_model` marks a network of yours, and
# `docs/tutorial.md` has the whole way in fifteen lines.
