"""Digits under the SecAgg+ of Flower."""
