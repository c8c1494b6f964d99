"""What a leaker may try: the attacks of the library at several settings, and what each takes in data and training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.common import networks
from experiments.common.networks import Subject
from smark_jax import attacks, carriers, models
from smark_jax._types import PyTree

OWN_ANSWERS = "own answers"


class Recipe(NamedTuple):
    """An attack at one setting; ``extraction`` says that the outcome owes no weight to the copy."""

    name: str
    setting: str
    run: Callable[[PyTree], PyTree]
    extraction: bool = False


class Parts(NamedTuple):
    """Patterns of a network's leaves: its last layer, dense layers, convolutions, and all of it stage by stage."""

    head: str
    dense: str
    convolutions: str
    stages: tuple[str, ...]


_STAGES = ("(Conv|Norm)_0/", *(f"(Conv|Norm)_({numbers})/" for numbers in ("[1-4]", "[5-9]", "1[0-4]", "1[5-9]")))
CNN = Parts("Dense_1", "Dense", "Conv", ("Conv_0", "Conv_1", "Dense_0", "Dense_1"))
RESNET = Parts("Dense_0", "Dense", "Conv", (*_STAGES, "Dense_0"))


@dataclasses.dataclass
class Leaker:
    """Whoever holds the training data of a subject, with labels, and counts what an attack takes of them.

    Attributes:
      subject: the network and its data.
      parts: of the network.
      fresh: untrained weights of the network.
      seed: of everything random.
      most_epochs: cap of every training.
      labelled: labelled images x epochs so far.
      trained: images x epochs so far, with and without labels.
      unlabelled: the most images used without labels.
    """

    subject: Subject
    parts: Parts
    fresh: PyTree
    seed: int
    most_epochs: int
    labelled: int = 0
    trained: int = 0
    unlabelled: int = 0

    def reset(self) -> None:
        self.labelled = self.trained = self.unlabelled = 0

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed + 1)

    def epochs(self, count: int) -> str:
        count = min(count, self.most_epochs)
        return f"{count} epoch{'s' * (count > 1)}"

    def images(self, count: int | None = None) -> np.ndarray:
        """Images that are used without their labels."""
        images = self.subject.images[:count]
        self.unlabelled = max(self.unlabelled, len(images))
        return images

    def tune(self, params: PyTree, epochs: int, *, own: PyTree = None, images: int | None = None, **how: Any) -> PyTree:
        """Fine-tunes on ``images`` images, with true labels, or with the answers of the copy ``own``."""
        epochs, subject = min(epochs, self.most_epochs), self.subject
        x, y = subject.images[:images], subject.labels[:images]
        if own is not None:
            y = attacks.predicted_labels(own, subject.apply_fn, self.images(images))
        else:
            self.labelled += epochs * len(x)
        self.trained += epochs * len(x)
        run = how.pop("apply_fn", subject.apply_fn)
        return attacks.fine_tune(params, run, x, y, epochs=epochs, seed=self.seed + 1, **how)

    def distil(self, copy: PyTree, student: PyTree, run: Any = None) -> PyTree:
        epochs = min(10, self.most_epochs)
        self.trained += epochs * len(self.images())
        return attacks.distil(copy, self.subject.apply_fn, self.images(), student, run, epochs=epochs)

    def secret(self, number: int) -> Any:
        return networks.secret(self.seed, "leaker", str(number))


def decayed(l2: float, rate: float = 1e-3) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(l2), optax.adam(rate))


_fast, _decayed, _adamw = (functools.lru_cache(make) for make in (optax.adam, decayed, optax.adamw))


def classic(leaker: Leaker, strength: float) -> list[Recipe]:
    """The attacks of the usual suites.

    It is long because it is a list: an attack is one entry of ``found``.
    """
    tune, epochs, own, head = leaker.tune, leaker.epochs, leaker.secret, leaker.parts.head
    key, fresh = leaker.key, leaker.fresh

    def distil_into_another(copy: PyTree) -> PyTree:
        other = networks.ConcatNet()
        student = models.init(other, jax.random.key(leaker.seed + 3), leaker.subject.images.shape[1:])
        return leaker.distil(copy, student, models.apply_fn(other))

    def cut_last(copy: PyTree) -> PyTree:
        return attacks.reinitialise(copy, fresh, head)

    def guessed(copy: PyTree, guesses: int, weight: float) -> PyTree:
        drawn = [carriers.mark(own(number), leaker.subject.base) for number in range(guesses)]
        return tune(copy, 5, penalty=attacks.carrier_energy(copy, drawn, weight))

    def soup(copy: PyTree, part: float) -> PyTree:
        return jax.tree.map(lambda a, b: (1 - part) * a + part * b, copy, tune(copy, 5))

    quantised = lambda copy: attacks.quantise(copy, 4)  # noqa: E731
    found = [
        Recipe("none", "", lambda copy: copy),
        Recipe("fine-tune last layer", epochs(5), lambda c: tune(c, 5, trainable=head)),
        Recipe("fine-tune all layers", epochs(5), lambda c: tune(c, 5)),
        Recipe("fine-tune all layers", f"{epochs(10)}, rate 0.003", lambda c: tune(c, 10, optimizer=_fast(3e-3))),
        Recipe("fine-tune, predicted labels", epochs(5), lambda c: tune(c, 5, own=c)),
        Recipe("retrain last layer", epochs(5), lambda c: tune(cut_last(c), 5, trainable=head)),
        Recipe("retrain all layers", epochs(10), lambda c: tune(cut_last(c), 10)),
        Recipe("retrain, predicted labels", epochs(10), lambda c: tune(cut_last(c), 10, own=c)),
        *(
            Recipe("prune weights", f"{part:.0%}", functools.partial(attacks.prune, fraction=part))
            for part in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
        ),
        *(
            Recipe("prune filters", f"{part:.0%}", functools.partial(attacks.prune_filters, fraction=part))
            for part in (0.1, 0.25, 0.5)
        ),
        *(
            Recipe(
                "fine-prune",
                f"{part:.0%} of filters, {epochs(10)}",
                lambda c, part=part: tune(attacks.prune_filters(c, part), 10, hold_zeros=True),
            )
            for part in (0.5, 0.9)
        ),
        Recipe("prune and fine-tune", f"95%, {epochs(5)}", lambda c: tune(attacks.prune(c, 0.95), 5, hold_zeros=True)),
        *(
            Recipe("quantise", f"{bits} bits", functools.partial(attacks.quantise, bits=bits))
            for bits in (8, 6, 5, 4, 3, 2)
        ),
        *(
            Recipe("narrow type", dtype, functools.partial(attacks.cast, dtype=dtype))
            for dtype in ("float16", "bfloat16")
        ),
        *(
            Recipe("noise", f"{part:g} rms", functools.partial(attacks.add_noise, key=key, relative=part))
            for part in (0.1, 0.3, 0.5, 1.0)
        ),
        *(
            Recipe("low rank", f"{part:.0%}", functools.partial(attacks.low_rank, fraction=part))
            for part in (0.5, 0.25, 0.1)
        ),
        Recipe("shift weights", f"{epochs(10)}", lambda c: tune(attacks.shift_weights(c, key), 10)),
        Recipe("shift weights", f"third, {epochs(10)}", lambda c: tune(attacks.shift_weights(c, key, 0.5, 0.33), 10)),
        *(
            Recipe(
                "L2 burst",
                f"{l2:g}, {epochs(count)}",
                lambda c, l2=l2, count=count: tune(c, count, optimizer=_decayed(l2)),
            )
            for l2, count in ((0.001, 5), (0.01, 1), (0.01, 5), (0.01, 10), (0.1, 5))
        ),
        Recipe("label smoothing", f"0.3, {epochs(5)}", lambda c: tune(c, 5, label_smoothing=0.3)),
        *(
            Recipe(
                "overwrite",
                f"{times} at {factor} x strength",
                functools.partial(attacks.overwrite, key=own(0), times=times, strength=factor * strength),
            )
            for times, factor in ((1, 1), (1, 3), (1, 5), (5, 5), (10, 5))
        ),
        Recipe("soup with own fine-tune", f"half, {epochs(5)}", lambda c: soup(c, 0.5)),
        Recipe("against guessed carriers", f"8 guesses, {epochs(5)}", lambda c: guessed(c, 8, 0.1)),
        Recipe(
            "all at once",
            f"{epochs(5)}, prune 50%, 4 bits, noise 0.1",
            lambda c: quantised(attacks.add_noise(attacks.prune(tune(c, 5), 0.5), key, 0.1)),
        ),
        Recipe("distil", epochs(10), lambda c: leaker.distil(c, fresh), True),
        Recipe("distil", f"another network, {epochs(10)}", distil_into_another, True),
    ]
    return distinct(found)


def distinct(found: list[Recipe]) -> list[Recipe]:
    """Without those that capped epochs made alike."""
    return list({(recipe.name, recipe.setting): recipe for recipe in found}.values())
