"""Memory of a learner rank and of an engine on a GPU, against the plan: within 20 %.

Assumed items of the plan (CUDA context, fragmentation) are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import ModelSize, write_random_checkpoint
from tests.learner.rank_worker import small_config
from tests.learner.training_data import TrainingData, make_training_data
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.loss import LossConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.families import load_model_shape, processor_max_pixels
from vz_ray.learner.trainer import Trainer
from vz_ray.planning.engine_memory import engine_memory
from vz_ray.planning.episode_budget import longest_episode
from vz_ray.planning.gpu_memory import GIB, Certainty, MemoryFootprint, MemoryPhase
from vz_ray.planning.learner_activations import WorstCaseBatch
from vz_ray.planning.learner_memory import learner_footprint
from vz_ray.rollout.vllm_engine import VllmEngine

pytestmark = pytest.mark.gpu

SIZE = ModelSize(hidden=1536, layers=10, heads=12, kv_heads=2, mlp=4096, vocab=32_768, vision_hidden=320, depth=4)
"""About 350 million parameters."""
RecordProperty = Callable[[str, object], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    directory = tmp_path_factory.mktemp("model")
    write_random_checkpoint(SIZE, "bfloat16", Path("assets/tiny-base"), directory)
    return make_training_data(directory, groups=1, samples=4, overview=16, clip=8, sides=(9,))


def planned_bytes(footprint: MemoryFootprint, *phases: MemoryPhase) -> int:
    measured = [item for item in footprint.items if item.certainty is not Certainty.ASSUMED]
    kept = MemoryFootprint(footprint.component, 1, footprint.capacity_bytes, tuple(measured))
    return max(kept.bytes_during(phase) for phase in phases)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_learner_peak_is_within_20_percent(
    data: TrainingData, stage: int, checkpointing: bool, record_property: RecordProperty
) -> None:
    config = small_config(
        data.model,
        stage,
        dtype="bfloat16",
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=8192,
        logprob_chunk_tokens=512,
        loss=LossConfig(kl_coef=0.0),
    )
    before = torch.cuda.memory_allocated()
    trainer = Trainer(config)
    (batch,) = trainer._collate_all(
        examples := trainer.encode(data.trajectories), trainer._plan_micro_batches(examples), data.pixels, None
    )
    tokens = batch.input_ids.numel()
    worst_case = WorstCaseBatch(
        tokens=tokens,
        patches=len(batch.pixel_values),
        sampled_tokens=int(batch.mask.sum()),
        attention_pairs=0,
        gathered_keys=int(batch.layout.cu_seqlens_k[-1]) / tokens,
    )
    del batch
    trainer.grpo_step(data.groups, data.pixels)  # allocates the optimizer's states
    torch.cuda.reset_peak_memory_stats()
    trainer.grpo_step(data.groups, data.pixels)
    peak = torch.cuda.max_memory_allocated() - before
    footprint = learner_footprint(load_model_shape(str(data.model)), config, worst_case, 80 * GIB, has_reference=False)
    planned = planned_bytes(footprint, MemoryPhase.FORWARD_BACKWARD, MemoryPhase.OPTIMIZER_STEP)
    record_property("peak_gib", peak / GIB)
    record_property("planned_to_measured", planned / peak)
    assert planned == pytest.approx(peak, rel=0.2), planned / peak


async def test_engine_memory_is_within_20_percent(
    data: TrainingData, tmp_path: Path, record_property: RecordProperty
) -> None:
    """The memory of the whole GPU, since the engine is another process; its context is planned, too."""
    config = EngineConfig(dtype="bfloat16", kv_cache_gib=4.0, max_model_len=4096, max_num_seqs=8, images_per_prompt=8)
    shape = load_model_shape(str(data.model))
    plan = engine_memory(
        shape,
        config,
        longest_episode(EpisodeConfig(max_context=4096, overview_frames=8), shape.vision),
        80 * GIB,
        num_engines=1,
        group_size=4,
        max_image_pixels=processor_max_pixels(str(data.model)),
    )
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    engine = await VllmEngine.start(data.model, config, name="engine", log_file=tmp_path / "engine.log")
    try:
        used = free_before - torch.cuda.mem_get_info()[0]
    finally:
        await engine.shutdown()
    record_property("used_gib", used / GIB)
    record_property("planned_to_measured", plan.footprint.peak_bytes / used)
    assert plan.footprint.peak_bytes == pytest.approx(used, rel=0.2), plan.footprint.peak_bytes / used
