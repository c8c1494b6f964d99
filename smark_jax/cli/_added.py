"""What ``smark add-model`` states about a new model, as JSON and in words."""

import collections
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smark_jax._documents import MISSING, Missing
from smark_jax.cli import _common
from smark_jax.cli._common import say

if TYPE_CHECKING:
    from smark_jax import embedding
    from smark_jax.vault import shapes
    from smark_jax.vault.models import OpenModel


class _Shape(NamedTuple):
    """The shape of a new model's mark."""

    digest: str
    coordinates: int
    images: int


class _Known(NamedTuple):
    """Costs or their intervals by name, as :class:`smark_jax.embedding.Cost`; null where labels are wanting."""

    change: "float | tuple[float, float] | None"
    kl: "float | tuple[float, float] | None"
    agreement: "float | tuple[float, float] | None"
    drop: "float | tuple[float, float] | None"


class _Cost(NamedTuple):
    """What copies of a new model cost: in the mean, its interval, and in the worst copy, on so many images."""

    mean: _Known
    interval: _Known
    worst: _Known | Missing
    images: int


class Added(NamedTuple):
    """A new model: how much of it carries the mark, how strongly, and what that costs."""

    model: str
    base: str
    public: str | None
    form: str
    leaves: int
    weights: int
    carrying_leaves: int
    carrying_weights: int
    unmarked: dict[str, str]
    num_chips: int
    alpha: float
    strength: float
    shape: _Shape
    cost: _Cost | None
    probes: bool


def describe(model: "OpenModel", made: "shapes.Made", probes: bool) -> Added:
    """What there is to state about a model that was just added."""
    from smark_jax import carriers, files

    settings, base = model.settings, model.base
    unmarked = {path: str(role) for path, role in carriers.roles(files.nest(base)).items() if not role.carries}
    cost = None
    if made.measured:
        worst = _known(made.worst) if made.worst else MISSING
        cost = _Cost(_known(made.measured.cost), _known(made.measured.interval), worst, made.tried)
    return Added(
        model=model.name,
        base=settings.base,
        public=settings.public,
        form=model.form.format,
        leaves=len(base),
        weights=sum(leaf.size for leaf in base.values()),
        carrying_leaves=len(settings.spec.leaves),
        carrying_weights=settings.spec.num_weights,
        unmarked=unmarked,
        num_chips=settings.num_chips,
        alpha=settings.alpha,
        strength=settings.strength,
        shape=_Shape(made.shape.digest(), made.shape.num_coordinates, made.images),
        cost=cost,
        probes=probes,
    )


def _known(cost: "embedding.Cost | embedding.Intervals") -> _Known:
    return _Known(*(None if _unknown(value) else value for value in cost))


def _unknown(value: float | tuple[float, float]) -> bool:
    return math.isnan(value[0] if isinstance(value, tuple) else value)


def show(vault: Path, added: Added, made: "shapes.Made", expected: str, format: str) -> None:
    """Prints how much of an added model carries the mark, what a copy costs, and what to do next.

    Args:
      vault: the vault's folder.
      added: the model.
      made: the shape of its mark.
      expected: what copies bear, in a sentence.
      format: of the base as it was read.
    """
    say(
        f"{added.model}: {added.carrying_weights:,} of {added.weights:,} weights in "
        f"{added.carrying_leaves} of {added.leaves} leaves carry {added.num_chips} chips; "
        f"alpha {added.alpha:g}, strength {added.strength:.3g}. Base: {added.base}"
    )
    if added.unmarked:
        counts = collections.Counter(added.unmarked.values())
        say("Left as they are: " + ", ".join(f"{role} ({count})" for role, count in counts.items()))
    if added.form == format:
        say(f"Copies will be {added.form}, like the base: the same bytes but for weights that carry.")
    else:
        say(f"Copies will be {added.form}: the carrying weights of this {format} base cannot be changed in place.")
    if made.measured:
        source = f"the first {made.images} images" if made.images else "the weights"
        say(f"Shape from {source}; what a copy costs, measured on the last {made.tried}:")
        _common.out.table(("cost", "mean", "95 % interval", "worst"), _costs(made), keep=("cost", "mean", *_MORE))
    say(expected)
    say(f"Next: smark issue {vault} {added.model} CUSTOMER... --out COPIES")


_MORE = ("95 % interval", "worst")


def _costs(made: "shapes.Made") -> list[tuple[str, str, str, str]]:
    """The rows of the table of costs; without labels no accuracy."""
    assert made.measured and made.worst
    forms = {
        "agreement": ("same answer as the base", "{:.1%}"),
        "kl": ("KL divergence in nats", "{:.2g}"),
        "change": ("relative change of the logits", "{:.2%}"),
        "drop": ("accuracy lost", "{:.1%}"),
    }
    rows = []
    for name, (text, form) in forms.items():
        mean, (low, high), worst = (getattr(part, name) for part in (*made.measured, made.worst))
        if not math.isnan(mean):
            rows.append((text, form.format(mean), f"{form.format(low)} to {form.format(high)}", form.format(worst)))
    return rows
