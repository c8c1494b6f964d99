"""``smark train``: a base model from a configuration, with progress, and what to do with it next."""

import functools
import math
from pathlib import Path
from typing import Any

import jax

from smark_jax import data, models, training
from smark_jax.cli import _common, _console, _train_config
from smark_jax.cli._console import Console

_NETWORKS = {"cnn": models.CNN, "resnet18": models.ResNet18}


def run(config: _train_config.Config, out: Path, console: Console) -> dict[str, Any]:
    """Trains, or goes on, and returns the results (:func:`smark_jax.training.run`)."""

    def load() -> training.Task:
        _common.before_training(config.parties)
        console.say(f"Loading {config.dataset} ...")
        train = data.load(config.dataset, config.train_split)
        test = data.load(config.dataset, config.test_split)
        network = _NETWORKS[config.network](num_classes=train.num_classes)
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


def show(console: Console, out: Path, results: dict[str, Any]) -> None:
    """Prints what came of it, and what to do next."""
    console.say(f"Accuracy {results['accuracy']:.4f} on {results['config']['test_split']}.")
    if results["owner_mark_log10_p"] is not None:
        odds = f"1e{math.floor(results['owner_mark_log10_p']) + 1}"
        console.say(f"The owner's mark reads; chance would do that with a probability below {odds}.")
        console.say(f"Keep {out / 'private'} secret, and back it up: the mark is proved with what lies there.")
    console.say(f"The base model, {out / 'base.safetensors'}, goes to nobody. Next: smark add-model VAULT NAME BASE")
