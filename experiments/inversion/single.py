"""One party's gradient of one digit, sent unmasked and masked, and what an attacker reconstructs from each.

Both messages are encoded as fixed-point words and decoded as if they were a sum of one party; the mask is the only
difference. The control is an attacker who saw nothing and answers with the mean training digit.
"""

import base64
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jax.flatten_util import ravel_pytree
from scipy import stats

from experiments.common import sections
from experiments.inversion import common
from smark_jax import aggregation, attacks, keys
from smark_jax._types import PyTree

_PARTIES = 5
_LEVEL = 1e-3
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Case:
    network: Literal["LeNet", "CNN"]
    weights: Literal["fresh", "trained"]
    method: attacks.InversionMethod
    labels: Literal["inferred", "optimised"] = "inferred"
    steps: int = 300
    digits: int = 20


@dataclasses.dataclass(frozen=True)
class Config:
    cases: tuple[Case, ...]


QUICK = Config(
    (
        Case("LeNet", "fresh", "dlg", steps=200),
        Case("LeNet", "fresh", "cosine", steps=200),
        Case("CNN", "fresh", "cosine", steps=200, digits=4),
    )
)
FULL = Config(
    (
        Case("LeNet", "fresh", "dlg"),
        Case("LeNet", "fresh", "dlg", "optimised"),
        Case("LeNet", "fresh", "cosine", steps=600),
        Case("LeNet", "trained", "dlg"),
        Case("CNN", "fresh", "cosine"),
        Case("CNN", "trained", "cosine"),
        Case("CNN", "fresh", "dlg", steps=100, digits=5),
    )
)


class Messages(NamedTuple):
    """What one party of a network's parties sends, a round for each digit, with its mask and without."""

    words: dict[Literal["unmasked", "masked"], list[np.ndarray]]
    decode: Callable[[np.ndarray], PyTree]


def _messages(victim: common.Victim, number: int, images: np.ndarray, labels: np.ndarray, seed: int) -> Messages:
    purpose = f"party of network {number}"
    master = sections.secret(seed, "experiments.inversion", purpose)
    secrets = [keys.derive(master, str(party)) for party in range(_PARTIES)]
    pair_keys = aggregation.pair_keys(secrets)[0]
    gradients = [victim.gradient(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    fixed_point = aggregation.FixedPoint(largest, _PARTIES)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.uint32), gradients[0]))
    encode = jax.jit(lambda gradient, key: ravel_pytree(aggregation.encode(gradient, fixed_point, key))[0])
    words: dict[Literal["unmasked", "masked"], list[np.ndarray]] = {"unmasked": [], "masked": []}
    for round, gradient in enumerate(gradients):
        flat = encode(gradient, aggregation.rounding_key(pair_keys, 0, round))
        words["unmasked"].append(np.asarray(flat))
        words["masked"].append(np.asarray(flat + aggregation.pairwise_mask(pair_keys, 0, round, flat.size)))
    return Messages(words, jax.jit(lambda flat: aggregation.decode(unravel(flat), fixed_point, 1)))


def run(config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    meter.start(sum(2 * case.digits * case.steps for case in config.cases))
    images, labels, mean = common.digits()
    most = max(case.digits for case in config.cases)
    images, labels = images[:most], labels[:most]
    control = [common.likeness(mean, image) for image in images]
    pictures = {"originals": images[:_SHOWN]}
    rows, tests = [], []
    sent: dict[tuple[str, str], tuple[common.Victim, Messages]] = {}
    for case in config.cases:
        if (case.network, case.weights) not in sent:
            victim = common.victim(case.network, case.weights, seed)
            messages = _messages(victim, len(sent), images, labels, seed)
            sent[case.network, case.weights] = victim, messages
            for message, words in messages.words.items():
                name = f"{case.network}, {case.weights}"
                tests.append({"network": name, "message": message, **uniformity(np.concatenate(words))})
        victim, messages = sent[case.network, case.weights]
        for message, words in messages.words.items():
            found, found_labels = [], []
            for i in range(case.digits):
                seen = messages.decode(words[i])
                reconstruction = attacks.invert_gradient(
                    victim.apply_fn,
                    victim.params,
                    seen,
                    jax.random.fold_in(jax.random.key(seed), i),
                    shape=(1, *common.IMAGE_SHAPE),
                    labels=common.inferred_label(case.network, seen) if case.labels == "inferred" else None,
                    method=case.method,
                    steps=case.steps,
                    on_chunk=lambda done, case=case: meter.step(f"{case.network} {case.method}", done),
                )
                found.append(np.asarray(reconstruction.images[0]))
                found_labels.append(int(reconstruction.labels[0]))
            scores = [common.likeness(*pair) for pair in zip(found, images[: case.digits], strict=True)]
            row = {
                **dataclasses.asdict(case),
                "message": message,
                "accuracy": victim.accuracy,
                "labels_right": int((labels[: case.digits] == found_labels).sum()),
                "better_than_control": sum(
                    score.psnr > blind.psnr for score, blind in zip(scores, control, strict=False)
                ),
                **common.summary(scores),
            }
            rows.append(row)
            pictures[_name(row)] = np.stack(found[:_SHOWN])
    return {
        "parties": _PARTIES,
        "level": _LEVEL,
        "rows": rows,
        "control": common.summary(control),
        "uniformity": tests,
        "pictures": {name: _packed(strip) for name, strip in pictures.items()},
    }


def uniformity(words: np.ndarray) -> dict[str, Any]:
    """Two tests of uint32 words against the uniform distribution: chi-square of all bytes, and each bit's share.

    Returns:
      The p-values; that of the 32 bits together is the smallest of them times 32 (Bonferroni).
    """
    counts = np.bincount(words.view(np.uint8), minlength=256)
    ones = np.array([int(((words >> bit) & 1).sum()) for bit in range(32)])
    z = (ones - words.size / 2) / np.sqrt(words.size / 4)
    bits = 2 * stats.norm.sf(np.abs(z))
    return {
        "words": words.size,
        "bytes_p": float(stats.chisquare(counts).pvalue),
        "bits_p": float(min(1, 32 * bits.min())),
        "largest_z": float(np.abs(z).max()),
        "bit_p_each": [float(p) for p in bits],
    }


def _name(row: dict[str, Any]) -> str:
    labels = "" if row["labels"] == "inferred" else ", labels optimised"
    return f"{row['message']}: {row['network']} {row['weights']}, {row['method']}{labels}"


def _packed(images: np.ndarray) -> str:
    """Images side by side, as 8-bit grey values in base64, for the picture alone."""
    strip = np.concatenate(list(images[..., 0]), axis=1)
    return base64.b64encode(np.round(255 * strip).astype(np.uint8).tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(common.IMAGE_SHAPE[0], -1)


def show(console: rich.console.Console, result: dict[str, Any]) -> None:
    table = rich.table.Table(title="A digit from one party's message", title_justify="left")
    left = ("network", "weights", "method", "labels", "message")
    for column in (*left, "digits", "PSNR", "median", "lowest", "SSIM", "MSE", "labels right", "above control"):
        table.add_column(column, justify="left" if column in left else "right")
    for row in result["rows"]:
        colour = "bold red" if row["message"] == "unmasked" else "green"
        table.add_row(
            *(row[column] for column in left[:-1]),
            f"[{colour}]{row['message']}[/{colour}]",
            str(row["digits"]),
            *_figures(row),
            str(row["labels_right"]),
            str(row["better_than_control"]),
        )
    blind = result["control"]
    table.add_row("", "", "mean digit", "", "(control)", str(len(blind["psnr_each"])), *_figures(blind))
    console.print(table)
    title = f"Are the words sent uniform? p-values, refused below {result['level']:g}"
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("network", "message", "words", "bytes, chi-square", "bits, z", "largest |z|", "verdict"):
        table.add_column(column, justify="left" if column in ("network", "message", "verdict") else "right")
    for row in result["uniformity"]:
        uniform = min(row["bytes_p"], row["bits_p"]) >= result["level"]
        table.add_row(
            row["network"],
            row["message"],
            f"{row['words']:,}",
            f"{row['bytes_p']:.3g}",
            f"{row['bits_p']:.3g}",
            f"{row['largest_z']:.1f}",
            "[green]not refused[/green]" if uniform else "[bold red]not uniform[/bold red]",
        )
    console.print(table)


def _figures(row: dict[str, Any]) -> list[str]:
    decibels = [f"{row[name]:.1f}" for name in ("psnr", "psnr_median", "psnr_lowest")]
    return [*decibels, f"{row['ssim']:.3f}", f"{row['mse']:.2g}"]


def picture(path: Path, result: dict[str, Any]) -> None:
    strips = result["pictures"]
    with sections.figure(path, 8, 0.72 * len(strips)) as fig:
        for axes, (name, strip) in zip(np.atleast_1d(fig.subplots(len(strips))), strips.items(), strict=True):
            axes.imshow(_unpacked(strip), cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            axes.set_anchor("W")
            axes.set_title(name, loc="left", fontsize=7, pad=2)
