"""The clip pool: decode processes that everyone shares.

In: paths, times and frame references, from rollout workers, the learner and
scripts. Out: frames, as Ray objects straight from the process that decoded
them to the one that asked, never through the driver. It must not know what
the frames are for: neither episodes nor the models that play them. An
image-text model, in a process of its own, finds frames that are like a text.
"""

from vz_ray.decode.frame_ranker import FrameRankerHandle
from vz_ray.decode.pool import DecodeClientStats, DecodePool, DecodePoolStats

__all__ = ["DecodePool", "DecodeClientStats", "DecodePoolStats", "FrameRankerHandle"]
