"""The training step over several processes, or in one process with differential privacy."""
