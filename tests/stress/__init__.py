"""Stress: a desk that is killed at random moments, and files and evidence from liars.

The quick form of each runs in the suite (``test_stress.py``); ``SMARK_STRESS=full pytest tests/stress`` runs the full
form and writes ``tests/stress/results``.
"""
