"""Measures what a party's messages reveal about its images, with one command: ``python -m experiments.inversion``."""
