"""Copies that other libraries rewrote: which forms are traced, by one command: ``python -m experiments.formats``."""
