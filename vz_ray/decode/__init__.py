"""Decode pool: Ray CPU actors that read and decode video clips.

Input: video URIs, times and frame references. Output: frames, passed as Ray objects from the
decoder to the caller, never through the driver. An optional image-text model in its own actor
ranks frames by similarity to a question. This package must not import environments or models.
"""

from vz_ray.decode.frame_ranker import FrameRankerHandle
from vz_ray.decode.pool import DecodePool
from vz_ray.decode.stats import DecodeClientStats, DecodePoolStats

__all__ = ["DecodeClientStats", "DecodePool", "DecodePoolStats", "FrameRankerHandle"]
