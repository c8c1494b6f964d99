"""Assignment problems of which most rows have a best column of their own."""

import numpy as np

_TRIES = 3
_ROUNDS = 30
_ROUNDING = 1e-7


def solve(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Rows and columns of the assignment with the greatest sum, up to rounding.

    Most rows have a column of their own that is their best. Only the others are solved for, on the columns that are
    left. The outcome is optimal if columns have prices :math:`p \ge 0`, zero for those without a row, under which
    every row prefers its own: :math:`t_{i c_i} - p_{c_i} \ge t_{i j} - p_j`, since a sum over rows bounds any other
    assignment. Rows whose columns got a price, and kept changing it, join those that are solved for. (Complementary
    slackness; Kuhn 1955.)
    """
    from scipy import optimize  # here and not above: most suspects are read without alignment

    size, width = total.shape
    rows, best = np.arange(size), total.argmax(axis=1) if width else np.zeros(0, int)
    if size > width:
        return optimize.linear_sum_assignment(total, maximize=True)
    open_rows = np.bincount(best, minlength=width)[best] > 1
    for _ in range(_TRIES):
        if 2 * open_rows.sum() > size:
            break
        if not open_rows.any():
            return rows, best
        columns = np.array(best)
        left = np.setdiff1d(np.arange(width), best[~open_rows])
        columns[open_rows] = left[optimize.linear_sum_assignment(total[np.ix_(open_rows, left)], maximize=True)[1]]
        moving = _priced(total, columns, open_rows)
        if moving is None:
            return rows, columns
        open_rows |= moving
    return optimize.linear_sum_assignment(total, maximize=True)


def _priced(total: np.ndarray, columns: np.ndarray, start: np.ndarray) -> np.ndarray | None:
    """None if columns have prices under which every row prefers its own, else the rows whose columns got a price.

    Rows that are not in ``start`` have their best columns.
    """
    owner = np.full(total.shape[1], -1)
    owner[columns] = np.arange(len(columns))
    own = total[np.arange(len(columns)), columns].astype(np.float64)
    slack = _ROUNDING * max(1e-30, float(np.abs(own).max()))
    prices, rows = np.zeros(total.shape[1]), np.flatnonzero(start)
    for _ in range(_ROUNDS):
        wanted = (total[rows] + (prices[columns[rows]] - own[rows])[:, None]).max(axis=0)
        raised = wanted > prices + slack
        if (raised & (owner < 0)).any():
            break
        if not raised.any():
            return None
        prices = np.where(raised, wanted, prices)
        rows = owner[raised]
    moving = np.zeros(len(columns), bool)
    moving[owner[(prices > 0) & (owner >= 0)]] = True
    return moving
