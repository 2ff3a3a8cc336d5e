"""Check and time the GPU code paths without Ray, in one process: attention, GRPO steps, engine, publishes.

    python -m benchmarks.gpu_smoke_check assets/tiny-base --out runs/gpu-smoke-check
    python -m benchmarks.gpu_smoke_check assets/tiny-base --shape 7b --graphs --requests 64 --frames 64 \
        --max-model-len 16384 --kv-cache-gib 40 --out runs/gpu-smoke-check

Needs the checkout, torch, transformers, DeepSpeed and vLLM, but neither Ray nor av. Without a GPU the same code runs
on the CPU. Every stage runs even if another fails. The last line is one JSON object, also written to
`OUT/gpu-smoke-check.json` after each stage; engine logs are beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.direct_transports import IpcTransport
from benchmarks.random_checkpoint import SIZES, write_random_checkpoint
from vz_ray.config.learner import LearnerConfig, LoraConfig, OptimizerConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SamplingParams
from vz_ray.learner.trainer import Trainer
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.video.frame import Frame, FrameRef
from vz_ray.weight_sync import (
    ParityCheck,
    ShmTransport,
    WeightPublisher,
    WeightStore,
    build_parity_probe,
)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CALL_TIMEOUT_S = 300.0


class StageRunner:
    """Runs stages and collects their figures."""

    def __init__(self, out: Path) -> None:
        self.out, self.started_at = out, time.monotonic()
        self.figures: dict[str, Any] = {"torch": torch.__version__, "device": _device_name()}
        out.mkdir(parents=True, exist_ok=True)

    def log(self, message: str) -> None:
        print(f"[{time.monotonic() - self.started_at:6.1f} s] {message}", flush=True)

    def run(self, name: str, stage: Callable[[], dict[str, Any]]) -> None:
        """Run one stage; record its figures, its seconds and its error."""
        started_at = time.monotonic()
        try:
            figures = stage()
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.figures[name] = figures | {"seconds": round(time.monotonic() - started_at, 2)}
        self.log(f"{name}: {self.figures[name]}")
        (self.out / "gpu-smoke-check.json").write_text(json.dumps(self.figures, indent=2) + "\n")


def check_attention() -> dict[str, Any]:
    """Compare the GPU kernel with the portable form: relative differences of the output and of the gradients."""
    from vz_ray.learner import attention

    layout = attention.PackedLayout.from_segments(
        [
            attention.Segment(0, 700),
            attention.Segment(700, 900, (0, 700)),
            attention.Segment(900, 1300, (0, 700)),
        ],
        DEVICE,
    )
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    query, key, value = (
        torch.randn(1, heads, 1300, 128, generator=generator).to(DEVICE, dtype).requires_grad_() for heads in (28, 4, 4)
    )
    weight = torch.randn(1, 1300, 28, 128, generator=generator).to(DEVICE, dtype)
    results = []
    for function in (attention._varlen if ON_GPU else attention._portable, attention._portable):
        output = function(query, key, value, 128**-0.5, layout)
        results.append((output, *torch.autograd.grad((output * weight).sum(), (query, key, value))))
    names = ("output", "query_grad", "key_grad", "value_grad")
    pairs = zip(names, *results, strict=True)
    return {name: float((a - b).float().norm() / b.float().norm()) for name, a, b in pairs}


def create_trainer(model: Path, args: argparse.Namespace) -> Trainer:
    """Return a trainer; large shapes train adapters only, since optimizer states of all weights do not fit one GPU."""
    lora = LoraConfig(rank=16) if args.shape else LoraConfig()
    optimizer = OptimizerConfig(learning_rate=1e-4)
    return Trainer(
        LearnerConfig(model=str(model), zero_stage=args.zero_stage, dtype=args.dtype, optimizer=optimizer, lora=lora)
    )


def run_grpo_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Run two GRPO steps of a small model with DeepSpeed."""
    from tests.learner.training_data import make_training_data, small_model

    data = make_training_data(small_model(Path(tempfile.mkdtemp()) / "model"))
    trainer = create_trainer(data.model, args)
    steps = [trainer.grpo_step(data.groups, data.pixels) for _ in range(2)]
    keys = ("loss", "grad_norm", "skipped", "tokens_per_s")
    return {f"step_{i}": {key: step[key] for key in keys if key in step} for i, step in enumerate(steps)}


async def check_engine(model: Path, trainer: Trainer, args: argparse.Namespace, runner: StageRunner) -> dict[str, Any]:
    """Start an engine, time turns with frames, publish changed weights by each transport, and check the parity."""
    from transformers import AutoImageProcessor, AutoTokenizer

    transports = ("ipc", "shm")
    config = EngineConfig(
        dtype=args.dtype,
        kv_cache_gib=args.kv_cache_gib,
        max_model_len=args.max_model_len,
        max_num_seqs=args.requests,
        images_per_prompt=args.frames,
        enforce_eager=not args.graphs,
    )
    started_at = time.monotonic()
    log_file = runner.out / "engine.log"
    engine = await VllmEngine.start(
        model, config, name="engine", log_file=log_file, transport=transports[0], turn_timeout_s=CALL_TIMEOUT_S
    )
    figures: dict[str, Any] = {"start_seconds": round(time.monotonic() - started_at, 2)}
    runner.log(f"engine is up: {figures}")
    store = WeightStore(Path(tempfile.mkdtemp(dir="/dev/shm")))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        probe = build_parity_probe(tokenizer, AutoImageProcessor.from_pretrained(model))
        parity = ParityCheck(probe, dtype=args.dtype)
        publisher = WeightPublisher(timeout_s=CALL_TIMEOUT_S, parity=parity, probe_every=1)
        figures |= await _time_turns(engine, tokenizer, args)
        runner.log(f"turns: {figures}")
        for version, name in enumerate((transports[0], *transports), 1):
            if version > 1:  # version 1 has the checkpoint's weights: its gap is rounding alone
                _scale_weights(trainer)
            transport = (
                IpcTransport(trainer.weight_source(), trainer.score_probe)
                if name == "ipc"
                else ShmTransport(store, trainer.weight_source(), trainer.score_probe)
            )
            running = [asyncio.create_task(_run_turn(engine, tokenizer, 8, seed, 64)) for seed in range(4)]
            report = await publisher.publish(version, transport, [engine])
            await asyncio.gather(*running)
            gap = report.probe_gap
            assert gap is not None
            figures[f"publish_{version}_{name}"] = {
                "gigabytes": report.nbytes / 1e9,
                "prepare_seconds": report.prepare_s,
                "sync_seconds": report.sync_s,
                "gap": gap.mean,
                "kl": gap.kl,
                "tolerance": report.probe_tolerance,
            }
            runner.log(f"publish by {name}: {figures[f'publish_{version}_{name}']}")
    finally:
        store.clear()
        await engine.shutdown()
    return figures


async def _time_turns(engine: VllmEngine, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Run all requests at once, twice: the second time their frames and prompts are cached."""
    figures: dict[str, Any] = {}
    for name in ("new_frames", "cached_frames"):
        started_at = time.monotonic()
        turns = [_run_turn(engine, tokenizer, args.frames, seed, args.max_tokens) for seed in range(args.requests)]
        results = await asyncio.gather(*turns)
        seconds = time.monotonic() - started_at
        figures[name] = {
            "seconds": round(seconds, 2),
            "sampled_tokens_per_second": round(sum(tokens for tokens, _ in results) / seconds, 1),
            "median_turn_seconds": round(statistics.median(duration for _, duration in results), 2),
        }
    return figures


async def _run_turn(
    engine: VllmEngine, tokenizer: Any, num_frames: int, seed: int, max_tokens: int
) -> tuple[int, float]:
    """Sample one turn after `num_frames` random frames; return the number of tokens and the seconds."""
    rng = np.random.default_rng(seed)
    start, pad, end = (tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("vision_start", "image_pad", "vision_end"))
    side, ids, frames = 252 if ON_GPU else 56, [], []
    for number in range(num_frames):
        rgb = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        frames.append(Frame(FrameRef("random", "", 0, float(number), side, side, "", "", f"{seed}-{number}"), rgb))
        ids += [*(int(i) for i in rng.integers(20, 300, 12)), start, pad, end]
    started_at = time.monotonic()
    sampling = SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=seed)
    action = await engine.generate(Prompt(tuple(ids), tuple(frames), ()), sampling, request_id=f"{seed}-{num_frames}")
    return len(action.token_ids), time.monotonic() - started_at


@torch.no_grad()
def _scale_weights(trainer: Trainer) -> None:
    for parameter in trainer.policy.hf.parameters():
        parameter.mul_(1.02)


def _device_name() -> str:
    return torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="checkpoint, for example assets/tiny-base")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-smoke-check"), help="directory of figures and logs")
    parser.add_argument("--shape", choices=sorted(SIZES), help="use random weights of this shape")
    parser.add_argument("--graphs", action="store_true", help="use CUDA graphs in the engine")
    parser.add_argument("--requests", type=int, default=4, help="concurrent turns")
    parser.add_argument("--frames", type=int, default=8, help="frames of each turn")
    parser.add_argument("--max-tokens", type=int, default=64, help="maximum sampled tokens of a turn")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--zero-stage", type=int, help="default: 2 in bfloat16, 0 in float32")
    args = parser.parse_args()
    if args.zero_stage is None:
        args.zero_stage = 2 if args.dtype == "bfloat16" else 0
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    runner = StageRunner(args.out)
    runner.log(f"torch {torch.__version__} on {_device_name()}")
    model: Path = args.model
    if args.shape is None:
        runner.run("attention", check_attention)
        runner.run("grpo", lambda: run_grpo_steps(args))
    else:
        model = Path(tempfile.mkdtemp(dir="/dev/shm")) / args.shape
        runner.run("checkpoint", lambda: write_random_checkpoint(SIZES[args.shape], args.dtype, args.model, model))
    try:
        runner.run(
            "engine",
            lambda: asyncio.run(check_engine(model, create_trainer(model, args), args, runner)),
        )
    finally:
        if model != args.model:
            shutil.rmtree(model.parent, ignore_errors=True)
    print(json.dumps(runner.figures))
    if any("error" in stage for stage in runner.figures.values() if isinstance(stage, dict)):
        sys.exit(1)


if __name__ == "__main__":
    main()
