"""``smark train``: trains a base model from a configuration, shows progress, and prints the next step."""

import functools
import math
from pathlib import Path

import jax

from smark_jax import data, models, training
from smark_jax.cli import _common, _console, _train_config
from smark_jax.cli._console import Console


def run(config: _train_config.Config, out: Path, console: Console) -> training.Results:
    """Trains, or resumes training, and returns the results (:func:`smark_jax.training.run`)."""

    def load() -> training.Task:
        _common.before_training(config.parties)
        console.say(f"Loading {config.dataset} ...")
        train = data.load(config.dataset, config.train_split)
        test = data.load(config.dataset, config.test_split)
        network = getattr(models, _train_config.NETWORKS[config.network])(num_classes=train.num_classes)
        apply_fn = models.apply_fn(network)
        init = functools.partial(models.init, network, jax.random.key(config.seed), train.images.shape[1:])
        accuracy = functools.partial(models.accuracy, apply_fn, images=test.images, labels=test.labels)
        return training.Task(init, apply_fn, train, accuracy)

    with _console.progress(console) as bars:
        return training.run(
            out,
            config._asdict(),
            training.Recipe(*(getattr(config, name) for name in training.Recipe._fields)),
            load,
            owner_mark=config.owner_mark,
            checkpoint_every=config.checkpoint_every,
            on_progress=_console.bar(bars, f"train across {config.parties} parties"),
            say=console.say,
        )


def show(console: Console, out: Path, results: training.Results, test_split: str) -> None:
    """Prints the results, and what to do next."""
    console.say(f"Accuracy {results.accuracy:.4f} on {test_split}.")
    if results.owner_mark_log10_p is not None:
        odds = f"1e{math.floor(results.owner_mark_log10_p) + 1}"
        console.say(f"The owner's mark can be read; by chance that happens with a probability below {odds}.")
        console.say(f"Keep {out / 'private'} secret, and back it up: the proof of the mark needs it.")
    console.say(f"The base model, {out / 'base.safetensors'}, goes to nobody. Next: smark add-model VAULT NAME BASE")
