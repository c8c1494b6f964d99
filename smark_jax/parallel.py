"""Data holders as devices: one training step whose gradients leave each device only under a mask.

No other module chooses the devices of parties or makes a mesh (carriers follow the mesh that already holds the weights;
verdicts use all accelerators of the process, or of all processes). The step's body is written once, with an axis name,
and runs under both ``pmap`` and ``shard_map``. Masks between devices of one program protect the messages between them;
they do not protect one organisation from another.

After ``jax.distributed.initialize`` the same step runs over the devices of several processes, on hosts that trust each
other. Each process passes only its own parties' rows (:func:`own_parties`) and computes the owner's update itself.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, UInt32

from smark_jax import _processes, _validate, aggregation
from smark_jax._types import AnyArray, ApplyFn, PyTree

AXIS = "parties"
Device = Any  # jax.Device, which type checkers do not take for a type
Engine = Literal["pmap", "shard_map"]

# A loss is sent in the same words as the gradient, which hold values up to the clip: this many nats map to one clip.
_LOSS_RANGE = 16.0


def devices(num_parties: int) -> list[Device]:
    """One device for each party, process by process: accelerators where there are enough, else CPU devices.

    Raises:
      SmarkError: when there are too few of both kinds; it says how to get virtual CPU devices.
    """
    _validate.positive("devices", "num_parties", num_parties)
    default = jax.devices()
    cpu = default if default[0].platform == "cpu" else jax.devices("cpu")
    for found in (default, cpu):
        if len(found) >= num_parties:
            return sorted(found, key=lambda device: device.process_index)[:num_parties]
    raise _validate.fail(
        "devices",
        f"{num_parties} devices, one for each party",
        f"{len(default)} of kind {default[0].platform} and {len(cpu)} CPU",
        f'Before the first computation call jax.config.update("jax_num_cpu_devices", {num_parties}).',
        desk="Choose fewer parties, or let JAX use the CPU: unset JAX_PLATFORMS.",
    )


def own_parties(num_parties: int) -> range:
    """The parties whose devices belong to this process: all of them, unless ``jax.distributed`` is in use.

    Args:
      num_parties: P, over all processes.

    Raises:
      SmarkError: when there are too few devices, or so many that a process is left without a party. All processes raise
        it together.
    """
    owners = [device.process_index for device in devices(num_parties)]
    if len(set(owners)) < jax.process_count():
        expected = f"at least one party in each of {jax.process_count()} processes"
        got = f"{num_parties} parties, which the first {len(set(owners))} have room for"
        cause = f"Use one party for each of the {jax.device_count()} devices, or start fewer processes."
        raise _validate.fail("own_parties", expected, got, cause)
    first = owners.index(jax.process_index())
    return range(first, first + owners.count(jax.process_index()))


def masked_mean(
    tree: PyTree,
    pair_keys: UInt32[AnyArray, "P 8"],
    round: int | Array,
    fixed_point: aggregation.FixedPoint,
    axis_name: str,
) -> PyTree:
    """The mean of the parties' trees, each of which leaves its device only as masked fixed-point words.

    Call it inside pmap or shard_map over ``axis_name``, with one party per device.

    Args:
      tree: this party's floats.
      pair_keys: this party's row of pair keys, shape [P, 8].
      round: the round's number; never used twice with the same keys.
      fixed_point: the format; values beyond its clip are clipped, NaN counts as zero (test for it beforehand).
      axis_name: the mapped axis of P parties.

    Returns:
      The mean over all parties in float32, the same on every device. Its error against the float mean has a standard
      error of at most ``fixed_point.mean_standard_error``, besides float32 rounding.

    Raises:
      SmarkError: when the axis has more parties than the format has room for, or not as many as pair_keys.
    """
    num_parties = jax.lax.axis_size(axis_name)
    if jnp.shape(pair_keys) != (num_parties, 8):
        cause = "Give each device its own row: map over the first axis of aggregation.pair_keys(...)."
        got = f"shape {jnp.shape(pair_keys)}"
        raise _validate.fail("masked_mean", f"pair_keys of shape ({num_parties}, 8)", got, cause)
    party = jax.lax.axis_index(axis_name)
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
    message = aggregation.encode(flat, fixed_point, aggregation.rounding_key(pair_keys, party, round))
    message += aggregation.pairwise_mask(pair_keys, party, round, message.size)
    total = jax.lax.psum(message, axis_name)
    return unravel(aggregation.decode(total, fixed_point, num_parties) / num_parties)


class TrainState(NamedTuple):
    """The state that training carries from round to round.

    Attributes:
      params: the global model.
      opt_state: the optimiser's state.
      round: number of the next round, which seeds its masks; uint32.
    """

    params: PyTree
    opt_state: optax.OptState
    round: UInt32[Array, ""]


class TrainInfo(NamedTuple):
    """What a round reveals: figures that were opened only as sums over the parties.

    Attributes:
      loss: mean over the parties of their batch's loss in nats, clipped at 16.
      diverged: how many parties had a NaN or infinite gradient; zeros took its place.
    """

    loss: Float[Array, ""]
    diverged: Int[Array, ""]


class TrainStep(NamedTuple):
    """A training step as a pair of functions.

    Attributes:
      init: ``init(params) -> TrainState``.
      update: ``update(state, images [P B H W C], labels [P B], pair_keys [P P 8]) -> (TrainState, TrainInfo)``; with
        several processes, each passes the rows of its own parties only.
    """

    init: Callable[[PyTree], TrainState]
    update: Callable[[TrainState, AnyArray, AnyArray, AnyArray], tuple[TrainState, TrainInfo]]


def cross_entropy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> Float[Array, ""]:
    """Mean softmax cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    fixed_point: aggregation.FixedPoint,
    *,
    loss_fn: Callable[[Array, Array], Array] = cross_entropy,
    value_and_grad: Callable[[Callable[..., Array]], Callable[..., tuple[Array, PyTree]]] = jax.value_and_grad,
    engine: Engine = "pmap",
) -> TrainStep:
    """A distributed training step with masked aggregation.

    Each party computes the gradient of its own batch, scales it down to a global norm of at most ``fixed_point.clip``,
    and takes part in :func:`masked_mean`. The owner passes the mean to ``optimizer`` in a separate computation on one
    device, in float32 whatever the parameters' type. The owner's secrets (the gradient of its mark, see
    :func:`smark_jax.embedding.add_fingerprint_gradient`) are chained into that optimiser and never enter the parties'
    computation.

    Args:
      apply_fn: ``apply_fn(params, images) -> logits``, pure.
      optimizer: the owner's optax optimiser.
      fixed_point: the words' format; its clip bounds the norm of a party's gradient, and its ``num_parties`` is P.
      loss_fn: ``loss_fn(logits, labels) -> scalar``, a mean over the batch.
      value_and_grad: turns ``loss(params, images, labels) -> scalar`` into the function that a party runs, which takes
        the same arguments and returns loss and gradient; :func:`smark_jax.privacy.value_and_clipped_grad` clips each
        example.
      engine: what maps the body over devices; the results are the same bit for bit.

    With several processes, all must make the same step, begin with the same params and call ``update`` equally often.
    Each computes the owner's update on its own first device: identical processors get the same params bit for bit. If
    one process stops, the others stop too; a wrong sum never results.

    Returns:
      The pair (init, update). A state is never modified: after an error, the previous one is still valid. Masks are
      made from the pair keys and the round's number, and two messages under one mask reveal their difference: before
      going back to an earlier state or starting again, agree new pair keys. A single party has nobody to hide among,
      so nothing is masked.

    Raises:
      SmarkError: for an unknown engine or too few devices; from ``init``, when processes begin with different params;
        from ``update``, when the batch or the keys are not one row for each of the process's parties, or two of these
        parties hold different keys for each other. A mismatch between parties of different processes goes undetected,
        and the sum is noise.
    """
    num_parties = fixed_point.num_parties
    party_devices, own = devices(num_parties), own_parties(num_parties)
    owner_device = party_devices[own[0]]

    party_gradient = value_and_grad(lambda params, images, labels: loss_fn(apply_fn(params, images), labels))

    def party_round(params: PyTree, images: Array, labels: Array, row: Array, round: Array) -> tuple[PyTree, TrainInfo]:
        loss, gradient = party_gradient(params, images, labels)
        # In lower precision, the scaled gradient could exceed the clip.
        gradient = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        scale = jnp.minimum(1.0, fixed_point.clip / jnp.maximum(norm, 1e-30))
        gradient = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0.0), gradient)
        unit = fixed_point.clip
        shown = (jnp.where(finite, loss / _LOSS_RANGE * unit, 0.0), jnp.where(finite, 0.0, unit))
        mean, (loss, diverged) = masked_mean((gradient, shown), row, round, fixed_point, AXIS)
        diverged = jnp.round(diverged / unit * num_parties).astype(jnp.int32)
        return mean, TrainInfo(loss / unit * _LOSS_RANGE, diverged)

    collect = _map_parties(party_round, party_devices, engine)

    @jax.jit
    def owner_round(params: PyTree, opt_state: Any, mean: PyTree, round: Array) -> TrainState:
        # The mean stays in float32 whatever the parameters' type: rounded to bfloat16, two means that differ by one
        # example's share could lie further apart than the noise of differential privacy covers.
        updates, opt_state = optimizer.update(mean, opt_state, params)
        return TrainState(optax.apply_updates(params, updates), opt_state, round + 1)

    def init(params: PyTree) -> TrainState:
        content = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
        _processes.same("train_step", "params", content, "Draw them from the same seed.")
        params = jax.device_put(params, owner_device)
        wide = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)
        opt_state = jax.device_put(optimizer.init(wide), owner_device)
        return TrainState(params, opt_state, jax.device_put(jnp.uint32(0), owner_device))

    def update(
        state: TrainState, images: AnyArray, labels: AnyArray, pair_keys: AnyArray
    ) -> tuple[TrainState, TrainInfo]:
        for name, value in (("images", images), ("labels", labels), ("pair_keys", pair_keys)):
            if not np.shape(value) or np.shape(value)[0] != len(own):
                cause = "Stack the parties' batches along a first axis."
                expected = f"{name} with a row for each of {len(own)} parties"
                raise _validate.fail("train_step", expected, f"shape {np.shape(value)}", cause)
        among_own = np.asarray(pair_keys)[:, own.start : own.stop]
        if not np.array_equal(among_own, np.swapaxes(among_own, 0, 1)):
            cause = "Row u is what aggregation.agree gives to party u; aggregation.pair_keys makes all rows."
            raise _validate.fail("train_step", "the same key for (u, v) and (v, u)", "asymmetric pair_keys", cause)
        mean, info = collect(state.params, images, labels, pair_keys, state.round)
        mean, info = jax.device_put(jax.tree.map(lambda leaf: leaf.addressable_data(0), (mean, info)), owner_device)
        return owner_round(state.params, state.opt_state, mean, state.round), info

    return TrainStep(init, update)


def _map_parties(body: Callable[..., Any], party_devices: list[Device], engine: Engine) -> Callable[..., Any]:
    """Maps ``body(params, images, labels, row, round)`` over the parties' devices; all share params and round."""
    if engine == "pmap":
        return jax.pmap(body, AXIS, in_axes=(None, 0, 0, 0, None), out_axes=None, devices=party_devices)
    if engine != "shard_map":
        raise _validate.fail("train_step", "engine 'pmap' or 'shard_map'", repr(engine), "Is the name spelt right?")
    mesh = jax.sharding.Mesh(np.array(party_devices), (AXIS,))
    common, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)

    def one_row(params: PyTree, images: Array, labels: Array, row: Array, round: Array) -> Any:
        return body(params, images[0], labels[0], row[0], round)

    specs = (common, split, split, split, common)
    # With check_vma, differentiating with respect to the shared params would insert a psum of the bare gradients. That
    # is wrong here, since the body averages by itself, and would reveal what the masks hide.
    mapped = jax.jit(jax.shard_map(one_row, mesh=mesh, in_specs=specs, out_specs=common, check_vma=False))

    def call(*args: Any) -> Any:
        return mapped(*(_place(a, jax.NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)))

    return call


def _place(tree: PyTree, sharding: jax.NamedSharding) -> PyTree:
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)
