"""The table of traceable coalitions: y = mean of K codewords + N(0, sigma^2), with at most 5 % of trials missed.

The joint decoder runs on all N customers. The single decoder's decision on a colluder depends on N only through the
level alpha / N, so its rows use the colluders' exact statistics and p-values and need no innocents, for any N.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from experiments.collusion import common
from experiments.common import sections
from smark_jax import codes, keys, statistics, tracing

ALPHA = 1e-6
LEAST_SUCCESS = 0.95
_MOST_HELD = 200_000_000
# From GUARANTEES.md: maps (decoder, m, SNR in dB, N) to the largest K with catch-any / catch-all.
STATED = {
    **{("single", 304, 0, n): k for n, k in ((10**3, "2/1"), (10**6, "1/1"), (10**7, "1/1"))},
    **{("single", 304, 10, n): k for n, k in ((10**3, "5/3"), (10**6, "3/2"), (10**7, "3/2"))},
    **{("single", 304, 20, n): k for n, k in ((10**3, "7/4"), (10**6, "5/3"), (10**7, "5/3"))},
    **{("single", 1024, 10, n): k for n, k in ((10**3, "13/7"), (10**6, "10/6"), (10**7, "10/6"))},
    **{("single", 1024, 20, n): k for n, k in ((10**3, "28/11"), (10**6, "20/9"), (10**7, "18/9"))},
    **{("single", 4096, 10, n): k for n, k in ((10**3, "36/17"), (10**6, "28/15"), (10**7, "25/15"))},
    ("joint", 304, 0, 10**5): "2/1",
    ("joint", 304, 10, 10**6): ">=6/4",
    ("joint", 304, 20, 10**6): "10/10",
    ("joint", 1024, 10, 10**6): ">=13/>=9",
    ("joint", 1024, 20, 10**5): ">=32/28",
    ("joint", 4096, 10, 20_000): ">=28/20",
}

Catch = Callable[[int], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Config:
    """``joint`` and ``single`` list (m, SNR in dB, N); ``sizes`` are the coalitions that are tried."""

    joint: tuple[tuple[int, int, int], ...]
    single: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, ...]
    joint_trials: int
    single_trials: int


_LADDER = (*range(1, 17), 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 45, 50)
QUICK = Config(
    joint=((304, 0, 10**5), (304, 10, 10**5), (304, 20, 10**4)),
    single=tuple((304, snr, 10**6) for snr in (0, 10, 20)),
    sizes=(1, 2, 3, 4, 5, 6, 8, 10),
    joint_trials=10,
    single_trials=60,
)
FULL = Config(
    joint=(
        *((304, snr, n) for snr in (0, 10, 20) for n in (10**3, 10**5)),
        (304, 10, 10**6),
        (304, 20, 10**6),
        (1024, 10, 10**3),
        (1024, 10, 10**5),
        (1024, 20, 10**5),
        (4096, 10, 20_000),
    ),
    single=tuple(
        (m, snr, n)
        for m, snr in ((304, 0), (304, 10), (304, 20), (1024, 10), (1024, 20), (4096, 10))
        for n in (10**3, 10**6, 10**7)
    ),
    sizes=_LADDER,
    joint_trials=20,
    single_trials=400,
)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    cases = [("single", case) for case in config.single] + [("joint", case) for case in config.joint]
    meter.start(len(cases))
    key, rows = common.master_key(seed, "capability"), []
    for number, (decoder, (m, snr, customers)) in enumerate(cases):
        rng = np.random.default_rng([seed, number])
        case_key = keys.derive(key, str(number))
        if decoder == "single":
            catch = _single(case_key, m, snr, customers, config.single_trials, max(config.sizes), rng)
        else:
            catch = _joint(case_key, m, snr, customers, config.joint_trials, rng)
        found = _largest(catch, tuple(size for size in config.sizes if size <= customers))
        stated = STATED.get((decoder, m, snr, customers))
        rows.append({"decoder": decoder, "m": m, "snr_db": snr, "customers": customers, **found, "stated": stated})
        meter.step(f"{decoder} m={m} {snr} dB N={customers:,}: {found['any']}/{found['all']}")
    return {"alpha": ALPHA, "least_success": LEAST_SUCCESS, "rows": rows}


def _largest(catch: Catch, sizes: tuple[int, ...]) -> sections.Result:
    """Bisection for the largest coalition of which anyone, and of which everyone, is caught often enough."""
    rates: dict[int, tuple[float, float]] = {}
    best = {}
    for which, name in enumerate(("any", "all")):
        low, high = 0, len(sizes)  # sizes[low - 1] succeeds, sizes[high] fails
        while low < high:
            middle = (low + high) // 2
            size = sizes[middle]
            rates[size] = rates.get(size) or catch(size)
            low, high = (middle + 1, high) if rates[size][which] >= LEAST_SUCCESS else (low, middle)
        best[name] = sizes[low - 1] if low else 0
        best[f"{name}_open"] = low == len(sizes)
    measured = {str(size): {"any": rate[0], "all": rate[1]} for size, rate in sorted(rates.items())}
    return {**best, "measured": measured}


def _read_out(words: np.ndarray, snr_db: int, rng: np.random.Generator) -> np.ndarray:
    return words.mean(axis=0) + 10 ** (-snr_db / 20) * rng.normal(size=words.shape[1])


def _single(
    key: keys.SecretKey, m: int, snr: int, customers: int, trials: int, largest: int, rng: np.random.Generator
) -> Catch:
    words = np.asarray(codes.codebook(key, range(trials * largest), m)).reshape(trials, largest, m)
    level = math.log(ALPHA) - math.log(customers)

    def catch(size: int) -> tuple[float, float]:
        anyone = everyone = 0
        for coalition in words[:, :size].astype(np.float64):
            y = _read_out(coalition, snr, rng)
            scores = np.abs(coalition @ statistics.direction(y))
            log_p = statistics.log_p_value(np.array([scores.max(), scores.min()]), y)
            anyone += log_p[0] <= level
            everyone += log_p[1] <= level
        return float(anyone) / trials, float(everyone) / trials

    return catch


def _joint(key: keys.SecretKey, m: int, snr: int, customers: int, trials: int, rng: np.random.Generator) -> Catch:
    # The codebook is held in memory where it fits: streaming would recompile for each new number of customers.
    book = codes.Codebook(key, customers, m)
    if customers * m <= _MOST_HELD:
        book = np.asarray(codes.codebook(key, range(customers), m))

    def catch(size: int) -> tuple[float, float]:
        coalitions = [rng.choice(customers, size, replace=False) for _ in range(trials)]
        y = np.stack([_read_out(_words(book, c), snr, rng) for c in coalitions])
        # One pass serves all trials. trace_batch divides alpha by their number, so each is tested at ALPHA.
        verdicts = tracing.trace_batch(y, book, ALPHA * trials, keep_statistics=False)
        guilty = np.array([common.caught(v, set(c.tolist()))[0] for v, c in zip(verdicts, coalitions, strict=True)])
        return float(np.mean(guilty > 0)), float(np.mean(guilty == size))

    return catch


def _words(book: np.ndarray | codes.Codebook, customers: np.ndarray) -> np.ndarray:
    if isinstance(book, codes.Codebook):
        return np.asarray(codes.codebook(book.key, customers, book.num_chips), np.float64)
    return book[customers].astype(np.float64)


def show(console: rich.console.Console, result: sections.Result) -> None:
    table = rich.table.Table(title="Largest coalition traced, anyone / everyone, miss <= 5 %", title_justify="left")
    for column in ("decoder", "m", "SNR [dB]", "N", "any/all", "stated"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    for row in result["rows"]:
        table.add_row(
            row["decoder"],
            str(row["m"]),
            str(row["snr_db"]),
            f"{row['customers']:,}",
            _label(row),
            row["stated"] or "-",
        )
    console.print(table)


def _label(row: sections.Result) -> str:
    return "/".join(f"{'>=' if row[f'{name}_open'] else ''}{row[name]}" for name in ("any", "all"))


def picture(path: Path, result: sections.Result) -> None:
    rows = sorted(result["rows"], key=lambda row: (row["m"], row["snr_db"], row["decoder"], row["customers"]))
    colours = {"single": "#7f8c8d", "joint": "#c0392b"}
    with sections.figure(path, 8, 1.4 + 0.27 * len(rows)) as fig:
        axes = fig.subplots()
        for height, row in enumerate(rows):
            axes.plot([row["all"], row["any"]], [height] * 2, color=colours[row["decoder"]], lw=3, alpha=0.5)
            axes.plot(row["all"], height, "o", color=colours[row["decoder"]])
            axes.plot(row["any"], height, "o", color=colours[row["decoder"]], mfc="white")
        names = [f"{r['decoder']}, m = {r['m']}, {r['snr_db']} dB, N = {r['customers']:,}" for r in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("largest coalition K: everyone caught (full), anyone caught (open)")
        axes.set_title(f"What can be traced at alpha = {result['alpha']:g}, in 95 % of trials", loc="left")
