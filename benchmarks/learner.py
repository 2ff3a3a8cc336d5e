r"""Learner benchmark: one GRPO step on a group of realistic shape, against unpacked and padded baselines.

    make bench-learner
    make bench-learner ARGS="--workload workloads.json --repeats 9"
    python -m benchmarks.learner --shape 7b --device cuda --dtype bfloat16 --side 252 --checkpointing \
        --only packed,frames,unshared --min-tokens 32768 --peak-tflops 989

    python -m benchmarks.learner --shape realistic --only packed,unshared,padded,trl --warm-up 0 --repeats 1

`--shape realistic` has one layer of width 1,024, frames of 128 visual tokens and a quarter of the frames of each clip.
With `--short` the 7B command takes about 90 s on an H100 (estimated): two contenders, one step each.

The group has 16 trajectories with 0 to 4 clips; the shared prompt and overview are 60 % of the tokens. A step
is the forward and backward pass of the group from prepared tensors, with a trained vision tower:

    packed    one packed sequence; the prefix and each distinct frame are computed once
    frames    one sequence per trajectory; each distinct frame is computed once
    unshared  one sequence per trajectory; frames are computed for each trajectory
    padded    one padded row per trajectory, as in the released VideoZoomer code; vz_ray's tower and head
    trl       TRL's GRPO trainer: its loss and fused head on the same tokens and pixels

Each contender runs with its fastest micro-batch size (tokens of a packed sequence, or padded rows). Optimizer,
decoding and old log-probs are excluded: they are equal for all. On CPUs the seconds are CPU time of one thread,
which other processes do not affect. The last line is one JSON object; a shared token counts once for each
trajectory. Then the losses of all contenders are compared; if they differ, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner_baselines import PaddedStep, TrlStep, first_update_inputs
from benchmarks.learner_batch import LearnerBatch, load_model, make_group, wrap_policy
from benchmarks.workload import Workload
from vz_ray.config.loss import LossConfig
from vz_ray.learner.batch import MicroBatch, collate
from vz_ray.learner.grpo_loss import grpo_loss
from vz_ray.learner.image_inputs import in_memory_pixels
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import plan_micro_batches
from vz_ray.learner.policy_model import PolicyModel, flop_costs

MODEL = Path("assets/tiny-base")
CONTENDERS = ("packed", "frames", "unshared", "padded", "trl")
BATCH_SIZES = {name: (2, 4, 16) if name in ("padded", "trl") else (4096, 8192, 32_768) for name in CONTENDERS}
"""Candidate micro-batch sizes: padded rows, or tokens of a packed sequence."""
REALISTIC_SIZES = {
    "packed": (32_768,),
    "frames": (8192,),
    "unshared": (8192,),
    "padded": (1, 2),
    "trl": (1, 2),
}
"""The same for wide layers: larger matrix products gain nothing there, and padding costs."""
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative. The KL term is exponential in the log-probs, whose absolute errors are its relative errors."""
LOSS = LossConfig(kl_coef=0.001, entropy_coef=0.0)


class PackedStep:
    """The learner's step, optionally sharing prefixes and frames."""

    def __init__(
        self,
        policy: PolicyModel,
        batch: LearnerBatch,
        spec: ImageSpec,
        max_tokens: int,
        device: torch.device,
        *,
        share_prefixes: bool,
        share_frames: bool,
    ) -> None:
        self._policy, self._group = policy, batch
        costs = flop_costs(policy.shape)
        steps = plan_micro_batches(batch.examples, max_tokens, 1, costs, share_prefixes=share_prefixes)[0]
        self.flops = 3 * sum(tree.flops for trees in steps for tree in trees)
        if not share_prefixes and share_frames:
            distinct = {ref.digest: ref for e in batch.examples for ref in e.refs}
            repeated = sum(len(e.refs) for e in batch.examples) - len(distinct)
            frame = next(iter(distinct.values()))
            self.flops -= 3 * costs.patch * repeated * (frame.width // 14) * (frame.height // 14)
        pixels, unlimited_spec = in_memory_pixels(batch.pixels), spec.without_size_limits()
        self._batches = [
            collate(
                trees,
                batch.examples,
                pixels,
                policy.tokens,
                unlimited_spec,
                device,
                share_frames=share_frames,
            )
            for trees in steps
        ]

    def step(self) -> float:
        """Run forward and backward of the whole group and return the loss."""
        self._policy.hf.model.language_model.config._attn_implementation = "packed"
        return sum(self._micro_step(batch) for batch in self._batches)

    def _micro_step(self, batch: MicroBatch) -> float:
        logprobs, entropy = self._policy(batch)
        device = logprobs.device
        pick = lambda values: torch.tensor([float(values[i]) for i in batch.indices], device=device)  # noqa: E731
        part = {
            "advantage": pick(self._group.advantage),
            "weight": pick(self._group.weight),
            "mask": batch.mask,
        }
        loss, _ = grpo_loss(logprobs, entropy, first_update_inputs(part, logprobs), LOSS)
        loss.backward()
        return float(loss.detach())


def make_contender(
    name: str,
    size: int,
    args: argparse.Namespace,
    batch: LearnerBatch,
    model: tuple[Any, Any, ImageSpec],
    out: Path,
) -> Any:
    """Create one of `CONTENDERS`; `size` is one of its `BATCH_SIZES`."""
    hf, tokens, spec = model
    device = torch.device(args.device)
    if name == "trl":
        return TrlStep(hf, MODEL, tokens, batch, spec, size, LOSS, out)
    policy = wrap_policy(hf, tokens, args.checkpointing)
    if name == "padded":
        return PaddedStep(policy, batch, spec, size, LOSS, device)
    prefixes, frames = {"packed": (True, True), "frames": (False, True), "unshared": (False, False)}[name]
    return PackedStep(policy, batch, spec, size, device, share_prefixes=prefixes, share_frames=frames)


def time_step(step: Callable[[], float], device: str) -> tuple[float, float]:
    """Return seconds (CPU time on CPUs) and the loss."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started, loss


def measure(name: str, size: int, args: argparse.Namespace, repeats: int, out: Path) -> dict[str, Any]:
    """Measure times and peak memory of one contender in this process."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = load_model(args.shape, MODEL, dtype, device)
    vocab = model[0].config.get_text_config().vocab_size
    workload = Workload.load(args.workload).with_shorter_clips(args.clip_divisor)
    batch = make_group(workload, model[1], vocab, args.side, width=args.width)
    contender = make_contender(name, size, args, batch, model, out)
    loss = time_step(contender.step, args.device)[1] if args.warm_up else 0.0
    seconds = []
    for _ in range(repeats):
        model[0].zero_grad()
        step_s, loss = time_step(contender.step, args.device)
        seconds.append(step_s)
    memory = (
        torch.cuda.max_memory_allocated() / 1e6
        if args.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    )
    return {
        "seconds": seconds,
        "loss": loss,
        "peak_mb": round(memory),
        "tokens": batch.tokens,
        "prefix": batch.prefix,
        "flops": getattr(contender, "flops", 0.0),
    }


def measure_in_subprocess(name: str, size: int, args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Run `measure` in a subprocess, so that peak memory belongs to one contender."""
    command = [sys.executable, "-m", "benchmarks.learner", "--measure", f"{name}:{size}:{repeats}"]
    for key in ("workload", "shape", "device", "dtype", "side", "width", "clip_divisor", "threads", "warm_up"):
        command += [f"--{key.replace('_', '-')}", str(value)] if (value := getattr(args, key)) is not None else []
    process = subprocess.run(
        command + ["--checkpointing"] * args.checkpointing, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"{name} with micro-batch size {size} failed:\n{process.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    print(
        f"{name:9} {size:6}  {statistics.median(result['seconds']):8.3f} s  {result['peak_mb']} MB  "
        f"loss {result['loss']:.6f}",
        flush=True,
    )
    return result


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders in turns, so that load on the machine affects each of them."""
    names = args.only.split(",")
    size_seconds = {name: time_sizes(name, args) for name in names}
    best = {name: min(seconds, key=lambda size: seconds[size]) for name, seconds in size_seconds.items()}
    laps = [
        {name: measure_in_subprocess(name, best[name], args, args.repeats) for name in names} for _ in range(args.laps)
    ]
    return summarize(args, laps) | {
        "losses": {name: laps[0][name]["loss"] for name in names},
        "micro_batch_sizes": best,
        "seconds_by_size": size_seconds,
    }


def time_sizes(name: str, args: argparse.Namespace) -> dict[int, float]:
    """Return the seconds of each candidate micro-batch size; a single candidate is not measured."""
    candidates = REALISTIC_SIZES if args.shape == "realistic" else BATCH_SIZES
    sizes = [size for size in candidates[name] if name in ("padded", "trl") or size >= args.min_tokens]
    if args.short or len(sizes) == 1:
        return {sizes[-1]: 0.0}
    repeats = 2 if args.warm_up else 1
    return {size: statistics.median(measure_in_subprocess(name, size, args, repeats)["seconds"]) for size in sizes}


def check_losses(losses: dict[str, float], tolerance: float) -> None:
    """Exit with an error if the losses differ by more than the relative tolerance, or are not finite."""
    lowest, highest = min(losses.values()), max(losses.values())
    if not highest - lowest <= tolerance * abs(losses["packed"]):
        raise SystemExit(f"losses differ between contenders by more than {tolerance:g}: {losses}")


def summarize(args: argparse.Namespace, laps: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return medians over laps and the medians of ratios within each lap."""
    median = lambda values: statistics.median(list(values))  # noqa: E731
    lap_seconds = [{name: median(result["seconds"]) for name, result in lap.items()} for lap in laps]
    first = laps[0]["packed"]
    seconds = {name: median(lap[name] for lap in lap_seconds) for name in lap_seconds[0]}
    ratios = {name: round(median(lap[name] / lap["packed"] for lap in lap_seconds), 2) for name in seconds}
    summary: dict[str, Any] = {
        "tokens_per_second": round(first["tokens"] / seconds["packed"]),
        **{f"ratio_vs_{name}": value for name, value in ratios.items() if name != "packed"},
        "peak_rss_mb": first["peak_mb"],
        "peak_rss_mb_by_name": {name: result["peak_mb"] for name, result in laps[0].items()},
    }
    if {"frames", "unshared"} <= seconds.keys():
        vision = median((lap["unshared"] - lap["frames"]) / (lap["unshared"] - lap["packed"]) for lap in lap_seconds)
        summary |= {
            "flops_saved_fraction": round(1 - first["flops"] / laps[0]["unshared"]["flops"], 3),
            "vision_gain_fraction": round(vision, 2),
            "text_gain_fraction": round(1 - vision, 2),
        }
    if args.peak_tflops:
        summary["mfu"] = round(first["flops"] / seconds["packed"] / args.peak_tflops / 1e12, 3)
    return summary | {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "tokens": first["tokens"],
        "prefix_fraction": round(16 * first["prefix"] / first["tokens"], 3),
        "shape": args.shape,
        "device": args.device,
        "repeats": args.repeats * args.laps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of episodes")
    parser.add_argument("--shape", choices=["tiny", "realistic", "3b", "7b"], default="tiny", help="size of the model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--side", type=int, help="height of a frame in pixels, a multiple of 28; default 28")
    parser.add_argument("--width", type=int, help="width of a frame; default: its height")
    parser.add_argument("--clip-divisor", type=int, help="divides the frames of each clip")
    parser.add_argument("--min-tokens", type=int, default=0, help="minimum size of packed sequences")
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders; must include `packed`")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each contender per lap")
    parser.add_argument("--warm-up", type=int, default=1, choices=[0, 1], help="steps before the measured ones")
    parser.add_argument("--laps", type=int, default=3, help="rounds over all contenders")
    parser.add_argument("--short", action="store_true", help="packed and unshared with their largest size, one step")
    parser.add_argument("--tolerance", type=float, help="relative tolerance of the losses; default: by dtype")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="peak of the GPU, for the MFU")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    defaults = (224, 448, 4) if args.shape == "realistic" else (28, 0, 1)
    args.side, args.width, args.clip_divisor = (
        default if value is None else value
        for value, default in zip((args.side, args.width, args.clip_divisor), defaults, strict=True)
    )
    if args.measure:
        name, size, repeats = args.measure.split(":")
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(measure(name, int(size), args, int(repeats), Path(out))))
        return
    if args.short:
        args.only, args.repeats, args.laps = "packed,unshared", 1, 1
    summary = compare(args)
    print(json.dumps(summary), flush=True)
    check_losses(summary["losses"], args.tolerance or LOSS_TOLERANCE[args.dtype])


if __name__ == "__main__":
    main()
