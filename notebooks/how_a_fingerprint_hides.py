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
# # How a fingerprint hides
#
# A fingerprint is `m` signs, the chips. Every chip is spread over all weights along a secret direction, so that each
# weight moves by a small part of its layer's spread. Two settings decide how well it hides and how well it lasts: the
# number of chips, and the strength. Here you can turn both. Needs `pip install "smark-jax[notebooks]"`.

# %%
import io

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from smark_jax import attacks, carriers, codes, data, embedding, extraction, keys, models, statistics


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(256)(x.reshape(x.shape[0], -1) / 255.0)))


train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
apply_fn, base = models.apply_fn(Network()), models.init(Network(), jax.random.key(0), (28, 28, 1))
base = attacks.fine_tune(base, apply_fn, train.images, train.labels, epochs=3)
base_accuracy = models.accuracy(apply_fn, base, test.images, test.labels)
print(f"accuracy of the base: {base_accuracy:.3f}")

# %% [markdown]
# ## One copy, and what a leaker leaves of it
#
# The leaker here buries the copy under noise of half of each layer's spread, which costs accuracy too. Whatever is left
# of the chips is compared with the codeword: the statistic T is about the square root of `m` when nothing was lost, and
# has mean 0 and variance 1 for everybody innocent. The threshold is that of a million customers, at most one in a
# million odds that anybody innocent is accused.

# %%
master = keys.from_bytes(bytes(range(32)))  # for a notebook that repeats itself; otherwise keys.new()
LOG_LEVEL = np.log(1e-6 / 1_000_000)  # alpha, divided by the number of customers


def issued(num_chips, strength):
    """The secrets of this many chips, customer 7's copy, and what is read from it after the leaker's noise."""
    mark = carriers.mark(keys.derive(master, "carrier"), base, num_chips)
    word = np.asarray(codes.codebook(keys.derive(master, "code"), [7], num_chips)[0])
    copy = embedding.embed(base, mark, word, strength)
    leak = attacks.add_noise(copy, jax.random.key(1), 0.5)
    chips = np.asarray(extraction.extract(leak, base, mark))
    return copy, word, chips, float(statistics.direction(chips) @ word), statistics.threshold(chips, LOG_LEVEL)


def draw(num_chips=304, strength=0.03):
    """A figure of all weights, one unit's weights, and chips."""
    copy, word, chips, statistic, threshold = issued(num_chips, strength)
    weights, marked = (np.asarray(model["Dense_1"]["kernel"]) for model in (base, copy))
    accuracy = models.accuracy(apply_fn, copy, test.images, test.labels)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
    bins = np.linspace(-0.12, 0.12, 80)
    left.hist(weights.ravel(), bins, histtype="step", label="base")
    left.hist(marked.ravel(), bins, histtype="step", label="copy")
    left.set(
        title=f"accuracy {base_accuracy:.3f}, copy {accuracy:.3f}", xlabel="weight of the hidden layer", ylabel="count"
    )
    left.legend(frameon=False)
    middle.plot(weights[:60, 0], label="base")
    middle.plot(marked[:60, 0], "--", label="copy")
    middle.set(title="60 weights of one unit", xlabel="number of the weight", ylabel="value")
    middle.legend(frameon=False)
    span = np.abs(chips).max()
    for sign, colour in ((-1, "C0"), (1, "C3")):
        right.hist(
            chips[word == sign], np.linspace(-span, span, 40), alpha=0.6, color=colour, label=f"chips of {sign:+d}"
        )
    verdict = "traced" if abs(statistic) >= threshold else "not traced"
    right.set(
        title=f"T = {statistic:.1f}, threshold {threshold:.1f}: {verdict}",
        xlabel="read-out after noise",
        ylabel="count",
    )
    right.legend(frameon=False)
    return figure


draw()
plt.show()

# %% [markdown]
# ## Turn the knobs
#
# In Jupyter, two sliders draw this picture for other settings.

# %%
try:
    import ipywidgets
except ImportError:
    print("Sliders need ipywidgets: pip install 'smark-jax[notebooks]'")
else:
    picture = ipywidgets.Image(format="png")
    num_chips = ipywidgets.SelectionSlider(options=[32, 128, 304, 1024, 4096], value=304, description="chips")
    strength = ipywidgets.SelectionSlider(options=[0.003, 0.01, 0.03, 0.1, 0.3], value=0.03, description="strength")

    def redraw(change=None):
        figure, content = draw(num_chips.value, strength.value), io.BytesIO()
        figure.savefig(content, dpi=80)
        plt.close(figure)
        picture.value = content.getvalue()

    num_chips.observe(redraw, "value")
    strength.observe(redraw, "value")
    redraw()
    display(ipywidgets.VBox([num_chips, strength, picture]))

# %% [markdown]
# ## All settings at once
#
# Left: what the mark costs, which depends on the strength and hardly on the number of chips; a tenth of a point is one
# of 1,000 test digits, and chance. Right: what survives the noise, in units of the threshold; above 1 the leaker is
# traced. The energy of a mark is shared out among its chips, but more chips are worth it. With 32 chips nobody can be
# accused among a million customers, whatever the strength: even when all of them agree, chance does that too often.

# %%
CHIPS, STRENGTHS = (32, 304, 1024, 4096), (0.003, 0.01, 0.03, 0.1, 0.3)
cost, margin = np.empty((2, len(CHIPS), len(STRENGTHS)))
for i, num_chips in enumerate(CHIPS):
    for j, strength in enumerate(STRENGTHS):
        copy, _, _, statistic, threshold = issued(num_chips, strength)
        cost[i, j] = 100 * (base_accuracy - models.accuracy(apply_fn, copy, test.images, test.labels))
        margin[i, j] = abs(statistic) / threshold
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for axis, values, title, form in (
    (axes[0], cost, "points of accuracy lost by the copy", "{:.1f}"),
    (axes[1], margin, "|T| / threshold after noise", "{:.2f}"),
):
    image = axis.imshow(values, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, form.format(value), ha="center", va="center", color="w", weight="bold")
    axis.set(title=title, xlabel="strength, part of a layer's spread", ylabel="chips m")
    axis.set_xticks(range(len(STRENGTHS)), STRENGTHS)
    axis.set_yticks(range(len(CHIPS)), CHIPS)
plt.show()

# %% [markdown]
# Go on: `docs/how-to/choose-settings.md` says how to choose both for your own model, and the notebook
# `tracing_a_coalition` what happens when several customers put their copies together.
