"""Tiny models of each family: the checkpoint loads in transformers and in the real engine, with equal log-probs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from blake3 import blake3

from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import SamplingParams
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.tiny_families import TINY_FAMILIES, TinyFamily, TinyModelConfig, attention_layers
from vz_ray.needle.tiny_model import build_tiny_model, save_hf_model
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import Frame, FrameRef

BASE = Path(__file__).parents[2] / "assets/tiny-base"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Maximum difference of log-probs between engine and HF in float32."""


@dataclass(frozen=True)
class Checkpoint:
    """A tiny checkpoint, loaded in transformers."""

    family: TinyFamily
    path: Path
    model: Any
    processor: Any

    def frames(self, count: int) -> list[Frame]:
        """Return frames of two sizes on the family's grid."""
        rng, side, frames = np.random.default_rng(0), self.family.frame_side, []
        for index in range(count):
            rgb = rng.integers(0, 256, (side * (1 + index % 2), 2 * side, 3), dtype=np.uint8)
            digest = blake3(rgb.tobytes()).hexdigest()
            ref = FrameRef("v", "v.mp4", 0, float(index), rgb.shape[1], rgb.shape[0], "none", "none", digest)
            frames.append(Frame(ref, rgb))
        return frames

    @torch.no_grad()
    def logprobs(self, prompt: Prompt, sampled: list[int], banned: list[int]) -> torch.Tensor:
        """Return the log-probs of `sampled` after `prompt`."""
        images = [frame.rgb.copy() for frame in prompt.frames]
        inputs = self.processor.image_processor(images=images, return_tensors="pt")
        counts = iter((inputs["image_grid_thw"].prod(dim=1) // 4).tolist())
        pad = self.model.config.image_token_id
        ids = [token for id_ in prompt.compact_ids for token in [id_] * (next(counts) if id_ == pad else 1)]
        tokens = torch.tensor([[*ids, *sampled]])
        logits = self.model(input_ids=tokens, mm_token_type_ids=(tokens == pad).long(), **inputs).logits[0].float()
        logits[:, banned] = float("-inf")
        return torch.log_softmax(logits[len(ids) - 1 : -1], dim=-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]


@pytest.fixture(scope="module", params=list(TINY_FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    family = TINY_FAMILIES[request.param]
    sizes = TinyModelConfig(num_layers=2, num_heads=2, num_kv_heads=1, tie_word_embeddings=False)
    path = build_tiny_model(
        tmp_path_factory.mktemp(family.name) / "model", ["what flashes? 0.25"], config=sizes, family=family.name
    )
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():  # every parameter differs from its initial value, so that each one matters
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.to(getattr(torch, family.engine_dtype)))
    save_hf_model(model, path)
    return Checkpoint(family, path, model.eval(), AutoProcessor.from_pretrained(path))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(checkpoint: Checkpoint) -> AsyncIterator[VllmEngine]:
    config = EngineConfig(
        dtype=checkpoint.family.engine_dtype,
        kv_cache_gib=0.25,
        mm_processor_cache_gib=0.1,
        max_model_len=1024,
        max_num_seqs=4,
        num_threads=1,
    )
    engine = await VllmEngine.start(
        checkpoint.path, config, name="engine", log_file=checkpoint.path.parent / "engine.log"
    )
    yield engine
    await engine.shutdown()


@pytest.mark.asyncio(loop_scope="module")
async def test_engine_samples_with_logprobs_of_hf(checkpoint: Checkpoint, engine: VllmEngine) -> None:
    frames = checkpoint.frames(6)
    text = "".join(f"<|vision_start|><|image_pad|><|vision_end|>{index}" for index in range(len(frames)))
    ids = checkpoint.processor.tokenizer.encode(f"<|im_start|>user\n{text} what flashes?", add_special_tokens=False)
    prompt = Prompt(tuple(ids), tuple(frames), ())
    turn = await engine.generate(prompt, SamplingParams(max_tokens=24, seed=1), request_id="turn")
    assert len(turn.token_ids) > 4
    expected = checkpoint.logprobs(prompt, list(turn.token_ids), list(engine.banned_token_ids))
    difference = (torch.tensor(turn.logprobs) - expected).abs().max()
    assert difference <= TOLERANCE[checkpoint.family.engine_dtype]


def test_hf_generates_with_frames(checkpoint: Checkpoint) -> None:
    frame = checkpoint.frames(1)[0].rgb.copy()
    text = "<|vision_start|><|image_pad|><|vision_end|> what"
    inputs = checkpoint.processor(text=text, images=[frame], return_tensors="pt")
    assert inputs["image_grid_thw"].prod() // 4 == (inputs["input_ids"] == checkpoint.model.config.image_token_id).sum()
    output = checkpoint.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert type(checkpoint.model).__name__ == f"{checkpoint.family.hf_prefix}ForConditionalGeneration"


def test_smallest_frame_is_one_visual_token(checkpoint: Checkpoint) -> None:
    side = checkpoint.family.frame_side
    images = checkpoint.processor.image_processor(images=[np.zeros((side, side, 3), np.uint8)], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 2, 2]]


@pytest.mark.parametrize("name", list(TINY_FAMILIES))
def test_first_head_attends_to_second_previous_token(name: str) -> None:
    """The head's score of each token is highest for the token two positions before, whatever the tokens are."""
    family = TINY_FAMILIES[name]
    tokenizer = _tokenizer(family)
    torch.manual_seed(0)
    model = family.build(family.hf_config(tokenizer, TinyModelConfig(num_layers=2)))
    layer, attention = model.model.language_model.layers[0], attention_layers(model)[0]
    weights = []

    def record(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any) -> Any:
        weights.append((query[0, 0] @ key[0, 0].T * kwargs["scaling"]).tril().argmax(dim=1))
        return value.transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("recorded", record)
    attention.config._attn_implementation = "recorded"
    ids = torch.randint(300, 1000, (1, 40), generator=torch.Generator().manual_seed(1))
    text = model.model.language_model
    with torch.no_grad():
        text(input_ids=ids, attention_mask={"full_attention": None, "linear_attention": None}, use_cache=False)
    assert hasattr(layer, "self_attn")
    assert weights[0][2:].tolist() == list(range(38))


@pytest.mark.parametrize("name", [name for name, family in TINY_FAMILIES.items() if family.starts_from_base])
def test_start_keeps_predictions_of_base(name: str) -> None:
    """On texts of the needle world, the most likely next token is mostly that of the base."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    family, corpus = TINY_FAMILIES[name], make_tokenizer_corpus()
    tokenizer = _tokenizer(family)
    torch.manual_seed(0)
    model = family.build(family.hf_config(tokenizer, family.base_sizes))
    family.start_from(model, BASE)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("".join(corpus[:30]), add_special_tokens=False)])
    with torch.no_grad():
        expected, actual = (hf(input_ids=ids).logits[0].argmax(dim=-1) for hf in (base, model))
    assert (expected == actual).float().mean() > 0.5


def _tokenizer(family: TinyFamily) -> Any:
    from vz_ray.needle.tiny_model import build_tokenizer

    return build_tokenizer(make_tokenizer_corpus(), 1792, family.tokenizer_fields)


def test_unknown_family_names_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="family is 'qwen9'; use one of qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5"):
        build_tiny_model(tmp_path / "model", ["text"], family="qwen9")


def test_qwen2_5_vl_refuses_a_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Qwen2\.5-VL base starts from random weights"):
        build_tiny_model(tmp_path / "model", make_tokenizer_corpus(), start=BASE)
