"""The training step over several processes, and over one with differential privacy."""
