"""A Flower app whose updates are masked: see the README beside it."""
