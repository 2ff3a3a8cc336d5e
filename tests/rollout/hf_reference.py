"""Reference log-probs for parity tests, by a plain Hugging Face forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from vz_ray.config.learner import LoraConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.weight_sources import AdapterSource
from vz_ray.needle.tiny_families import TinyModelConfig, find_tiny_family
from vz_ray.needle.tiny_model import build_tiny_model, save_hf_model
from vz_ray.video.frame import Frame, FrameRef
from vz_ray.video.image_grid import ImageGrid
from vz_ray.weight_sync import ModuleSource, ParityProbe, ProbeScore, WeightSource

TEXTS = (
    '<think>look closer</think><video_zoom>{"segment":[1,2],"fps":2}</video_zoom>',
    "<frame0_time0.00s><tool_response></tool_response><answer>A</answer> what flashes?",
)


def build_tiny_checkpoint(directory: Path, *, tied: bool = False, seed: int = 0, family: str = "qwen2_5_vl") -> Path:
    """Build a small random checkpoint with clearly different logits, whose weights are bfloat16 numbers."""
    path = build_tiny_model(
        directory,
        TEXTS,
        seed=seed,
        family=family,
        config=TinyModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, tie_word_embeddings=tied),
    )
    model = load_hf_model(path)
    perturb(model, seed + 100)
    save_hf_model(model, path)
    return path


def load_hf_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval()


def perturb(model: Any, seed: int) -> None:
    """Change every trained parameter, so that an unpublished parameter is detected.

    The new values are bfloat16 numbers: an engine of any dtype has the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.copy_(parameter.bfloat16())


def frame(seed: int, width: int, height: int) -> Frame:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    digest = blake3(rgb.tobytes()).hexdigest()
    return Frame(FrameRef("v", "v.mp4", 0, float(seed), width, height, "none", "none", digest), rgb)


class HfReference:
    """HF model with the engine's checkpoint and token mask.

    Args:
        lora: Adapters to add, which are then the only trained parameters.
    """

    def __init__(
        self,
        path: Path,
        banned: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lora: LoraConfig | None = None,
    ) -> None:
        from transformers import AutoProcessor

        self.model = load_hf_model(path, dtype)
        if lora is not None:
            add_adapters(self.model, lora, str(path), seed=0)
        self.model.to(device)
        self.source: WeightSource = ModuleSource(self.model) if lora is None else AdapterSource(self.model)
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.banned = list(banned)
        images = self.processor.image_processor
        self.grid = ImageGrid(images.patch_size, images.merge_size)

    def frame(self, seed: int, columns: int, rows: int) -> Frame:
        """Return a noise frame of this many visual tokens."""
        side = self.grid.patch_size * self.grid.merge_size
        return frame(seed, columns * side, rows * side)

    def prompt(self, text: str, frames: Sequence[Frame]) -> Prompt:
        """Encode `text` with one `<image>` per frame."""
        text = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        return Prompt(tuple(self.tokenizer.encode(text, add_special_tokens=False)), tuple(frames), ())

    def extend(self, prompt: Prompt, sampled: Sequence[int], text: str, frames: Sequence[Frame]) -> Prompt:
        observation = self.prompt(text, frames)
        return Prompt((*prompt.compact_ids, *sampled, *observation.compact_ids), (*prompt.frames, *frames), ())

    def logprobs(self, prompt: Prompt, sampled: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Return the log-probs `[T]` of `sampled` after `prompt`, with token mask and temperature."""
        logits = self.logits(prompt, sampled)[:-1]
        logits[:, self.banned] = float("-inf")
        logps = torch.log_softmax(logits / (temperature or 1.0), dim=-1).cpu()
        return logps[torch.arange(len(sampled)), torch.tensor(list(sampled))].tolist()

    def score_probe(self, probe: ParityProbe) -> ProbeScore:
        """Score a parity probe as the learner does; the token count is that of the image processor."""
        images = self.processor.image_processor(images=[f.rgb for f in probe.frames], return_tensors="pt")
        visual = int(images["image_grid_thw"].prod(dim=1).sum()) // self.processor.image_processor.merge_size**2
        count = len(probe.compact_ids) - len(probe.frames) + visual
        return ProbeScore(count, tuple(self.logprobs(Prompt(probe.compact_ids, probe.frames, ()), probe.token_ids)))

    @torch.no_grad()
    def logits(self, prompt: Prompt, sampled: Sequence[int] = ()) -> torch.Tensor:
        """Return the logits `[T + 1, vocab]` after the prompt and after each sampled token."""
        pad = self.model.config.image_token_id
        frames = iter(prompt.frames)
        ids: list[int] = []
        for token in prompt.compact_ids:
            if token == pad:
                ids += [pad] * self.grid.num_visual_tokens(self.grid.patch_grid(*next(frames).rgb.shape[:2]))
            else:
                ids.append(token)
        ids += sampled
        tokens = torch.tensor([ids], device=self.model.device)
        images = {"images": [f.rgb.copy() for f in prompt.frames], "return_tensors": "pt"}
        pixels = self.processor.image_processor(**images).to(self.model.device)
        logits = self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == pad).long(),
            **pixels,
        ).logits[0]
        return logits[-len(sampled) - 1 :].float()


def max_abs_diff(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the largest absolute difference."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def mean_abs_diff(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the mean absolute difference."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@dataclass(frozen=True, slots=True)
class EngineVariant:
    """An engine on the CPU in float32 if its kernels accept it, or on a GPU in bfloat16.

    Attributes:
        device: Device of the reference model, which is that of the engine.
        enforce_eager: Disable CUDA graphs.
        family: HF model type.
        lora: Adapters that are trained and published.
    """

    device: str = "cpu"
    enforce_eager: bool = True
    family: str = "qwen2_5_vl"
    lora: LoraConfig | None = None

    @property
    def engine_dtype(self) -> str:
        return find_tiny_family(self.family).engine_dtype if self.device == "cpu" else "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the reference model. On the CPU float32, so that only the engine rounds."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def overview_frames(self) -> int:
        """Frames of a prompt that fills a block of the prefix cache.

        vLLM's blocks of models with linear attention have the bytes of a recurrent state, here 544 tokens.
        """
        return 40 if self.family == "qwen3_5" else 12

    @property
    def tolerance(self) -> float:
        """Maximum of `difference`. In float32 only the order of additions differs, and 1e-4 is 50 times that.

        In bfloat16 these tests reach 0.04 on the CPU; stale caches give 1.2. Against a float32 reference, Qwen3.5
        reaches 0.014 (0.05 for one token) and stale caches give 0.34: activations and the inputs of the recurrent
        state are rounded, the state itself is float32.
        """
        if self.engine_dtype == "float32":
            return 1e-4
        return 0.05 if self.device == "cpu" else 0.1

    def difference(self, a: Sequence[float], b: Sequence[float]) -> float:
        """Return the largest difference of log-probs in float32, the mean in bfloat16 (one ulp of a logit is 0.06)."""
        return max_abs_diff(a, b) if self.engine_dtype == "float32" else mean_abs_diff(a, b)

    def config(self, base: EngineConfig) -> EngineConfig:
        """Return the config of this engine. Skip the test if the CPU is meant and the engine would use a GPU."""
        if self.device == "cpu" and torch.cuda.is_available():
            pytest.skip("VllmEngine uses this machine's GPU")
        config = replace(base, dtype=self.engine_dtype, enforce_eager=self.enforce_eager, max_model_len=2048)
        if self.lora is None:
            return config
        return replace(config, adapter_rank=self.lora.engine_rank, adapter_targets=self.lora.target_modules)


ADAPTERS = LoraConfig(rank=3, alpha=12.0)
"""Adapters of the language model; engines allocate rank 8."""
LINEAR_ATTENTION_ADAPTERS = replace(
    ADAPTERS, target_modules=[*ADAPTERS.target_modules, r"linear_attn\.(in_proj_(qkv|z|b|a)|out_proj)"]
)

GPU_ENGINES = [
    pytest.param(EngineVariant("cuda"), id="cuda-eager", marks=pytest.mark.gpu),
    pytest.param(EngineVariant("cuda", enforce_eager=False), id="cuda-graphs", marks=pytest.mark.gpu),
]
"""Parameters of fixtures with an engine on a GPU."""
