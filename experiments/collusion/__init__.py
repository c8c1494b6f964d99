"""Measures this project's claims about coalitions with one command: ``python -m experiments.collusion``."""
