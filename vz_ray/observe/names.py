"""Names of metrics that are written in one room and read in another.

One line of `metrics.jsonl` is a flat object: `step`, `time` (seconds since the
epoch) and numbers under names like these. Rates are fractions, times seconds.
"""

from __future__ import annotations

STEP = "step"

REWARD_TOTAL = "reward/total"
REWARD_ACCURACY = "reward/accuracy"
REWARD_FORMAT = "reward/format"
REWARD_TOOL = "reward/tool"

ZOOM_CALL_RATE = "zoom/call_rate"
"""Episodes that tried at least one zoom."""
ZOOM_VALID_RATE = "zoom/valid_rate"
"""Zooms carried out, of zooms tried."""
ZOOMS_MEAN = "zoom/mean"
"""Zooms carried out per episode."""
EVENT_COVERAGE = "zoom/event_coverage"
"""Episodes in which a zoom showed a frame of an event, of those with known events."""
FRAMES_MEAN = "frames/mean"
ANSWERED = "episodes/answered"
UNPARSED = "episodes/unparsed"
INVALID = "episodes/invalid"

MISMATCH_MAX = "mismatch/logprob_abs_max"
"""Largest |learner - engine| log-prob of a sampled token in the step, nats."""
MISMATCH_KL = "mismatch/kl"
"""KL(engine || learner) per token, on tokens of the weights that the learner holds, nats."""
MISMATCH_KL_IMAGE = "mismatch/kl_after_image"
"""As `MISMATCH_KL`, in turns that answer to frames."""
MISMATCH_KL_TEXT = "mismatch/kl_after_text"
"""As `MISMATCH_KL`, in turns that answer to text alone, such as a refused zoom."""
MISMATCH_PARTS = {MISMATCH_KL: "", MISMATCH_KL_IMAGE: " after images", MISMATCH_KL_TEXT: " after text"}
"""Where each of them is looked at, in words."""

STALENESS_PREFIX = "staleness/share_"
"""Followed by a number of updates: the share of sampled tokens that were as many behind."""
STALENESS_MEAN = "staleness/mean"
STALENESS_MAX = "staleness/max"
PREFIX_CACHE_HIT = "fleet/prefix_cache_hit"
"""Prompt tokens that engines had computed before, of all."""
FRAME_CACHE_HIT = "fleet/frame_cache_hit"
"""Frames that engines had been sent before, of all."""
TOKENS_PER_S = "fleet/tokens_per_s"
"""Sampled tokens a second, learning and publishing included."""
PREEMPTED = "fleet/preempted"
"""Turns that had to give their place in a key/value cache back."""
KV_USED = "fleet/kv_used"
"""Share of the fullest key/value cache that turns need at the end of the step."""
WORKER_MB = "memory/worker_mb"
"""Resident memory of the largest rollout worker's own process."""
ENGINE_MB = "memory/engine_mb"
"""Resident memory of the largest engine's processes."""
DRIVER_MB = "memory/driver_mb"
WORKERS = "fleet/workers"
"""Rollout workers that serve at the end of the step."""
WEIGHT_VERSION = "weights/version"
SYNC_S = "weights/sync_s"
"""Seconds from pausing to resuming generation at a publish."""

LOSS = "learner/loss"
ENTROPY = "learner/entropy"
KL_TO_REFERENCE = "learner/kl"
GRAD_NORM = "learner/grad_norm"

TIME_PREFIX = "time/"
"""Parts of a step: `time/rollout_s`, `time/learn_s`, `time/publish_s`, ..."""
