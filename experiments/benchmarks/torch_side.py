"""The timed parts of the PyTorch system."""
# pyright: reportMissingImports=false

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.torch_system import (
    CNN,
    DEVICE,
    ROWS_PER_BLOCK,
    STRENGTH,
    Stream,
    accuracy,
    cipher_stream,
    deepmarks_loss,
    embedded,
    extracted,
    generator,
    generator_stream,
    log_p_values,
    network,
    pixels,
    projection,
    signs,
    statistics,
    statistics_by_tables,
    uchida_loss,
)

Arms = Mapping[str, Callable[[], dict[str, Any] | None]]

_COPIES_PER_BATCH = 32
# Fine-tuning: the factor of Uchida's loss and Adam's rate, for a layer and for all weights. Among factors 0.1, 1 and 10
# and rates 0.001 and 0.003, these took the least time of those that roughly kept the accuracy.
_LAYER, _ALL, _BATCH = (10.0, 1e-3), (1.0, 3e-3), 64


def device() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def device_peak() -> float | None:
    """Peak megabytes on an accelerator; None on a CPU, whose memory is the process's."""
    return torch.cuda.max_memory_allocated() / 1e6 if DEVICE.type == "cuda" else None


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _done(function: Callable[[], Any]) -> Callable[[], None]:
    def arm() -> None:
        function()
        _wait()

    return arm


def weights(num_weights: int, num_chips: int, seed: int) -> Arms:
    """Work on one vector of weights with a dense projection, and one copy of it."""
    base = torch.randn(num_weights, generator=generator(seed), device=DEVICE)
    matrix = projection(num_chips, num_weights, seed + 1)
    code = signs(1, num_chips, seed + 2)[0]
    marked = embedded(base, matrix, code)
    moved, chips = torch.empty_like(base), torch.empty(num_chips, device=DEVICE)

    def extract() -> dict[str, Any]:
        return {"wrong_chips": int((extracted(marked, base, matrix).sign() != code).sum())}

    return {
        "copy": _done(lambda: torch.add(base, 1, out=moved)),
        "spread": _done(lambda: torch.mv(matrix.T, code, out=moved)),
        "despread": _done(lambda: torch.mv(matrix, base, out=chips)),
        "embed": _done(lambda: embedded(base, matrix, code)),
        "extract": extract,
    }


def fingerprint_losses(num_weights: int, num_chips: int, seed: int) -> Arms:
    """Value and gradient of the two losses with a dense projection."""
    vector = torch.randn(num_weights, generator=generator(seed), device=DEVICE).requires_grad_()
    matrix, code = projection(num_chips, num_weights, seed + 1), signs(1, num_chips, seed + 2)[0]

    def arm(loss: Callable[..., Tensor]) -> Callable[[], None]:
        return _done(lambda: torch.autograd.grad(loss(vector, matrix, code), vector))

    return {"uchida": arm(uchida_loss), "deepmarks": arm(deepmarks_loss)}


def train(parties: int, batch: int, seed: int) -> Arms:
    """A data-parallel step of the CNN: the mean of the parties' gradients, then Adam.

    On one device the parties' batches may run one after the other (``parties``), or as one (``joined``): the mean of
    equally many examples' gradients is the same.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = pixels(rng.integers(0, 256, (parties, batch, 28, 28, 1), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, parties * batch)).to(DEVICE)

    def arm(parts: int) -> Callable[[], None]:
        model = CNN().to(DEVICE).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def step() -> None:
            optimizer.zero_grad()
            for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                (F.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()

        return _done(step)

    return {"parties": arm(parties), "joined": arm(1)}


def copies(num_copies: int, num_weights: int, num_chips: int, seed: int) -> Arms:
    """Copies by spread spectrum, some at a time: one product of codewords and projection for each batch."""
    base = torch.randn(num_weights, generator=generator(seed), device=DEVICE)
    matrix = projection(num_chips, num_weights, seed + 1)
    words = signs(num_copies, num_chips, seed + 2)
    scale = float(STRENGTH * base.square().mean().sqrt() * math.sqrt(num_weights / num_chips))
    made = torch.empty(min(num_copies, _COPIES_PER_BATCH), num_weights, device=DEVICE)

    def embed() -> None:
        for some in words.split(_COPIES_PER_BATCH):
            torch.addmm(base, some, matrix, alpha=scale, out=made[: len(some)])

    return {"embed": _done(embed)}


def tune(model: str, num_chips: int, seed: int) -> Arms:
    """A copy by fine-tuning with Uchida's loss beside the task's until every bit reads right, a new codeword each lap.

    ``layer`` marks the mean kernel of the first dense layer, as the paper does with a convolution (no convolution of
    this network has as many entries as there are bits); ``all`` marks every weight. The projection's entries are
    standard normal, as in the paper.
    """
    with np.load(model) as saved:
        leaves = {name.removeprefix("weights:"): saved[name] for name in saved.files if name.startswith("weights:")}
        images, labels = pixels(saved["train_images"]), torch.from_numpy(saved["train_labels"]).long().to(DEVICE)
        test_images, test_labels = pixels(saved["test_images"]), torch.from_numpy(saved["test_labels"]).to(DEVICE)
    rng = torch.Generator().manual_seed(seed)

    def arm(read: Callable[[CNN], Tensor], factor: float, learning_rate: float) -> Callable[[], dict[str, Any]]:
        width = read(network(leaves)).numel()
        matrix = torch.randn(num_chips, width, generator=generator(seed), device=DEVICE)
        codes = iter(range(seed, 1 << 30))

        def copy() -> dict[str, Any]:
            code = signs(1, num_chips, next(codes))[0]
            copy = network(leaves)
            optimizer = torch.optim.Adam(copy.parameters(), learning_rate)
            steps, order = 0, torch.randperm(len(images), generator=rng).split(_BATCH)
            while True:
                some = order[steps % len(order)].to(DEVICE)
                chips = matrix @ read(copy)
                if bool((chips.detach() * code > 0).all()):
                    break
                steps += 1
                if steps > 5000:
                    raise RuntimeError(f"tune: {num_chips} bits still not right after {steps} steps.")
                task = F.cross_entropy(copy(images[some]), labels[some])
                loss = task + factor * F.binary_cross_entropy_with_logits(chips, (code + 1) / 2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            _wait()
            return {"steps": steps, "model": copy}

        def timed() -> dict[str, Any]:
            began = time.perf_counter()
            found = copy()
            seconds = time.perf_counter() - began
            score = accuracy(found["model"], test_images, test_labels)
            return {"seconds": seconds, "steps": found["steps"], "accuracy": score}

        return timed

    mean_kernel = lambda net: net.dense_0.weight.mean(0)  # noqa: E731
    every_weight = lambda net: torch.cat([weight.flatten() for weight in net.parameters()])  # noqa: E731
    return {"layer": arm(mean_kernel, *_LAYER), "all": arm(every_weight, *_ALL)}


def verdict(num_customers: int, num_chips: int, seed: int) -> Arms:
    """From the generator's seed to every customer's p-value.

    Codewords in blocks and a product with each; all of them at once (``held``); in blocks, by ``tables``; and the same
    with a ``cipher``, whose codewords are as secret as smark_jax's.
    """
    guilty = min(num_customers, ROWS_PER_BLOCK) // 3

    def arm(score: Callable[..., Tensor], rows: int, stream: Stream = generator_stream) -> Callable[[], dict[str, Any]]:
        @functools.cache  # made by the first lap, so that an arm that does not run takes no memory
        def chips() -> Tensor:
            word = signs(min(rows, num_customers), num_chips, seed, stream)[guilty]
            return word + torch.randn(num_chips, generator=generator(seed), device=DEVICE)

        def run() -> dict[str, Any]:
            log_p = log_p_values(score(chips(), num_customers, seed, rows))
            return {"right": torch.nonzero(log_p <= math.log(1e-6)).flatten().tolist() == [guilty]}

        return run

    return {
        "blocks": arm(statistics, ROWS_PER_BLOCK),
        "tables": arm(statistics_by_tables, ROWS_PER_BLOCK),
        "cipher": arm(functools.partial(statistics_by_tables, stream=cipher_stream), ROWS_PER_BLOCK, cipher_stream),
        "held": arm(statistics, num_customers),
    }


CASES: dict[str, Callable[..., Arms]] = {
    "weights": weights,
    "losses": fingerprint_losses,
    "train": train,
    "copies": copies,
    "tune": tune,
    "verdict": verdict,
}
