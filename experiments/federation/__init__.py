"""Masked training over Flower: in one process, and as real processes on loopback."""
