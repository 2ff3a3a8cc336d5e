"""Exact video frames by presentation time.

Input: a video path and times. Output: frames at the size that the model expects, each with a
reference that reproduces the same bytes. This package is pure: it must not import Ray, torch or
model code. The decode pool (`vz_ray.decode`) runs it in Ray actors.
"""
