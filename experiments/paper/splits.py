"""Non-IID splits: deals data to parties with different class proportions."""

import numpy as np


def dirichlet(
    images: np.ndarray, labels: np.ndarray, num_parties: int, concentration: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Deals the same number of examples to each party, in class proportions drawn from Dirichlet(concentration).

    A party draws the class of its next example from its proportions, among the classes that have examples left. The
    parties take turns, so that none gets only what the others left. Non-identical data as in Hsu, Qi, Brown 2019 (arXiv
    1909.06335), section 3; the smaller the concentration, the fewer classes a party has.

    Args:
      images: shape [N, ...].
      labels: class numbers, shape [N].
      num_parties: P; N modulo P examples are left over.
      concentration: of the symmetric Dirichlet distribution.
      seed: of proportions and order.

    Returns:
      Images of shape [P, n, ...] and labels of shape [P, n], n = N // P, as ``training.partition`` gives.
    """
    rng = np.random.default_rng(seed)
    classes = int(labels.max()) + 1
    wanted = rng.dirichlet(np.full(classes, concentration), num_parties)
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in range(classes)]
    dealt: list[list[int]] = [[] for _ in range(num_parties)]
    for _ in range(len(labels) // num_parties):
        for party in range(num_parties):
            # A party whose classes are used up takes any of the remaining examples.
            odds = np.where([len(pool) > 0 for pool in left], np.maximum(wanted[party], 1e-12), 0.0)
            label = int(rng.choice(classes, p=odds / odds.sum()))
            dealt[party].append(left[label].pop())
    order = np.array([rng.permutation(indices) for indices in dealt])
    return np.asarray(images)[order], np.asarray(labels)[order]


def imbalance(labels: np.ndarray) -> float:
    """Mean total variation distance between a party's classes and everybody's: 0 when all are alike.

    Args:
      labels: of all parties, shape [P, n].
    """
    shares = np.stack([np.bincount(row, minlength=labels.max() + 1) / row.size for row in labels])
    return float(np.abs(shares - shares.mean(axis=0)).sum(axis=1).mean() / 2)
