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
# # A PyTorch model
#
# You trained a classifier in PyTorch and sell copies of it. Here each customer gets a copy with a fingerprint of its
# own, one copy leaks in three other forms, and each of them names its customer. PyTorch is not needed: files are read
# without it, and nothing in them runs. Needs `pip install "smark-jax[notebooks]"`.
#
# ## The file
#
# `data/digits.pt2` is a small network for digits: three convolutions with batch norm, two dense layers. A `.pt2` file
# holds the network as well as its weights. In PyTorch, three lines write it:
#
# ```python
# several = ({0: torch.export.Dim("batch")},)  # any number of images
# program = torch.export.export(model.eval(), (images[:2].clone(),), dynamic_shapes=several)
# torch.export.save(program, "digits.pt2")
# ```
#
# `files.network` gives its weights by name, and a function of JAX that computes its answers.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from smark_jax import attacks, carriers, codes, data, embedding, extraction, files, keys, tracing

BASE = Path("data/digits.pt2")
base, apply_fn = files.network(BASE)
for name in list(base)[:5]:
    print(f"{name:22} {base[name].shape}")
print(f"... {sum(leaf.size for leaf in base.values()):,} numbers in {len(base)} leaves")

# %% [markdown]
# ## The same answers as in PyTorch
#
# Images go in as PyTorch takes them: channels first, and in the scale of the training. `digits_logits.npy` holds what
# PyTorch answered to the first 100 test images.

# %%
test = data.load("mnist_5k", "test")
images = test.images.transpose(0, 3, 1, 2).astype(np.float32) / 255
expected, logits = np.load("data/digits_logits.npy"), np.asarray(apply_fn(base, images[:100]))
print(f"largest difference of 1,000 logits: {np.abs(logits - expected).max():.0e}")

ROW = 45
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4), width_ratios=(1, 3), layout="constrained")
left.imshow(images[ROW, 0], cmap="gray_r")
left.set(xticks=[], yticks=[], title="image")
for shift, (name, values) in zip((-0.2, 0.2), {"PyTorch": expected, "JAX": logits}.items(), strict=True):
    right.bar(np.arange(10) + shift, values[ROW], 0.4, label=name)
right.set(xticks=range(10), xlabel="digit", ylabel="logit")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## How far may each weight move?
#
# A fingerprint moves weights. Some bear much and some little, so the *shape* says how far each may go. It takes a few
# dozen images, without labels. `calibrate` then finds the *strength*: the largest at which a copy's logits change by
# 0.8 %. It looks at other images than the shape did.

# %%
master = keys.from_bytes(bytes(range(32)))  # for a notebook that repeats itself; otherwise keys.new(), and keep it
shape = carriers.shape(base, apply_fn, images[:64])
mark = carriers.mark(keys.derive(master, "digits", "carrier"), base, shape=shape)
found = embedding.calibrate(base, mark, apply_fn, images[64:320])
mark = mark._replace(strength=found.strength)
print(f"{mark.spec.num_weights:,} weights carry; strength {found.strength:.4f}")

# %% [markdown]
# ## What will be traced?
#
# Before the first copy is made, `plan` predicts what its fingerprint survives. T says how clearly a suspect names its
# customer; an accusation takes the threshold.

# %%
plan = embedding.plan(mark, customers=1000)
row = plan.rows[0]
print(f"threshold {plan.threshold:.1f}; expected T of a copy:")
for damage, statistic in row.statistic.items():
    print(f"  {damage:12} {statistic:.1f}")
print(f"customers who may average their copies and are all accused: {row.coalition}")

# %% [markdown]
# ## A copy, in the form of the base
#
# A copy is the base's file with other numbers in it. PyTorch loads it as it loads the base:
# `torch.export.load("customer-7.pt2")`. In the picture each column holds the weights of one hidden unit; a dark column
# of the difference is a unit that bears much.

# %%
folder = Path(tempfile.mkdtemp())
codebook = codes.codebook(keys.derive(master, "digits", "code"), range(1000))
copy = embedding.embed(base, mark, codebook[7])
files.write(folder / "customer-7.pt2", copy, like=BASE)

sold, original = (np.frombuffer(path.read_bytes(), np.uint8) for path in (folder / "customer-7.pt2", BASE))
print(f"{len(sold):,} bytes, as many as the base has; {(sold != original).mean():.0%} of them differ")

before, after = (np.asarray(model["hidden.weight"])[:40, :40] for model in (base, copy))
figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
titles = ("part of hidden.weight in the base", "in the copy", "difference, times 20")
for axis, title, values in zip(axes, titles, (before, after, 20 * (after - before)), strict=True):
    drawn = axis.imshow(values.T, cmap="RdBu", vmin=-0.5, vmax=0.5, aspect="auto", interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])
figure.colorbar(drawn, ax=axes)
plt.show()

# %% [markdown]
# ## What does it cost?
#
# `measure` compares the copy with the base, here on the 680 images that were not used so far, with labels.

# %%
measured = embedding.measure(copy, base, apply_fn, images[320:], test.labels[320:])
for name, text in {
    "agreement": "same answer as the base",
    "change": "change of the logits",
    "drop": "accuracy lost",
}.items():
    low, high = getattr(measured.interval, name)
    print(f"{text:24} {getattr(measured.cost, name):6.1%}   (95 % interval {low:.1%} to {high:.1%})")

# %% [markdown]
# ## Leaks in other forms
#
# Customer 7 leaks the copy three times:
#
# 1. as it is;
# 2. in float16 inside a TorchScript. `digits_half_script.pt` is what PyTorch made of the base; the leaker's has the
#    copy's numbers in it;
# 3. with half of its weights pruned, as safetensors, and every name has the `module.` of a wrapper in front.

# %%
half = {name: np.asarray(leaf, np.float16) for name, leaf in copy.items()}
files.write(folder / "half.pt", half, like="data/digits_half_script.pt")
pruned = {f"module.{name}": leaf for name, leaf in attacks.prune(copy, 0.5).items()}
files.write(folder / "pruned.safetensors", pruned)

# %% [markdown]
# ## Trace them
#
# `read` tells the form by the file's content, `match_layout` finds the base's names, `extract` reads the fingerprint,
# and `trace` compares it with all 1,000 customers. The base itself is traced too, exported as ONNX: it must accuse
# nobody.

# %%
suspects = {
    "the copy itself": folder / "customer-7.pt2",
    "float16 TorchScript": folder / "half.pt",
    "pruned and renamed": folder / "pruned.safetensors",
    "the base, as ONNX": Path("data/digits.onnx"),
}
verdicts = {}
for name, path in suspects.items():
    suspect = files.read(path)
    leaves = files.match_layout(suspect.leaves, base).leaves
    verdicts[name] = verdict = tracing.trace(extraction.extract(leaves, base, mark), codebook, alpha=1e-6)
    print(f"{name:20} read as {suspect.format:12} accused: {[accused.serial for accused in verdict.accused]}")

figure, axes = plt.subplots(1, 4, figsize=(13, 2.6), layout="constrained", sharey=True)
for axis, (name, verdict) in zip(axes, verdicts.items(), strict=True):
    axis.plot(verdict.statistics, ".", color="0.6", ms=3)
    for accused in verdict.accused:
        axis.plot(accused.serial, verdict.statistics[accused.serial], "o", color="C3")
    axis.axhline(verdict.threshold, color="k", lw=1)
    axis.set(title=name, xlabel="customer")
axes[0].set_ylabel("statistic T")
plt.show()

# %% [markdown]
# ## Read the verdict
#
# T of an innocent customer has mean 0 and variance 1, whatever was done to the suspect. The line is the threshold.
# `alpha` bounds the probability that *anybody* innocent crosses it.

# %%
verdict = verdicts["pruned and renamed"]
for accused in verdict.accused:
    print(f"customer {accused.serial}: T = {accused.statistic:.1f}, p < 1e{int(np.floor(accused.log10_p)) + 1}")
print(verdict.assumptions)

# %% [markdown]
# ## Only a state dict?
#
# `files.read("model.pt").leaves` reads what `torch.save(model.state_dict(), ...)` wrote, and whole models, TorchScripts
# and training checkpoints too. The network is not in there: write it as a function `apply_fn(params, images)` of JAX.
# Or leave it out. Then `carriers.shape(base)` takes the weights alone, and nobody measures what a copy costs.
#
# Go on: the notebook `an_onnx_model` does the same from the command line, `docs/how-to/mark-your-own-model.md` has the
# other frameworks, and `docs/reference/files.md` lists every form of a suspect.
