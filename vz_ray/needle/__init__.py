"""Needle world (synthetic benchmark), tiny models, quickstart and ablation.

A needle video has sixteen shots of equal length. Some shots show a colored border, during which a symbol
flashes for an eighth of the shot. A sparse overview therefore shows which shot to zoom into, but not the
symbol. In the *deep* kind the shot is a night scene, the border is visible for an eighth of the shot, and the
flash for an eighth of that: two zooms are needed.

A shot is as long as the distance between two frames of a 16-frame overview, so that a model with a million
parameters can name a segment by copying two timestamps.
"""

from vz_ray.needle.frame_renderer import render_frames
from vz_ray.needle.needle_video import NeedleQuestion, NeedleVideo, QuestionKind, make_video

__all__ = ["NeedleQuestion", "NeedleVideo", "QuestionKind", "make_video", "render_frames"]
