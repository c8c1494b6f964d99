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
# # Parties on several devices: CPU, GPU, TPU
#
# Each data holder is a device. On one machine's CPU they are virtual devices, on a machine with several GPUs or TPU
# cores the real ones: `parallel.devices` takes accelerators where there are enough of them, and nothing else in this
# notebook changes. Needs `pip install "smark-jax[notebooks]"`.

# %%
import time

import jax

PARTIES = 4
jax.config.update("jax_num_cpu_devices", PARTIES)  # before the first computation; no effect on GPU or TPU devices

import flax.linen as nn
import matplotlib.pyplot as plt
import numpy as np
import optax

from smark_jax import aggregation, data, keys, models, parallel, training

for party, device in enumerate(parallel.devices(PARTIES)):
    print(f"party {party}: {device.device_kind} {device.id}")

# %% [markdown]
# ## One masked step, two engines
#
# Each party computes a gradient on its own batch, turns it into fixed-point words, adds its mask, and the devices add
# up words. The step is written once and mapped by `pmap` or by `shard_map`; both give the same bits.


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1).astype("float32") / 255)))


train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
apply_fn, start = models.apply_fn(Network()), models.init(Network(), jax.random.key(0), (28, 28, 1))
fixed_point = aggregation.FixedPoint(clip=1.0, num_parties=PARTIES)
split = training.partition(train.images, train.labels, PARTIES, seed=0)

trained, losses = {}, {}
for engine in ("pmap", "shard_map"):
    secrets = [keys.derive(keys.from_bytes(bytes(32)), f"party {party}") for party in range(PARTIES)]
    pair_keys = aggregation.pair_keys(secrets)  # to repeat itself; otherwise a keys.new() for each party
    step = parallel.train_step(apply_fn, optax.adam(2e-3), fixed_point, engine=engine)
    losses[engine], began = [], time.perf_counter()
    state = training.fit(
        step,
        step.init(start),
        training.batches(*split, batch_size=32, epochs=3, seed=1),
        pair_keys,
        lambda state, info, engine=engine: losses[engine].append(float(info.loss)),
    )
    trained[engine] = state.params
    accuracy = models.accuracy(apply_fn, state.params, test.images, test.labels)
    print(f"{engine}: accuracy {accuracy:.3f} after {len(losses[engine])} rounds, {time.perf_counter() - began:.1f} s")

same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), trained["pmap"], trained["shard_map"])
print("the same weights bit for bit:", all(jax.tree.leaves(same)))

# %% [markdown]
# ## What masks cost in accuracy: nothing
#
# The same rounds without masks and fixed point, on one device: the curves lie on each other. What is sent is rounded to
# a resolution far below the gradients' own noise, without bias, and the masks cancel exactly.

# %%
optimizer = optax.adam(2e-3)


@jax.jit
def plain_step(params, state, images, labels):
    def party_gradient(images, labels):
        loss, gradient = jax.value_and_grad(lambda p: parallel.cross_entropy(apply_fn(p, images), labels))(params)
        scale = jax.numpy.minimum(1.0, fixed_point.clip / optax.tree.norm(gradient))  # as parties clip theirs
        return loss, jax.tree.map(lambda leaf: leaf * scale, gradient)

    loss, gradient = jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.vmap(party_gradient)(images, labels))
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


params, state, losses["plain, one device"] = start, optimizer.init(start), []
for images, labels in training.batches(*split, batch_size=32, epochs=3, seed=1):
    params, state, loss = plain_step(params, state, images, labels)
    losses["plain, one device"].append(float(loss))
print(f"plain: accuracy {models.accuracy(apply_fn, params, test.images, test.labels):.3f}")

figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for (name, curve), style in zip(losses.items(), ("-", "--", ":"), strict=True):
    axis.plot(curve, style, label=name, lw=2)
axis.set(xlabel="round", ylabel="mean loss of the parties, nats", yscale="log")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The other accelerators
#
# - **Several GPUs or TPU cores in one machine:** run this notebook there. With fewer of them than parties, the parties
#   are CPU devices; take as many parties as `jax.device_count()`.
# - **Several hosts that trust each other:** the same step after `jax.distributed.initialize()`.
# - **Organisations that do not:** programs of their own, connected by Flower; this notebook's devices share one memory
#   and protect what crosses between them, not one organisation from another.
#
# Go on: `docs/distributed.md` for hosts, `docs/federation.md` for organisations, and the notebook
# `what_the_aggregator_sees` for what a message and a sum give away.
