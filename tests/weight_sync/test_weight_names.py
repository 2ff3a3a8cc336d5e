"""Mapping between HF tensor names and vLLM's parameters is complete in both directions.

Uses real architectures and the real loading code on the meta device, without allocating memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vz_ray.config.rollout import EngineConfig
from vz_ray.needle.tiny_model import TinyModelConfig, build_tokenizer, make_hf_config
from vz_ray.rollout.engine_args import prepare_environment
from vz_ray.weight_sync import ModuleSource, WeightIntegrityError


def qwen_7b() -> Any:
    """Return the config of Qwen2.5-VL-7B-Instruct."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        tie_word_embeddings=False,
        text_config={
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "num_heads": 16,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    )


def tiny(tied: bool) -> Any:
    shape = TinyModelConfig(tie_word_embeddings=tied)
    config = make_hf_config(build_tokenizer(["<think>look</think>"], shape.vocab_size), shape)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
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

    store = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
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
        model = initialize_model(vllm_config)
        record_metadata_for_reloading(model)
        update = WeightReload(model, vllm_config.model_config)
        update.load(iter(tensors.items()))
        update.finish()


def source_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of the learner's weight source, on the meta device."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    source = ModuleSource(model, dtype=torch.bfloat16)
    tensors = {name: tensor for bucket in source.buckets(1 << 30) for name, tensor in bucket.items()}
    assert list(tensors) == [spec.name for spec in source.specs()]
    return tensors


@pytest.mark.parametrize("model", ["tiny", "tiny-tied", "qwen-7b"])
def test_every_hf_name_is_loaded(model: str, tmp_path: Path) -> None:
    config = qwen_7b() if model == "qwen-7b" else tiny(tied=model == "tiny-tied")
    tensors = source_tensors(config)
    if model == "qwen-7b":
        assert sum(tensor.numel() for tensor in tensors.values()) == 8_292_166_656
    reload(config, tmp_path, tensors)


def test_unknown_tensor_name_is_rejected(tmp_path: Path) -> None:
    config = tiny(tied=False)
    tensors = source_tensors(config)
    tensors["model.language_model.layers.0.mlp.side_proj.weight"] = torch.empty(4, 4, device="meta")
    with pytest.raises(ValueError, match="side_proj"):
        reload(config, tmp_path, tensors)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.language_model.layers.1.self_attn.k_proj.bias", "layers.1.self_attn.qkv_proj"),
        ("model.language_model.embed_tokens.weight", "embed_tokens"),
        ("model.language_model.norm.weight", "language_model.model.norm"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_missing_tensor_names_the_layer(name: str, layer: str, tmp_path: Path) -> None:
    config = tiny(tied=False)
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
