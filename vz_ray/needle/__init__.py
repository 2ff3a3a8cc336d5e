"""The needle world: long videos in which the answer is visible only briefly.

A video is sixteen shots of equal length. In some shots a coloured border is
shown, and while it is shown a symbol flashes for an eighth of the shot, so a
sparse overview shows which shot to look into but not what flashes there. In
the *deep* kind the shot is a night scene, the border is shown for an eighth of
it, and the flash lasts an eighth of that: two zooms are needed.

A shot is as long as the distance between two frames of a 16-frame overview.
That is a property of this world, chosen so that a model of a million
parameters can name a segment by copying two timestamps that it has read.
"""

from vz_ray.needle.frame_renderer import render_frames
from vz_ray.needle.needle_video import NeedleQuestion, NeedleVideo, QuestionKind, make_video

__all__ = ["QuestionKind", "NeedleVideo", "NeedleQuestion", "render_frames", "make_video"]
