r"""One GRPO step of the learner on a group shaped like the paper's, against what users would pick instead.

    make bench-learner
    make bench-learner ARGS="--workload workloads.json --repeats 9"
    python -m benchmarks.learner --shape 7b --device cuda --dtype bfloat16 --side 252 --checkpointing \
        --only ours,frames,unshared --least 32768 --peak-tflops 989

A group of 16 trajectories with 0 to 4 clips; the prompt and overview that they share are 60 % of the tokens.
Measured is forward and backward of the group, from tensors that are ready, tower trained:

    ours      one packed sequence, the prefix computed once, each distinct frame seen once
    frames    the same, each trajectory a sequence of its own: frames are still seen once
    unshared  the same, and each trajectory sees its own frames
    padded    one padded row per trajectory, as the released VideoZoomer code has them; our tower and head
    trl       TRL's GRPO trainer: its loss on the same tokens and pixels, its fused head

Each takes as much at a time as suits it best: tokens of a packed sequence, or padded rows. All give the same
loss, which is checked. Optimizer, decoding and old log-probs are left out: they are the same for all. On CPUs
the seconds are CPU time of one thread, which does not depend on who else uses the machine. The last line is
one JSON object; a token counts once for each trajectory that it is in, whether computed or not.
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
from vz_ray.config.learner import LossConfig
from vz_ray.learner.batch import MicroBatch, collate, in_memory_pixels
from vz_ray.learner.grpo_loss import grpo_loss
from vz_ray.learner.image_patches import ImageSpec
from vz_ray.learner.packing import plan_micro_batches
from vz_ray.learner.policy_model import PolicyModel, flop_costs

MODEL = Path("assets/tiny-base")
CONTENDERS = ("ours", "frames", "unshared", "padded", "trl")
BATCH_SIZES = {name: (2, 4, 16) if name in ("padded", "trl") else (4096, 8192, 32_768) for name in CONTENDERS}
"""What each contender tries: rows that are padded together, or tokens that are packed together."""
LOSS = LossConfig(kl_coef=0.001, entropy_coef=0.0)


class PackedStep:
    """The learner's own step, sharing what it is told to share."""

    def __init__(
        self, policy: PolicyModel, batch: LearnerBatch, spec: ImageSpec, budget: int, device: torch.device, *,
        prefixes: bool, frames: bool,
    ) -> None:  # fmt: skip
        self._policy, self._group = policy, batch
        costs = flop_costs(policy.hf)
        steps = plan_micro_batches(batch.examples, budget, 1, costs, share_prefixes=prefixes)[0]
        self.flops = 3 * sum(tree.flops for trees in steps for tree in trees)
        if not prefixes and frames:
            seen = {ref.digest: ref for e in batch.examples for ref in e.refs}
            again = sum(len(e.refs) for e in batch.examples) - len(seen)
            self.flops -= 3 * costs.patch * again * (next(iter(seen.values())).width // 14) ** 2
        fetch, unbounded = in_memory_pixels(batch.pixels), spec.without_size_limits()
        self._batches = [
            collate(trees, batch.examples, fetch, policy.tokens, unbounded, device, share_frames=frames)
            for trees in steps
        ]

    def step(self) -> float:
        """Forward and backward of the whole group; returns the loss."""
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
    given: argparse.Namespace,
    batch: LearnerBatch,
    model: tuple[Any, Any, ImageSpec],
    out: Path,
) -> Any:
    """One of `CONTENDERS`, around the model; see `BATCH_SIZES` for `size`."""
    hf, tokens, spec = model
    device = torch.device(given.device)
    if name == "trl":
        return TrlStep(hf, MODEL, tokens, batch, spec, size, LOSS, out)
    policy = wrap_policy(hf, tokens, given.checkpointing)
    if name == "padded":
        return PaddedStep(policy, batch, spec, size, LOSS, device)
    shared = {"ours": (True, True), "frames": (False, True), "unshared": (False, False)}[name]
    return PackedStep(policy, batch, spec, size, device, prefixes=shared[0], frames=shared[1])


def time_step(step: Callable[[], float], device: str) -> tuple[float, float]:
    """Seconds (of the CPU, where it is one), and the loss."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started, loss


def measure(name: str, size: int, given: argparse.Namespace, repeats: int, out: Path) -> dict[str, Any]:
    """Times of one contender in this process, and the most memory that it took."""
    torch.set_num_threads(given.threads)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    model = load_model(given.shape, MODEL, dtype, device)
    vocab = model[0].config.get_text_config().vocab_size
    batch = make_group(Workload.load(given.workload), model[1], vocab, given.side)
    one = make_contender(name, size, given, batch, model, out)
    _, loss = time_step(one.step, given.device)
    taken = []
    for _ in range(repeats):
        model[0].zero_grad()
        taken.append(time_step(one.step, given.device)[0])
    memory = (
        torch.cuda.max_memory_allocated() / 1e6
        if given.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    )
    return {
        "seconds": taken,
        "loss": loss,
        "peak_mb": round(memory),
        "tokens": batch.tokens,
        "prefix": batch.prefix,
        "flops": getattr(one, "total", 0.0),
    }


def measure_in_subprocess(name: str, size: int, given: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """The same in a process of its own, so that memory is its own too."""
    command = [sys.executable, "-m", "benchmarks.learner", "--measure", f"{name}:{size}:{repeats}"]
    for key in ("workload", "shape", "device", "dtype", "side", "threads"):
        command += [f"--{key}", str(getattr(given, key))] if getattr(given, key) is not None else []
    done = subprocess.run(
        command + ["--checkpointing"] * given.checkpointing, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} with {size} at a time failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name:9} {size:6}  {statistics.median(found['seconds']):8.3f} s  {found['peak_mb']} MB  "
        f"loss {found['loss']:.6f}",
        flush=True,
    )
    return found


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turns, so that a noisy minute hits each of them."""
    names = given.only.split(",")
    tried: dict[str, dict[int, float]] = {}
    for name in names:
        sizes = [size for size in BATCH_SIZES[name] if name in ("padded", "trl") or size >= given.least]
        tried[name] = {
            size: statistics.median(measure_in_subprocess(name, size, given, 2)["seconds"]) for size in sizes
        }
    best = {name: min(tried[name], key=lambda size: tried[name][size]) for name in names}
    laps = [
        {name: measure_in_subprocess(name, best[name], given, given.repeats) for name in names}
        for _ in range(given.laps)
    ]
    losses = {name: laps[0][name]["loss"] for name in names}
    if max(losses.values()) - min(losses.values()) > given.tolerance * abs(losses[names[0]]):
        raise SystemExit(f"the contenders do not compute the same loss: {losses}")
    return summarize(given, laps) | {"at_a_time": best, "tried_s": tried}


def summarize(given: argparse.Namespace, laps: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over laps, ratios within each lap."""
    median = lambda values: statistics.median(list(values))  # noqa: E731
    seconds = [{name: median(found["seconds"]) for name, found in lap.items()} for lap in laps]
    first = laps[0]["ours"]
    taken = {name: median(lap[name] for lap in seconds) for name in seconds[0]}
    ratio = {name: round(median(lap[name] / lap["ours"] for lap in seconds), 2) for name in taken}
    shown: dict[str, Any] = {
        "tokens_per_s": round(first["tokens"] / taken["ours"]),
        **{f"ratio_vs_{name}": value for name, value in ratio.items() if name != "ours"},
        "peak_rss_mb": first["peak_mb"],
        "peak_rss_mb_by_name": {name: found["peak_mb"] for name, found in laps[0].items()},
    }
    if {"frames", "unshared"} <= taken.keys():
        gain = [lap["unshared"] - lap["ours"] for lap in seconds]
        vision = median((lap["unshared"] - lap["frames"]) / g for lap, g in zip(seconds, gain, strict=True))
        shown |= {
            "flops_saved_share": round(1 - first["flops"] / laps[0]["unshared"]["flops"], 3),
            "gain_share_vision": round(vision, 2),
            "gain_share_text": round(1 - vision, 2),
        }
    if given.peak_tflops:
        shown["model_flops_utilisation"] = round(first["flops"] / taken["ours"] / given.peak_tflops / 1e12, 3)
    return shown | {
        "seconds": {name: round(value, 3) for name, value in taken.items()},
        "tokens": first["tokens"],
        "prefix_share": round(16 * first["prefix"] / first["tokens"], 3),
        "shape": given.shape,
        "device": given.device,
        "repeats": given.repeats * given.laps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of episodes")
    parser.add_argument("--shape", choices=["tiny", "3b", "7b"], default="tiny", help="of the model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--side", type=int, default=28, help="of a frame, pixels; a multiple of 28")
    parser.add_argument("--least", type=int, default=0, help="try no smaller packed sequences than this")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders; `ours` must be among them")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each contender in a lap")
    parser.add_argument("--laps", type=int, default=3, help="times that all contenders are started in turn")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative, of the losses")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the GPU, for its utilisation")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        name, size, repeats = given.measure.split(":")
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(measure(name, int(size), given, int(repeats), Path(out))))
        return
    print(json.dumps(compare(given)))


if __name__ == "__main__":
    main()
