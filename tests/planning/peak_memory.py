"""Measured and planned peak memory of passes, in processes without leftovers of other tests.

    python -m tests.planning.peak_memory [FAMILY...]

Prints a Markdown table: bytes of live tensors on the CPU against the planner's items of the forward and backward pass.
Gradients of weights exist before the pass, as in training after the first micro-batch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from tests.planning.pass_memory import MODEL_TYPES, LiveTensors, chunk_padding, pack_batch, wide_policy
from vz_ray.config.learner import LearnerConfig
from vz_ray.learner.batch import MicroBatch
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.learner.sequence_parallel import SequenceShard
from vz_ray.planning.activation_memory import AttentionMemory
from vz_ray.planning.learner_activations import WorstCaseBatch, activation_items
from vz_ray.planning.trainable_params import count_trainable_params

CHUNK = 64
SLICE, TILE = 512, 128


@dataclass(frozen=True)
class PassPeak:
    """Peak of one pass on one rank.

    Attributes:
        tokens, patches: Of the whole micro-batch.
        slice_patches, tile_tokens, ranks: Settings of the learner.
        measured, planned: Bytes, of the rank with the larger measured peak.
    """

    family: str
    dtype: str
    checkpointing: bool
    tokens: int
    patches: int
    slice_patches: int
    tile_tokens: int
    ranks: int
    measured: int
    planned: int

    @property
    def ratio(self) -> float:
        return self.planned / self.measured


def planned_bytes(policy: PolicyModel, batch: MicroBatch, learner: LearnerConfig) -> int:
    """Return the planner's bytes of this rank's part of a pass on the CPU, which has no FlashAttention."""
    attention = AttentionMemory(
        fused=False, chunk_padding=chunk_padding(batch), exchanged=learner.sequence_parallel_size > 1
    )
    worst_case = WorstCaseBatch(
        tokens=batch.input_ids.numel(),
        patches=len(batch.pixel_values),
        sampled_tokens=int(batch.own.sum()),
        attention_pairs=0,
        gathered_keys=1.0,
    )
    params = count_trainable_params(policy.shape, learner)
    items = activation_items(policy.shape, learner, params, worst_case, policy.hf.dtype.itemsize, attention)
    return sum(item.bytes for item in items)


def peak(
    family: str,
    dtype: str,
    overview: int,
    *,
    checkpointing: bool = True,
    slice_patches: int = 0,
    tile_tokens: int = 0,
    shard: SequenceShard | None = None,
) -> PassPeak:
    """Measure one forward and backward pass."""
    policy = wide_policy(
        family,
        getattr(torch, dtype),
        chunk=CHUNK,
        vision_slice_patches=slice_patches,
        mlp_tile_tokens=tile_tokens,
    )
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    ranks = shard.size if shard else 1
    learner = LearnerConfig(
        world_size=ranks,
        sequence_parallel_size=ranks,
        gradient_checkpointing=checkpointing,
        logprob_chunk_tokens=CHUNK,
        vision_slice_patches=slice_patches,
        mlp_tile_tokens=tile_tokens,
    )
    whole = pack_batch(policy, samples=2, overview=overview, clip=4)
    batch = pack_batch(policy, samples=2, overview=overview, clip=4, shard=shard)

    def run(batch: MicroBatch) -> None:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + entropy.sum()).backward()

    run(pack_batch(policy, samples=1, overview=2, clip=1, shard=shard))
    with LiveTensors() as live:
        run(batch)
    sizes = whole.input_ids.numel(), len(whole.pixel_values)
    measured, planned = live.peak + batch.pixel_values.nbytes, planned_bytes(policy, batch, learner)
    return PassPeak(family, dtype, checkpointing, *sizes, slice_patches, tile_tokens, ranks, measured, planned)


def peaks_of_two_ranks(family: str, dtype: str, overview: int, **settings: int) -> PassPeak:
    """Measure a pass whose tokens are split over two ranks; return the rank with the larger peak."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run_rank, args=(Path(folder), family, dtype, overview, settings), nprocs=2)
        results = [PassPeak(**json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(2)]
    return max(results, key=lambda result: result.measured)


def _run_rank(rank: int, folder: Path, family: str, dtype: str, overview: int, settings: dict[str, int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    result = peak(family, dtype, overview, shard=SequenceShard(rank, 2, dist.group.WORLD), **settings)
    (folder / f"{rank}.json").write_text(json.dumps(asdict(result)))
    dist.destroy_process_group()


def measure(family: str) -> Iterator[PassPeak]:
    """Measure the cases of the table in this process and in two ranks."""
    torch.set_num_threads(1)
    slices, tiles = {"slice_patches": SLICE}, {"tile_tokens": TILE}
    for overview, cases in {8: ({}, slices | tiles), 32: ({}, slices, tiles, slices | tiles)}.items():
        for settings in cases:
            yield peak(family, "bfloat16", overview, **settings)
    for settings in ({}, slices | tiles):
        yield peaks_of_two_ranks(family, "bfloat16", 32, **settings)
    for checkpointing in (True, False):
        yield peak(family, "float32", 8, checkpointing=checkpointing, **slices, **tiles)


def measure_in_subprocess(family: str) -> list[PassPeak]:
    """Run `measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.planning.peak_memory", "--json", family]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr[-3000:])
    return [PassPeak(**json.loads(line)) for line in process.stdout.splitlines() if line.startswith("{")]


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--json"]:
        for result in measure(arguments[1]):
            print(json.dumps(asdict(result)), flush=True)
        return
    print(
        "| family | dtype | recomputed layers | tokens | patches | slice | tile | ranks | measured MB | planned MB | |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for family in arguments or MODEL_TYPES:
        for row in measure_in_subprocess(family):
            print(
                f"| {family} | {row.dtype} | {'yes' if row.checkpointing else 'no'} | {row.tokens:,} | {row.patches:,} "
                f"| {row.slice_patches or '-'} | {row.tile_tokens or '-'} | {row.ranks} | {row.measured / 1e6:.1f} "
                f"| {row.planned / 1e6:.1f} | {row.ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
