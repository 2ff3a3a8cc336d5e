"""The parity probe in bfloat16 with the image bounds of a released checkpoint, on a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.rollout.hf_reference import HfReference, build_tiny_checkpoint, perturb
from vz_ray.config.rollout import EngineConfig
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.weight_sync import (
    ModuleSource,
    ParityCheck,
    ShmTransport,
    WeightIntegrityError,
    WeightPublisher,
    WeightStore,
    build_parity_probe,
)


def set_image_bounds(model: Path, min_pixels: int, max_pixels: int) -> None:
    file = model / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["size"] = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    file.write_text(json.dumps(content))


class WrongSource(ModuleSource):
    """Publish some tensors with other values."""

    def __init__(self, module: torch.nn.Module, wrong: dict[str, torch.Tensor]) -> None:
        super().__init__(module)
        self._wrong = wrong

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        for bucket in super().buckets(max_bytes):
            yield {name: self._wrong.get(name, tensor) for name, tensor in bucket.items()}


async def test_bfloat16_probe_accepts_rounding_and_detects_wrong_weights(
    default_device: torch.device, tmp_path: Path, engine_config: EngineConfig
) -> None:
    model = build_tiny_checkpoint(tmp_path / "model")
    set_image_bounds(model, 3136, 12_845_056)  # Qwen2.5-VL
    config = replace(engine_config, dtype="bfloat16")
    engine = await VllmEngine.start(model, config, name="engine", log_file=tmp_path / "engine.log")
    try:
        reference = HfReference(model, engine.banned_token_ids, torch.bfloat16, default_device)
        probe = build_parity_probe(reference.tokenizer, reference.processor.image_processor)
        parity = ParityCheck(probe, dtype="bfloat16")
        publisher, store = WeightPublisher(timeout_s=60, parity=parity), WeightStore(tmp_path / "weights")
        transport = ShmTransport(store, ModuleSource(reference.model), reference.score_probe)
        for version in (1, 2, 3):
            report = await publisher.publish(version, transport, [engine])
            assert report.probe_gap is not None
            assert 0 < report.probe_gap.mean < 0.03
            perturb(reference.model, version)
        old = {name: tensor.detach().clone() for name, tensor in reference.model.named_parameters()}
        perturb(reference.model, 50)
        new = {name: tensor.detach() for name, tensor in reference.model.named_parameters()}
        output, stale = "model.language_model.layers.0.self_attn.o_proj.weight", "model.language_model.layers.1."
        wrong_weights = {
            "permuted": {output: new[output].flip(0).contiguous()},
            "stale layer": {name: tensor for name, tensor in old.items() if name.startswith(stale)},
        }
        for version, wrong in enumerate(wrong_weights.values(), 4):
            bad_transport = ShmTransport(store, WrongSource(reference.model, wrong), reference.score_probe)
            with pytest.raises(WeightIntegrityError, match="differ from the learner's"):
                await publisher.publish(version, bad_transport, [engine])
            await engine.resume()
        assert (await publisher.publish(6, transport, [engine])).updated == ("engine",)
    finally:
        await engine.shutdown()
