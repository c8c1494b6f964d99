"""Training on digits under Flower's SecAgg+."""
