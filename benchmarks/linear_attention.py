"""Benchmark of a text model with linear attention: a group behind its prefix, and one sequence per trajectory.

    python -m benchmarks.linear_attention
    python -m benchmarks.linear_attention --device cuda --dtype bfloat16 --hidden-size 2560 --heads 16

The model has Qwen3.5's layer order (three linear layers, then one of full attention) and head widths. Each round is one
forward and backward pass of the same trajectories: packed behind their prefix, one pass per trajectory, and the same
with transformers' own layers. Rounds alternate, and the fastest counts. The last line is one JSON object: seconds, on
CPUs those of the process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

from vz_ray.learner.attention import PACKED_ATTENTION, PackedLayout, Segment, packed_attention
from vz_ray.learner.linear_attention import pack_linear_attention


def make_model(args: argparse.Namespace, attention: str) -> Any:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=64, hidden_size=args.hidden_size, intermediate_size=3 * args.hidden_size, num_hidden_layers=4,
        num_attention_heads=args.heads // 2, num_key_value_heads=max(1, args.heads // 8), head_dim=256,
        linear_num_key_heads=args.heads, linear_num_value_heads=2 * args.heads,
    )  # fmt: skip
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    config._attn_implementation = attention
    return Qwen3_5TextModel(config).to(args.device, getattr(torch, args.dtype))


def run_packed(model: Any, inputs: Tensor, segments: Sequence[Segment], positions: Sequence[int]) -> Tensor:
    output: Tensor = model(
        inputs_embeds=inputs,
        attention_mask={"full_attention": None, "linear_attention": None},
        position_ids=torch.tensor(positions, device=inputs.device).expand(3, 1, -1),
        use_cache=False,
        layout=PackedLayout.from_segments(segments, inputs.device),
    ).last_hidden_state
    return output


def make_passes(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return functions that compute the gradients of all trajectories."""
    prefix, branch, count, total = args.prefix, args.branch, args.branches, args.prefix + args.branch
    packed, reference = make_model(args, PACKED_ATTENTION), make_model(args, "sdpa")
    pack_linear_attention(packed)
    shared = torch.randn(1, prefix + count * branch, args.hidden_size, device=args.device, dtype=packed.dtype)
    starts = range(prefix, shared.shape[1], branch)
    segments = [Segment(0, prefix), *(Segment(s, s + branch, (0, prefix)) for s in starts)]
    positions = [*range(prefix), *list(range(prefix, total)) * count]
    trajectories = [torch.cat([shared[:, :prefix], shared[:, s : s + branch]], 1) for s in starts]

    def learn(output: Tensor) -> None:
        output.float().square().mean().backward()

    def shared_prefix() -> None:
        learn(run_packed(packed, shared, segments, positions))

    def per_trajectory() -> None:
        for trajectory in trajectories:
            learn(run_packed(packed, trajectory, [Segment(0, total)], range(total)))

    def transformers() -> None:
        for trajectory in trajectories:
            learn(reference(inputs_embeds=trajectory, use_cache=False).last_hidden_state)

    return {function.__name__: function for function in (shared_prefix, per_trajectory, transformers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prefix", 1500), ("branches", 8), ("branch", 600), ("hidden-size", 256), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    passes = make_passes(args)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(args.rounds):
        for name, run in passes.items():
            started = clock()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - started)
    print(json.dumps({name: round(min(times), 3) for name, times in seconds.items()}))


if __name__ == "__main__":
    main()
