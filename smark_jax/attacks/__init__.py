"""Attacks by which leakers may try to remove fingerprints: pure functions from parameters to parameters.

In addition, an eavesdropper's attack on a party's message: :func:`invert_gradient` turns gradients into images.
"""

from smark_jax.attacks.collusion import (
    COLLUSIONS,
    Collusion,
    average,
    extrapolate,
    interleave,
    largest_difference,
    maximum,
    median,
    min_max,
    minimum,
    modified_negative,
    randomised_negative,
)
from smark_jax.attacks.inversion import InversionMethod, Reconstruction, infer_label, invert_gradient
from smark_jax.attacks.projection import project_inputs
from smark_jax.attacks.removal import (
    add_noise,
    cast,
    low_rank,
    overwrite,
    prune,
    prune_filters,
    quantise,
    shift_weights,
)
from smark_jax.attacks.reparametrising import Factors, factorise, multiply_out, quantised
from smark_jax.attacks.restarting import merge, reinitialise, reinitialise_in_turn, shrink_and_perturb
from smark_jax.attacks.retraining import carrier_energy, distil, fine_tune, predicted_labels
from smark_jax.attacks.rewriting import (
    add_means,
    add_neurons,
    flip,
    fold_batch_norm,
    fold_gains,
    mix,
    permute,
    rescale,
    rewrite,
)
from smark_jax.attacks.swamping import fill_unused, shift_logits, swamp_units

__all__ = [
    "COLLUSIONS",
    "Collusion",
    "Factors",
    "InversionMethod",
    "Reconstruction",
    "add_means",
    "add_neurons",
    "add_noise",
    "average",
    "carrier_energy",
    "cast",
    "distil",
    "extrapolate",
    "factorise",
    "fill_unused",
    "fine_tune",
    "flip",
    "fold_batch_norm",
    "fold_gains",
    "infer_label",
    "interleave",
    "invert_gradient",
    "largest_difference",
    "low_rank",
    "maximum",
    "median",
    "merge",
    "min_max",
    "minimum",
    "mix",
    "modified_negative",
    "multiply_out",
    "overwrite",
    "permute",
    "predicted_labels",
    "project_inputs",
    "prune",
    "prune_filters",
    "quantise",
    "quantised",
    "randomised_negative",
    "reinitialise",
    "reinitialise_in_turn",
    "rescale",
    "rewrite",
    "shift_logits",
    "shift_weights",
    "shrink_and_perturb",
    "swamp_units",
]
