"""What an RL iteration is reported by."""

from __future__ import annotations

import torch
from torch import Tensor

from vz_ray.learner.batch import MicroBatch
from vz_ray.learner.distributed import RankInfo, all_reduce_max, all_reduce_sum
from vz_ray.learner.grpo_loss import engine_mismatch

Metrics = dict[str, float]

_PARTS = ("", "_after_image", "_after_text", "_stale")
"""Tokens of the present weights, and of these in turns that answer to frames, to text; of older weights."""


class GrpoMetrics:
    """Sums over micro-batches and updates of one iteration, made into metrics at its end.

    Args:
        version: Of the weights that the iteration began with; tokens sampled from others are compared with
            the engine apart. None takes all for current.
    """

    def __init__(self, weight_version: int | None) -> None:
        self._version = weight_version
        self._sums: dict[str, float] = {}
        self._ratio_max = 0.0
        self._mismatch_max = dict.fromkeys((f"mismatch_abs_max{part}" for part in _PARTS), 0.0)
        self._updates: list[Metrics] = []

    def add(self, sums: Metrics, change: Tensor, own: Tensor, batch: MicroBatch) -> None:
        """`change` is new - old, `own` the learner's log-probs to compare with the engine's; `[B, S]`."""
        gaps, worst = engine_mismatch(own, batch.engine_logprobs, self._parts(batch))
        for name, value in (sums | gaps).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._mismatch_max = {name: max(value, worst[name]) for name, value in self._mismatch_max.items()}
        self._ratio_max = max(self._ratio_max, float((change * batch.mask).abs().max().exp()))

    def _parts(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Masks `[B, S]` of the tokens that are compared with the engine apart from others."""
        stale = torch.zeros_like(batch.mask)
        if self._version is not None:
            stale = batch.mask * (batch.weight_versions != self._version)
        fresh = batch.mask - stale
        masks = (fresh, fresh * batch.after_image, fresh * ~batch.after_image, stale)
        return dict(zip(_PARTS, masks, strict=True))

    def add_update(self, metrics: Metrics) -> None:
        """An update is over; `compute` are the engine's."""
        self._updates.append(metrics)

    def compute(self, place: RankInfo) -> Metrics:
        """Of all ranks; every rank must call."""
        sums = all_reduce_sum(self._sums, place)
        sampled, updates = sums.pop("sampled"), len(self._updates)
        done = [update for update in self._updates if not update["skipped"]]
        mean = {name: sums.pop(name) / updates for name in ("loss", "policy_loss")}
        for part in _PARTS:
            found, compared = sums.pop(f"mismatch_kl{part}"), sums.pop(f"compared{part}")
            worst = all_reduce_max(self._mismatch_max[f"mismatch_abs_max{part}"], place)
            if compared or not part:
                mean[f"mismatch_kl{part}"] = found / max(compared, 1.0)
                mean[f"mismatch_abs_max{part}"] = worst
        mean |= {name: value / sampled for name, value in sums.items()}
        return mean | {
            "ratio_max": all_reduce_max(self._ratio_max, place),
            "updates": float(len(done)),
            "skipped": float(updates - len(done)),
            "grad_norm": sum(u["grad_norm"] for u in done) / len(done) if done else float("inf"),
            "learning_rate": self._updates[-1]["learning_rate"],
        }
