"""Training: masked training across parties, and a plain loop on one device.

Training across parties is composed from the pieces below: split the data, draw batches, run masked rounds.

::

    step = parallel.train_step(apply_fn, optimizer, fixed_point)
    batches = training.batches(*training.partition(images, labels, 4, seed=0), batch_size=32, epochs=15, seed=1)
    state = training.fit(step, step.init(params), batches, pair_keys)

:func:`prepare` sets all this up from a :class:`Recipe`, with the owner's own mark if wanted. :func:`run` trains in a
folder with checkpoints, so that an interrupted run can resume and reach the same model.

All training without parties, by a loss and an optimiser, uses :func:`minimise`.
"""

from smark_jax.training.descent import Info, OnProgress, State, begin, minibatches, minimise
from smark_jax.training.recipe import Owner, Recipe, Training, owner_log10_p, owner_mark, prepare
from smark_jax.training.rounds import batches, fit, num_batches, partition
from smark_jax.training.runs import OUTPUTS, Results, Task, run

__all__ = [
    "OUTPUTS",
    "Info",
    "OnProgress",
    "Owner",
    "Recipe",
    "Results",
    "State",
    "Task",
    "Training",
    "batches",
    "begin",
    "fit",
    "minibatches",
    "minimise",
    "num_batches",
    "owner_log10_p",
    "owner_mark",
    "partition",
    "prepare",
    "run",
]
