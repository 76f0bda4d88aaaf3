"""Scaling studies: plan runs, run them, fit laws to them, predict larger ones.

``law``, ``fit`` and ``table`` need no torch and take any ``runs.csv``.
"""
