"""Names of metrics that are written in one room and read in another.

One line of `metrics.jsonl` is a flat object: `step`, `time` (seconds since the
epoch) and numbers under names like these. Rates are fractions, times seconds.
"""

from __future__ import annotations

STEP = "step"

REWARD_PREFIX = "reward/"
"""Followed by the name of a part; those below are in every run, others are a run's own."""
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
INVALID_PREFIX = "episodes/invalid/"
"""Followed by a reason, such as `judge_timeout`: the share of episodes that nobody could judge for it."""

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
