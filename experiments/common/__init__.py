"""Shared by experiments: sections and their command line, networks to attack, other codes for comparison."""
