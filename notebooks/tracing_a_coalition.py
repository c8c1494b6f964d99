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
# # Tracing a coalition
#
# Ten of 100,000 customers put their copies together, so that no copy's fingerprint stands out any more. The joint
# decoder still finds them. Needs `pip install "smark-jax[notebooks]"`.

# %%
import math

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np

from smark_jax import attacks, carriers, codes, data, embedding, extraction, keys, models, tracing


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(256)(x.reshape(x.shape[0], -1) / 255.0)))


train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
apply_fn, base = models.apply_fn(Network()), models.init(Network(), jax.random.key(0), (28, 28, 1))
base = attacks.fine_tune(base, apply_fn, train.images, train.labels, epochs=3)

master = keys.from_bytes(bytes(range(32)))  # for a notebook that repeats itself; otherwise keys.new()
mark = carriers.mark(keys.derive(master, "carrier"), base)
registry = codes.Codebook(keys.derive(master, "code"), 100_000)  # words are made when needed, never held whole

# %% [markdown]
# ## Ten customers average their copies
#
# An average of ten carries a tenth of each codeword. The model is as good as ever: averaging costs the colluders
# nothing.

# %%
guilty = np.random.default_rng(0).choice(registry.num_customers, 10, replace=False).tolist()
copies = embedding.embed_batch(base, mark, codes.codebook(registry.key, guilty))
pirate = attacks.average(copies)
chips = extraction.extract(pirate, base, mark)
for name, model in {"base": base, "average of ten copies": pirate}.items():
    print(f"accuracy of the {name}: {models.accuracy(apply_fn, model, test.images, test.labels):.3f}")

# %% [markdown]
# ## One customer at a time, or all together
#
# Tested alone, the colluders stay below the threshold: to each of them the other nine are noise. The joint decoder
# explains the read-out by several codewords at once and tests each suspect on what the *others* leave over, in a run
# that never saw the suspect's own codeword. That last condition is what the bound on accusing innocents rests on.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained", sharey=True)
for axis, decoder in zip(axes, ("single", "joint"), strict=True):
    verdict = tracing.trace(chips, registry, alpha=1e-6, decoder=decoder)
    accused = {accusation.serial for accusation in verdict.accused}
    axis.hist(np.abs(np.delete(verdict.statistics, guilty)), 60, color="0.7", label="innocent")
    axis.plot(np.abs(verdict.statistics[guilty]), np.full(10, 3), "v", color="C3", label="colluder")
    axis.axvline(verdict.threshold, color="k", lw=1, label="threshold")
    caught, innocent = len(accused & set(guilty)), len(accused - set(guilty))
    axis.set(title=f"{decoder}: {caught} of 10 caught, {innocent} innocent", xlabel="|T|", yscale="log")
axes[0].set_ylabel("customers")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Each accusation has a p-value of its own, corrected for all 100,000 customers, and an estimate of the customer's
# share:

# %%
for accused in sorted(verdict.accused, key=lambda accusation: accusation.serial):
    p_value = f"1e{math.floor(accused.log10_p) + 1}"
    print(f"customer {accused.serial:6}: T = {accused.statistic:5.1f}, p < {p_value}, share {accused.share:.0%}")

# %% [markdown]
# ## Other ways to mix
#
# Median, extremes, a random colluder for each weight, or an average that leans away from somebody: on a dense carrier
# all of it reads as a mean of codewords plus noise.

# %%
key = jax.random.key(2)
for name in ("median", "minimum", "interleave", "extrapolate"):
    model = attacks.COLLUSIONS[name](copies, key)
    found = tracing.trace(extraction.extract(model, base, mark), registry)
    accused = {accusation.serial for accusation in found.accused}
    accuracy = models.accuracy(apply_fn, model, test.images, test.labels)
    caught, innocent = len(accused & set(guilty)), len(accused - set(guilty))
    print(f"{name:12} accuracy {accuracy:.3f}: {caught:2} of 10, {innocent} innocent")

# %% [markdown]
# ## How large may a coalition be?
#
# That depends on how much noise there is besides. Here the average is also buried under noise of a fifth of each
# layer's spread. Past its limit the decoder finds fewer, or none; it does not begin to accuse innocents.

# %%
SIZES = (1, 4, 8, 12, 16)
many = np.random.default_rng(1).choice(registry.num_customers, max(SIZES), replace=False)
all_copies = embedding.embed_batch(base, mark, codes.codebook(registry.key, many))
pirates = [jax.tree.map(lambda leaf, size=size: leaf[:size].mean(axis=0), all_copies) for size in SIZES]
noisy = [attacks.add_noise(model, jax.random.key(3), 0.2) for model in pirates]
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for decoder, marker in (("joint", "o-"), ("single", "s--")):
    caught, innocents = [], 0
    for size, model in zip(SIZES, noisy, strict=True):
        found = tracing.trace(extraction.extract(model, base, mark), registry, decoder=decoder)
        accused = {accusation.serial for accusation in found.accused}
        caught.append(len(accused & set(many[:size].tolist())))
        innocents += len(accused) - caught[-1]
    axis.plot(SIZES, caught, marker, label=f"{decoder}, {innocents} innocents accused")
axis.plot(SIZES, SIZES, ":", color="0.5", label="everybody")
axis.set(xlabel="colluders who average their copies", ylabel="colluders accused")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Go on: `docs/tracing.md` has coalitions among a million customers, other codes under the same attacks and the false
# accusations counted; `docs/explanation/guarantees.md` states what is proved.
