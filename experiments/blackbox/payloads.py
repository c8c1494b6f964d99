"""Payloads of 304 bits in images of several kinds: what they cost and what they survive."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments.blackbox import alternatives, images
from experiments.common import networks, sections
from smark_jax import blackbox, keys, models

_DIGITS, _FACES, _SMALL, _LARGE = "digits 28 x 28 x 1", "LFW crops 25 x 25 x 1", *images.SHAPES
_STRONG = {_DIGITS: 8.0, _FACES: 9.0, _SMALL: 5.0, _LARGE: 2.5}
"""At which JPEG 90 is survived: small images have no room to spare."""
_SIGMA, _QUALITY = 2.0, 90
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """``counts`` of images of each kind; the classifier that sees the marked digits trains for ``epochs``."""

    counts: tuple[tuple[str, int], ...]
    strengths: tuple[float, ...]
    epochs: int
    learned_steps: int
    train_images: int | None = None


QUICK = Config(((_DIGITS, 200), (_FACES, 100), (_SMALL, 50), (_LARGE, 5)), (1.2, 4.0), epochs=4, learned_steps=200)
FULL = Config(
    ((_DIGITS, 1000), (_FACES, 200), (_SMALL, 200), (_LARGE, 50)),
    (0.8, 1.2, 2.0, 3.0, 4.0, 5.0, 6.0),
    epochs=15,
    learned_steps=3000,
)


def _key(seed: int) -> keys.SecretKey:
    return networks.secret(seed, "payloads")


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    key, rng = _key(seed), np.random.default_rng(seed)
    kinds = images.kinds(dict(config.counts), seed)
    meter.start(networks.steps(config.epochs, config.train_images or 4000))
    train = lambda *_: meter.step("train the classifier")  # noqa: E731
    subject = networks.train(models.CNN(), seed, config.epochs, train, config.train_images)
    labels = subject.test_labels[: len(kinds[_DIGITS])]

    def accuracy(digits: np.ndarray) -> float:
        return models.accuracy(subject.apply_fn, subject.base, digits, labels)

    meter.start(len(kinds) * (len(config.strengths) + 1) + 2)
    rows, payloads = [], {}
    shown_strength = config.strengths[min(1, len(config.strengths) - 1)]
    for name, clean in kinds.items():
        payload = rng.integers(0, 2, (len(clean), blackbox.PAYLOAD_BITS))
        payloads[name] = [np.packbits(bits).tobytes().hex() for bits in payload[:_SHOWN]]
        for strength in dict.fromkeys((*config.strengths, _STRONG[name])):
            marked = blackbox.mark_images(clean, payload, key, strength)
            row = _measure(clean, marked, payload, key, strength, rng)
            if name == _DIGITS:
                row["accuracy"] = accuracy(marked)
            rows.append({"kind": name, "strength": strength, "stronger": strength == _STRONG[name], **row})
            meter.step(f"{name}, strength {strength:g}")
    others = _alternatives(kinds[_DIGITS], subject, accuracy, key, config, rng, seed, meter)
    clean_accuracy = accuracy(kinds[_DIGITS])
    false_reads = int((blackbox.read_images(kinds[_DIGITS], key).confidence > 0).sum())
    return {
        "clean_accuracy": clean_accuracy,
        "unmarked_read": false_reads,
        "rows": rows,
        "alternatives": others,
        "shown": {"seed": seed, "strength": shown_strength, "payloads": payloads},
        "sigma": _SIGMA,
        "quality": _QUALITY,
    }


def _measure(
    clean: np.ndarray,
    marked: np.ndarray,
    payload: np.ndarray,
    key: keys.SecretKey,
    strength: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    def recovered(received: np.ndarray) -> float:
        return float((blackbox.read_images(received, key, strength).payload == payload).all(axis=1).mean())

    decibels = images.psnr(clean, marked)
    from_png = blackbox.read_images(images.through_file(marked, "PNG"), key, strength)
    return {
        "images": len(clean),
        "psnr_mean": float(decibels.mean()),
        "psnr_min": float(decibels.min()),
        "recovered_png": float((from_png.payload == payload).all(axis=1).mean()),
        "bit_errors_png": int((from_png.payload != payload).sum()),
        "confidence_min": float(from_png.confidence.min()),
        "recovered_noise": recovered(images.noisy(marked, _SIGMA, rng)),
        "recovered_jpeg": recovered(images.through_file(marked, "JPEG", quality=_QUALITY)),
    }


def _alternatives(
    digits: np.ndarray,
    subject: networks.Subject,
    accuracy: Any,
    key: keys.SecretKey,
    config: Config,
    rng: np.random.Generator,
    seed: int,
    meter: sections.Meter,
) -> list[dict[str, Any]]:
    """The same 304 bits by other means, on the same digits at about the same PSNR."""
    payload = rng.integers(0, 2, (len(digits), blackbox.PAYLOAD_BITS))
    dithered = blackbox.mark_images(digits, payload, key)
    read = blackbox.read_images(dithered, key).payload
    found = [("dither modulation (ours)", dithered, read)]
    meter.step("spread spectrum")
    spread = alternatives.spread_spectrum(digits, payload, key, rms=2.3)
    found.append(("spread spectrum", spread, alternatives.read_spread_spectrum(spread, key)))
    meter.step("learned encoder and decoder")
    learned, bits = alternatives.learned(subject.images, digits, payload, config.learned_steps, seed)
    found.append(("learned encoder and decoder", learned, bits))
    return [
        {
            "method": name,
            "psnr_mean": float(images.psnr(digits, marked).mean()),
            "bit_error_rate": float((bits != payload).mean()),
            "recovered": float((bits == payload).all(axis=1).mean()),
            "accuracy": accuracy(marked),
        }
        for name, marked, bits in found
    ]


def show(console: rich.console.Console, result: sections.Result) -> None:
    title = (
        f"304 bits an image; classifier on clean digits {result['clean_accuracy']:.3f}; noise of {result['sigma']:g} "
        f"grey levels, JPEG {result['quality']}; images without payload that read as marked: {result['unmarked_read']}"
    )
    table = rich.table.Table(title=title, title_justify="left")
    columns = (
        "images",
        "strength",
        "PSNR dB",
        "lowest",
        "read from PNG",
        "wrong bits",
        "after noise",
        "after JPEG",
        "acc",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "images" else "right")
    for row in result["rows"]:
        table.add_row(
            f"{row['images']} {row['kind']}",
            f"{row['strength']:g}{' *' if row['stronger'] else ''}",
            f"{row['psnr_mean']:.1f}",
            f"{row['psnr_min']:.1f}",
            f"{row['recovered_png']:.1%}",
            str(row["bit_errors_png"]),
            f"{row['recovered_noise']:.1%}",
            f"{row['recovered_jpeg']:.1%}",
            f"{row['accuracy']:.3f}" if "accuracy" in row else "",
        )
    console.print(table)
    console.print("* the stronger setting")
    table = rich.table.Table(title="Other ways, on the same digits", title_justify="left")
    for column in ("method", "PSNR dB", "bits wrong", "payloads read", "accuracy"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result["alternatives"]:
        cells = (f"{row['psnr_mean']:.1f}", f"{row['bit_error_rate']:.2%}", f"{row['recovered']:.1%}")
        table.add_row(row["method"], *cells, f"{row['accuracy']:.3f}")
    console.print(table)


def shown(result: sections.Result) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The first images of each kind, clean and marked, made again from the seed and the payloads in the result."""
    seed, strength, payloads = (result["shown"][name] for name in ("seed", "strength", "payloads"))
    key = _key(seed)
    kinds = images.kinds({row["kind"]: row["images"] for row in result["rows"]}, seed)
    found = {}
    for name, texts in payloads.items():
        clean = kinds[name][:_SHOWN]
        bits = np.unpackbits([np.frombuffer(bytes.fromhex(text), np.uint8) for text in texts], axis=1)
        found[name] = clean, blackbox.mark_images(clean, bits, key, strength)
    return found


def picture(path: Path, result: sections.Result) -> None:
    """Clean, marked, and 20 times the difference around grey, for each kind of images."""
    pairs = shown(result)
    with sections.figure(path, 10, 1.55 * len(pairs)) as figure:
        grid = figure.subplots(len(pairs), 3 * _SHOWN)
        for number, title in enumerate(("clean", "marked", "difference x 20") * _SHOWN):
            grid[0][number].set_title(title, fontsize=8)
        for row, (name, (clean, marked)) in zip(grid, pairs.items(), strict=True):
            difference = np.clip(128 + 20.0 * (marked.astype(int) - clean), 0, 255).astype(np.uint8)
            for number in range(_SHOWN):
                for place, image in enumerate((clean, marked, difference)):
                    axes = row[3 * number + place]
                    axes.imshow(image[number], cmap="gray", vmin=0, vmax=255)
                    axes.set_xticks([])
                    axes.set_yticks([])
                    axes.spines[:].set_visible(False)
            row[0].set_ylabel(name.replace(" ", "\n", 1), fontsize=7)
