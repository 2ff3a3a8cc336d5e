"""Evaluation: run episodes on benchmarks, aggregate metrics with confidence intervals, write tables.

Input: scored episodes with their tasks. Output: resumable per-sample logs, metrics, failure counts,
`summary.json`, `benchmarks.json` and terminal tables. Must not import `training` or anything above it.
"""
