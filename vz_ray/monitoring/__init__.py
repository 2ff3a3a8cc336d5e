"""Observability of runs: logs, metrics, traces, trackers, terminal progress, run directory, live status.

Input: names, numbers and log records. Output: files in the run directory, Prometheus metrics, traces, terminal
output. Must not import training, rollout or decode code; only `ray_metrics` imports Ray.
"""
