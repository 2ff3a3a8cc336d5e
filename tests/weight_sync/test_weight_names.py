"""Mapping between HF tensor names and vLLM's parameters is complete in both directions.

Uses real architectures and the real loading code on the meta device, without allocating memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.hf_configs import build_on_meta, hf_config
from vz_ray.config.rollout import EngineConfig
from vz_ray.families import FAMILIES, load_model_shape
from vz_ray.rollout.engine_args import prepare_environment
from vz_ray.weight_sync import ModuleSource, WeightIntegrityError

KNOWN = [name for family in FAMILIES.values() for name in family.known_shapes]


def model_config(name: str) -> Any:
    """Return the HF config of a released checkpoint."""
    config = hf_config(load_model_shape(name))
    config.architectures = [type(build_on_meta(config)).__name__]
    return config


@pytest.fixture(scope="module", autouse=True)
def single_process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Initialize a tensor parallel group with one member, which vLLM's layers require."""
    prepare_environment(EngineConfig())
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    store = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
    with pytest.MonkeyPatch.context() as patches:
        # The CPU's packing of experts has no kernel for the meta device.
        patches.setattr(cpu_moe, "cpu_prepack_moe_weight", lambda weight, isa: weight)
        yield
    cleanup_dist_env_and_memory()


def reload(config: Any, directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Load `tensors` into vLLM's model of `config`, as a publish does."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading
    from vllm.model_executor.model_loader.utils import initialize_model

    from vz_ray.weight_sync.vllm_reload import WeightReload

    config.save_pretrained(directory)
    args = EngineArgs(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        kv_cache_memory_bytes=1 << 20,
    )
    vllm_config = args.create_engine_config()
    with set_current_vllm_config(vllm_config), torch.device("meta"):
        model = initialize_model(vllm_config).to("meta")  # a norm of Qwen3.5 names the CPU explicitly
        record_metadata_for_reloading(model)
        update = WeightReload(model, vllm_config.model_config)
        update.load(iter(tensors.items()))
        update.finish()


def source_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of the learner's weight source, on the meta device."""
    source = ModuleSource(build_on_meta(config), dtype=torch.bfloat16)
    tensors = {name: tensor for bucket in source.buckets(1 << 30) for name, tensor in bucket.items()}
    assert list(tensors) == [spec.name for spec in source.specs()]
    return tensors


@pytest.mark.parametrize("name", KNOWN)
def test_every_hf_name_is_loaded(name: str, tmp_path: Path) -> None:
    config = model_config(name)
    tensors = source_tensors(config)
    assert sum(tensor.numel() for tensor in tensors.values()) == load_model_shape(name).parameters
    reload(config, tmp_path, tensors)


def test_unknown_tensor_name_is_rejected(tmp_path: Path) -> None:
    config = model_config("Qwen2.5-VL-7B")
    tensors = source_tensors(config)
    tensors["model.language_model.layers.0.mlp.side_proj.weight"] = torch.empty(4, 4, device="meta")
    with pytest.raises(ValueError, match="side_proj"):
        reload(config, tmp_path, tensors)


@pytest.mark.parametrize(
    ("model", "name", "layer"),
    [
        ("Qwen2.5-VL-7B", "model.language_model.layers.1.self_attn.k_proj.bias", "layers.1.self_attn.qkv_proj"),
        ("Qwen2.5-VL-7B", "model.language_model.embed_tokens.weight", "embed_tokens"),
        ("Qwen2.5-VL-7B", "model.language_model.norm.weight", "language_model.model.norm"),
        ("Qwen2.5-VL-7B", "model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv"),
        ("Qwen2.5-VL-7B", "lm_head.weight", "lm_head"),
        ("Qwen3-VL-4B", "model.visual.deepstack_merger_list.2.linear_fc2.bias", "deepstack_merger_list.2.linear_fc2"),
        ("Qwen3-VL-4B", "model.visual.pos_embed.weight", "pos_embed"),
        ("Qwen3-VL-4B", "model.language_model.layers.3.self_attn.q_norm.weight", "layers.3.self_attn.q_norm"),
        ("Qwen3-VL-30B-A3B", "model.language_model.layers.5.mlp.experts.down_proj", "layers.5.mlp.experts"),
        ("Qwen3-VL-30B-A3B", "model.language_model.layers.5.mlp.gate.weight", "layers.5.mlp.gate"),
        ("Qwen3.5-4B", "model.language_model.layers.0.linear_attn.in_proj_z.weight", "layers.0.linear_attn.in_proj"),
        ("Qwen3.5-4B", "model.language_model.layers.0.linear_attn.A_log", "layers.0.linear_attn"),
        ("Qwen3.5-4B", "model.language_model.layers.0.linear_attn.conv1d.weight", "layers.0.linear_attn.conv1d"),
    ],
)
def test_missing_tensor_names_the_layer(model: str, name: str, layer: str, tmp_path: Path) -> None:
    config = model_config(model)
    tensors = source_tensors(config)
    del tensors[name]
    with pytest.raises(WeightIntegrityError, match=layer):
        reload(config, tmp_path, tensors)


def test_duplicate_tensor_is_rejected() -> None:
    from vz_ray.weight_sync.vllm_reload import WeightReload

    class AcceptingModel(torch.nn.Module):
        def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
            list(tensors)

    update = WeightReload(AcceptingModel(), None)
    with pytest.raises(WeightIntegrityError, match=r"a\.weight occurs twice"):
        update.load(iter([("a.weight", torch.zeros(1)), ("a.weight", torch.zeros(1))]))
