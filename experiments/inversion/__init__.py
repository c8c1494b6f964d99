"""What a party's messages give away about its images, measured by one command: ``python -m experiments.inversion``."""
