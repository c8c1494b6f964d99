"""Fingerprints under attack: removal, and rewrites that leave the function alone."""
