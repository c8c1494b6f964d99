"""The tables of a paper: run with ``python -m experiments.paper``."""
