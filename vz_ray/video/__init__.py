"""Frames of video files, exact by presentation time.

In: a path and times. Out: frames at the size the model wants, each with a
reference from which the same bytes can be had again. Pure: this room knows
neither Ray nor torch nor the model; the clip pool (`vz_ray.decode`) runs it in
actors.
"""
