"""Fingerprints under attack: removal, and rewrites that preserve the network's function."""
