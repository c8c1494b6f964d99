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
# # Bring your own model
#
# Everything but `smark_jax.models` takes a tree of parameters and, where the network must run, a function
# `apply_fn(params, images) -> logits`. Here are a Flax linen network with batch norm and a Flax nnx network, marked and
# traced by the same lines. Needs `pip install "smark-jax[notebooks]"`.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from smark_jax import alignment, attacks, carriers, codes, data, embedding, extraction, keys, models, tracing

train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")


def batches(size=100, epochs=2):
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for rows in rng.permutation(len(train.labels)).reshape(-1, size):
            yield train.images[rows].astype(np.float32) / 255, train.labels[rows]


# %% [markdown]
# ## Flax linen
#
# With batch norm, hand over the whole variables dict, `{"params": ..., "batch_stats": ...}`. Running statistics are
# never marked.


# %%
class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(256, use_bias=False)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x)


linen = Linen()
variables = linen.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
optimizer = optax.adam(1e-3)


@jax.jit
def linen_step(variables, state, images, labels):
    def loss(params):
        tree = {**variables, "params": params}
        logits, new = linen.apply(tree, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    gradient, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = optimizer.update(gradient, state)
    return {"params": optax.apply_updates(variables["params"], updates), **new}, state


state = optimizer.init(variables["params"])
for images, labels in batches():
    variables, state = linen_step(variables, state, images, labels)

# %% [markdown]
# ## Flax nnx
#
# `nnx.split` gives the graph, the parameters and the rest. The parameters are a tree like any other; `apply_fn` puts
# the parts together again.


# %%
class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(784, 256, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


graph, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)


def nnx_apply(params, images):
    return nnx.merge(graph, params, rest)(images)


@jax.jit
def nnx_step(params, state, images, labels):
    gradient = jax.grad(lambda p: optax.softmax_cross_entropy_with_integer_labels(nnx_apply(p, images), labels).mean())(
        params
    )
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state


state = optimizer.init(params)
for images, labels in batches():
    params, state = nnx_step(params, state, images, labels)

# %% [markdown]
# ## The same lines for both
#
# How strong a mark a network bears differs by a factor of ten, so let `calibrate` find out. Each model has a name of
# its own under the master key, and with it a mark and codewords of its own.

# %%
master = keys.from_bytes(bytes(range(32)))  # for a notebook that repeats itself; otherwise keys.new()
networks = {"linen": (models.apply_fn(linen), variables), "nnx": (nnx_apply, params)}
pixels = test.images.astype(np.float32) / 255
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
secrets = {}
for axis, (name, (apply_fn, base)) in zip(axes, networks.items(), strict=True):

    def score(model, apply_fn=apply_fn):
        return models.accuracy(apply_fn, model, pixels[:500], test.labels[:500])

    mark = carriers.mark(keys.derive(master, name, "carrier"), base)
    book = codes.codebook(keys.derive(master, name, "code"), range(1000))
    found = embedding.calibrate(base, mark, apply_fn, pixels[:500], num_copies=2)
    copy = embedding.embed(base, mark, book[42], found.strength)
    leak = attacks.quantise(attacks.prune(copy, 0.5), 5)
    verdict = tracing.trace(extraction.extract(leak, base, mark), book)
    secrets[name] = (mark, book, copy)
    print(
        f"{name}: {mark.carrier.num_carrying:,} weights carry; strength {found.strength:.3f}; "
        f"accuracy {score(base):.3f}, copy {score(copy):.3f}, leak {score(leak):.3f}; "
        f"accused: {[a.serial for a in verdict.accused]}"
    )
    axis.plot(verdict.statistics, ".", color="0.6", ms=3)
    axis.plot(42, verdict.statistics[42], "o", color="C3")
    axis.axhline(verdict.threshold, color="k", lw=1)
    axis.set(title=f"{name}: half pruned, then 5 bits", xlabel="customer", ylabel="statistic T")
plt.show()

# %% [markdown]
# ## Neurons in another order
#
# A leaker permutes the hidden units: the function stays, the weights move, and nothing can be read. `alignment.align`
# traces your `apply_fn` to see which axes belong together, and puts the units back where the base has them.

# %%
mark, book, copy = secrets["nnx"]
order = np.random.default_rng(0).permutation(256)
permuted = jax.tree.map(lambda leaf: leaf, copy)
permuted["hidden"]["kernel"].set_value(copy["hidden"]["kernel"].get_value()[:, order])
permuted["hidden"]["bias"].set_value(copy["hidden"]["bias"].get_value()[order])
permuted["out"]["kernel"].set_value(copy["out"]["kernel"].get_value()[order])
print("same logits:", bool(jnp.allclose(nnx_apply(permuted, pixels[:50]), nnx_apply(copy, pixels[:50]), atol=1e-4)))

aligned = alignment.align(permuted, params, nnx_apply, pixels[:1])
print(aligned.report)
for name, model in {"as it is": permuted, "aligned": aligned.params}.items():
    verdict = tracing.trace(extraction.extract(model, params, mark), book)
    print(f"{name}: accused {[a.serial for a in verdict.accused]}")

# %% [markdown]
# Go on: the notebook `a_pytorch_model` has the same for PyTorch, and `an_onnx_model` for ONNX; `docs/desk.md` has the
# command line, which needs no architecture at all, and `docs/robustness.md` what 52 attacks leave of a mark.
