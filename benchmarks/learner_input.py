"""Benchmark of the learner's host work: one update with and without building micro-batches ahead.

    python -m benchmarks.learner_input
    python -m benchmarks.learner_input --shape 7b --device cuda --dtype bfloat16 --side 252 --max-tokens 32768

Each micro-batch decodes its frames from a video, is packed on the host, and is computed forward and backward.
On CPUs the computation has one thread by default, so that two cores suffice. The runs alternate, so that load on
the machine affects both. The last line is one JSON object; `host` is the time of loading and packing, `device`
that of the computation, `hidden` the share of the host time for which the computation did not wait.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner_batch import LearnerBatch, load_model, make_group, wrap_policy
from benchmarks.synthetic_video import make_video
from benchmarks.workload import Workload
from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.distributed import RankInfo
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.micro_batches import InputTimes, MicroBatchLoader
from vz_ray.learner.policy_model import PolicyModel, flop_costs
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.frame import RGB, FrameRef, FrameSize, OverviewRequest

MODEL = Path("assets/tiny-base")


class DecodedFrames:
    """Pixel loader that decodes the frames of a group from a video, without a cache.

    Args:
        folder: Directory of the video, which is encoded once.
        digests: Digests of the group's frames; each is assigned a frame of the video.
        side: Side of a frame in pixels.
    """

    def __init__(self, folder: Path, digests: Sequence[str], side: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        video = make_video(folder, 320, 180, 1)
        self._reader = ClipReader(cache_bytes=0)
        request = OverviewRequest(fps=math.inf, max_frames=len(digests))
        refs = self._reader.clip(str(video), request, FrameSize(side**2, side**2, 28)).refs
        self._refs = dict(zip(digests, refs, strict=True))

    def __call__(self, refs: Sequence[FrameRef]) -> Mapping[str, RGB]:
        frames = self._reader.resolve([self._refs[ref.digest] for ref in refs])
        return {ref.digest: frame.rgb for ref, frame in zip(refs, frames, strict=True)}


def run_update(
    policy: PolicyModel,
    group: LearnerBatch,
    frames: DecodedFrames,
    spec: ImageSpec,
    args: argparse.Namespace,
    ahead: int,
) -> dict[str, float]:
    """Compute the gradient of one group; return its times."""
    config = LearnerConfig(micro_batch_tokens=args.max_tokens, prefetch_batches=ahead)
    rank_info = RankInfo(0, 1, torch.device(args.device, 0 if args.device == "cuda" else None))
    loader = MicroBatchLoader(config, rank_info, policy.tokens, spec, flop_costs(policy.shape))
    plan = loader.plan(group.examples)
    policy.zero_grad()
    loader.times, started = InputTimes(), time.perf_counter()
    with loader.load(group.examples, plan, frames, None) as batches:
        for batch in batches:
            logprobs, _ = policy(batch)
            (-logprobs.sum()).backward()
    if args.device == "cuda":
        torch.cuda.synchronize()
    wall = time.perf_counter() - started
    times = loader.times
    return {"wall": wall, "host": times.build_seconds, "wait": times.wait_seconds, "micro_batches": float(len(plan))}


def summarize(laps: Sequence[Mapping[int, Mapping[str, float]]], ahead: int) -> dict[str, Any]:
    """Return medians over laps; the runs of a lap are keyed by how far they build ahead."""

    def median(runs_ahead: int, name: str) -> float:
        return statistics.median(lap[runs_ahead][name] for lap in laps)

    host = median(0, "host")
    return {
        "host_seconds": round(host, 3),
        "device_seconds": round(statistics.median(lap[0]["wall"] - lap[0]["wait"] for lap in laps), 3),
        "wall_seconds": round(median(0, "wall"), 3),
        "wall_seconds_ahead": round(median(ahead, "wall"), 3),
        "wait_seconds_ahead": round(median(ahead, "wait"), 3),
        "hidden_fraction": round(1 - median(ahead, "wait") / median(ahead, "host"), 2),
        "speedup": round(statistics.median(lap[0]["wall"] / lap[ahead]["wall"] for lap in laps), 3),
        "micro_batches": int(laps[0][0]["micro_batches"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of episodes")
    parser.add_argument("--shape", choices=["tiny", "3b", "7b"], default="tiny", help="size of the model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--side", type=int, default=28, help="side of a frame in pixels; a multiple of 28")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the computation")
    parser.add_argument("--ahead", type=int, default=1, help="micro-batches that are built ahead")
    parser.add_argument("--laps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hf, tokens, spec = load_model(args.shape, MODEL, getattr(torch, args.dtype), torch.device(args.device))
    policy = wrap_policy(hf, tokens, args.device == "cuda")
    vocab = hf.config.get_text_config().vocab_size
    group = make_group(Workload.load(args.workload), tokens, vocab, args.side)
    frames = DecodedFrames(Path(tempfile.gettempdir()) / "vz_ray-bench", list(group.pixels), args.side)
    laps = []
    for lap in range(args.laps + 1):
        runs = {}
        for ahead in (0, args.ahead):
            runs[ahead] = run_update(policy, group, frames, spec.without_size_limits(), args, ahead)
            print(f"{ahead} ahead  ", *(f"{name} {value:.2f}" for name, value in runs[ahead].items()), flush=True)
        if lap:  # the first one warms up
            laps.append(runs)
    pixel_bytes = sum(rgb.nbytes for rgb in group.pixels.values())
    print(json.dumps(summarize(laps, args.ahead) | {"frames": len(group.pixels), "frame_bytes": pixel_bytes}))


if __name__ == "__main__":
    main()
