"""Attacks that know how marks of weights are read: projections, restarts, merges, swamped units, other trainings."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from experiments.robustness.recipes import CNN, OWN_ANSWERS, Leaker, Recipe, distinct
from smark_jax import alignment, attacks
from smark_jax._types import ApplyFn, PyTree

_UNLABELLED = 1000  # images of attacks without labels
FEW = {"Conv_1": 80, "Dense_0": 150}  # directions that the CNN's function needs
_adamw = functools.lru_cache(optax.adamw)


def recipe(name: str, setting: str, attack: Callable[..., PyTree], **settings: Any) -> Recipe:
    return Recipe(name, setting, lambda copy: attack(copy, **settings))


def jitter_and_project(
    params: PyTree,
    apply_fn: ApplyFn,
    images: np.ndarray,
    key: jax.Array,
    jitter: dict[str, float],
    tune: Callable[[PyTree], PyTree] = lambda params: params,
    noise: float = 1.0,
) -> PyTree:
    """R0, R1 and R2: noise of these parts of an RMS in the leaves that match, training, few directions of the CNN."""
    for match, part in jitter.items():
        params = attacks.add_noise(params, key, part, match)
    return attacks.project_inputs(tune(params), apply_fn, images, key, FEW, noise)


def projections(leaker: Leaker) -> list[Recipe]:
    """Projections onto the inputs' principal components; R0, R1 and R2 were found against white marks of the CNN."""
    apply_fn, key, epochs, parts = leaker.subject.apply_fn, leaker.key, leaker.epochs, leaker.parts

    def project(copy: PyTree, keep: Any, noise: float = 1.0, **training: Any) -> PyTree:
        copy = attacks.project_inputs(copy, apply_fn, leaker.images(_UNLABELLED), key, keep, noise)
        return leaker.tune(copy, **training) if training else copy

    def project_own(copy: PyTree, keep: float, count: int) -> PyTree:
        return leaker.tune(project(copy, keep), count, own=copy)

    def jittered(copy: PyTree, jitter: dict[str, float], count: int = 0, own: bool = False, noise: float = 1) -> PyTree:
        train = lambda moved: leaker.tune(moved, count, own=copy if own else None) if count else moved  # noqa: E731
        return jitter_and_project(copy, apply_fn, leaker.images(_UNLABELLED), key, jitter, train, noise)

    def everything(copy: PyTree) -> PyTree:
        headless = attacks.reinitialise(project(copy, 0.999), leaker.fresh, parts.head)
        moved = leaker.tune(headless, 1, own=copy, trainable=parts.head)
        return attacks.quantise(attacks.prune(attacks.add_noise(moved, key, 0.3), 0.5), 4)

    found = [
        recipe("project inputs", f"{keep:.4g} of variance, noise {noise}", project, keep=keep, noise=noise)
        for keep, noise in ((0.9, 1), (0.99, 0), (0.99, 1), (0.999, 1), (0.999, 5), (0.9999, 20))
    ]
    found += [recipe("project inputs", f"{keep} directions, noise 1", project, keep=keep) for keep in (50, 150)]
    found += [
        recipe(
            "project and fine-tune", f"{keep}, noise {n}, {epochs(count)}", project, keep=keep, noise=n, epochs=count
        )
        for keep, n, count in ((0.99, 1, 1), (0.9, 5, 2))
    ]
    found += [
        recipe("project and fine-tune", f"0.9, {OWN_ANSWERS}, {epochs(5)}", project_own, keep=0.9, count=5),
        recipe("project, new head, noise, prune, 4 bits", f"0.999, {OWN_ANSWERS}, 0.3, 50%", everything),
    ]
    if parts is CNN:
        convolutions, unequal = {"Conv": 0.5}, {"Conv_0": 0.7, "Conv_1": 0.5}
        found += [
            recipe("R0", "jitter 0.3", jittered, jitter={"Conv": 0.3}),
            recipe("R1", f"jitter 0.5, {epochs(2)}", jittered, jitter=convolutions, count=2),
            recipe("R1", f"jitter 0.5, {OWN_ANSWERS}, {epochs(2)}", jittered, jitter=convolutions, count=2, own=True),
            recipe("R2", f"jitter 0.7 and 0.5, {epochs(1)}, noise 2", jittered, jitter=unequal, count=1, noise=2),
        ]
    return distinct(found)


def restarts(leaker: Leaker) -> list[Recipe]:
    """Untrained layers, and merges with an independent network."""
    tune, epochs, parts, fresh = leaker.tune, leaker.epochs, leaker.parts, leaker.fresh
    graph = alignment.trace_graph(leaker.subject.apply_fn, leaker.subject.base, leaker.subject.images[:1])

    def restart(copy: PyTree, match: str, count: int, own: bool = False, **how: Any) -> PyTree:
        restarted = attacks.reinitialise(copy, fresh, match)
        return tune(restarted, count, own=copy if own else None, **how)

    def in_turn(copy: PyTree, stages: tuple[str, ...], own: bool = False, images: int | None = None) -> PyTree:
        train = functools.partial(tune, epochs=1, own=copy if own else None, images=images)
        return attacks.reinitialise_in_turn(copy, fresh, stages, train)

    def shrink(copy: PyTree, keep: float, new: float, count: int) -> PyTree:
        return tune(attacks.shrink_and_perturb(copy, fresh, keep, new), count)

    def merge(copy: PyTree, share: float, before: int, after: int) -> PyTree:
        merged = attacks.merge(copy, tune(fresh, before), graph, share)
        return tune(merged, after) if after else merged

    turns, top, few, head = "progressive re-initialisation", parts.stages[::-1], "1,000 images", parts.head
    found = [
        recipe("new head", f"{few}, {epochs(5)}", restart, match=head, count=5, images=1000, trainable=head),
        recipe("new dense layers", epochs(1), restart, match=parts.dense, count=1),
        recipe("new dense layers", f"{OWN_ANSWERS}, {epochs(5)}", restart, match=parts.dense, count=5, own=True),
        recipe("new convolutions", epochs(2), restart, match=parts.convolutions, count=2),
        recipe(turns, f"from the top, {epochs(1)} each", in_turn, stages=top),
        recipe(turns, f"from the bottom, {epochs(1)} each", in_turn, stages=parts.stages),
        recipe(turns, f"from the top, {few} each", in_turn, stages=top, images=1000),
    ]
    own_turns = recipe(turns, f"from the top, {OWN_ANSWERS}, {epochs(1)} each", in_turn, stages=top, own=True)
    found.append(own_turns._replace(extraction=True))  # distillation: no stage keeps a weight of the copy
    found += [
        recipe("shrink and perturb", f"{keep:g} and {new:g}, {epochs(count)}", shrink, keep=keep, new=new, count=count)
        for keep, new, count in ((0.8, 0.1, 1), (0.4, 0.1, 1), (0.4, 0.5, 2), (0.2, 0.5, 2))
    ]
    found += [
        recipe(
            "merge", f"{share:.0%} of {epochs(before)}, then {after}", merge, share=share, before=before, after=after
        )
        for share, before, after in ((0.2, 1, 0), (0.3, 1, 1), (0.5, 2, 1))
    ]
    return distinct(found)


def other_forms(leaker: Leaker) -> list[Recipe]:
    """Large weights that nobody sees, and trainings that move weights in another way."""
    tune, epochs, key, subject = leaker.tune, leaker.epochs, leaker.key, leaker.subject
    apply_fn = subject.apply_fn
    graph = alignment.trace_graph(apply_fn, subject.base, subject.images[:1])
    multiplied = lambda factored, images: apply_fn(attacks.multiply_out(factored), images)  # noqa: E731

    def swamp(copy: PyTree, units: int, size: float) -> PyTree:
        return attacks.swamp_units(copy, apply_fn, leaker.images(_UNLABELLED), graph, key, units, size)

    def fill(copy: PyTree, size: float) -> PyTree:
        return attacks.fill_unused(copy, apply_fn, leaker.images(_UNLABELLED), key, size)

    def shift(copy: PyTree, size: float) -> PyTree:
        return attacks.shift_logits(copy, apply_fn, subject.images, key, size)

    def coarse(copy: PyTree, bits: int) -> PyTree:
        return attacks.quantise(tune(copy, 1, apply_fn=attacks.quantised(apply_fn, bits)), bits)

    def factored(copy: PyTree, part: float) -> PyTree:
        return attacks.multiply_out(tune(attacks.factorise(copy, part), 2, apply_fn=multiplied))

    def decay(copy: PyTree, rate: float) -> PyTree:
        return tune(copy, 2, optimizer=_adamw(1e-3, weight_decay=rate))

    swamped = ((20, 1e18), (20, 10.0), (5, 1000.0)) if () in graph.partitions else ()  # no unit of a group dies alone
    found = [recipe("swamp units", f"{units} with {size:g}", swamp, units=units, size=size) for units, size in swamped]
    found += [recipe("fill unused inputs", f"{size:g} rms", fill, size=size) for size in (1.0, 100.0, 1e6)]
    found += [recipe("shift logits", f"{size:g} rms", shift, size=size) for size in (1.0, 100.0)]
    found += [recipe("SAM", f"{rho:g}, {epochs(2)}", tune, epochs=2, sharpness=rho) for rho in (0.05, 0.5)]
    found += [recipe("AdamW", f"decay {rate:g}, {epochs(2)}", decay, rate=rate) for rate in (1.0, 10.0, 30.0)]
    found += [recipe("train quantised", f"{bits} bits, {epochs(1)}", coarse, bits=bits) for bits in (4, 3, 2)]
    found += [
        recipe("factor and train", f"rank {part:.0%}, {epochs(2)}", factored, part=part) for part in (0.5, 0.25, 0.1)
    ]
    return distinct(found)
