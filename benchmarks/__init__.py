"""Benchmarks against common alternatives; run them with `make bench-*`."""
