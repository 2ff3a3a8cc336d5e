"""Primitives that everyone may use and that know no one.

Metrics, run directory, progress on the terminal, and deadlines that name
whom they waited for.
"""
