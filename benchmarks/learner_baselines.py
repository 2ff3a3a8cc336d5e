"""Baselines without packing: padded rows, as in the released VideoZoomer code, and TRL's GRPO step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.learner_batch import LearnerBatch
from vz_ray.config.loss import LossConfig
from vz_ray.learner.batch import mrope_positions
from vz_ray.learner.example import Example, SpecialTokenIds
from vz_ray.learner.grpo_loss import LossInputs, grpo_loss
from vz_ray.learner.image_patches import ImageSpec, extract_patches
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.learner.vision_tower import vision_tables


def split_rows(batch: LearnerBatch, rows: int) -> list[list[int]]:
    """Return micro-batches of `rows` trajectories, sorted by length to reduce padding."""
    order = sorted(range(len(batch.examples)), key=lambda i: batch.examples[i].context_length)
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def _padded(examples: Sequence[Example], fill: int) -> Tensor:
    width = max(e.length for e in examples)
    ids = np.full((len(examples), width), fill, dtype=np.int64)
    for row, e in enumerate(examples):
        ids[row, : e.length] = e.token_ids
    return torch.from_numpy(ids)


def _images(examples: Sequence[Example], batch: LearnerBatch, spec: ImageSpec) -> tuple[Tensor, np.ndarray]:
    return extract_patches([batch.pixels[ref.digest] for e in examples for ref in e.refs], spec.without_size_limits())


class PaddedStep:
    """Step with one padded row per trajectory and frames computed for each trajectory.

    Everything else is vz_ray's: vectorized vision tower, chunked log-probs, causal attention without a mask.
    """

    def __init__(
        self,
        policy: PolicyModel,
        batch: LearnerBatch,
        spec: ImageSpec,
        rows: int,
        loss: LossConfig,
        device: torch.device,
    ) -> None:
        self._policy, self._batch, self._loss = policy, batch, loss
        self._parts = [self._part(examples, spec, device) for examples in split_rows(batch, rows)]

    def _part(self, indices: list[int], spec: ImageSpec, device: torch.device) -> dict[str, Any]:
        examples = [self._batch.examples[i] for i in indices]
        tokens = self._policy.tokens
        ids = _padded(examples, tokens.pad)
        positions = torch.zeros(3, *ids.shape, dtype=torch.int64)
        mask = torch.zeros(len(examples), max(len(e.sampled_positions) for e in examples))
        logit_indices, targets = mask.long(), mask.long()
        for row, e in enumerate(examples):
            positions[:, row, : e.length] = torch.from_numpy(
                mrope_positions(e.token_ids, e.grids, tokens.image, spec.merge_size)
            )
            count = len(e.sampled_positions)
            logit_indices[row, :count] = torch.from_numpy(row * ids.shape[1] + e.sampled_positions - 1)
            targets[row, :count] = torch.from_numpy(e.token_ids[e.sampled_positions])
            mask[row, :count] = 1
        pixels, grids = _images(examples, self._batch, spec)
        tensors = {
            "ids": ids,
            "positions": positions,
            "mask": mask,
            "logit_indices": logit_indices,
            "targets": targets,
        }
        part: dict[str, Any] = {name: t.to(device) for name, t in tensors.items()}
        pick = lambda values: torch.tensor([float(values[i]) for i in indices], device=device)  # noqa: E731
        weight, advantage = pick(self._batch.weight), pick(self._batch.advantage)
        return part | {"pixels": pixels.to(device), "grids": grids, "weight": weight, "advantage": advantage}

    def step(self) -> float:
        """Run forward and backward of the whole group and return the loss."""
        hf, total = self._policy.hf, 0.0
        hf.model.language_model.config._attn_implementation = "sdpa"
        for part in self._parts:
            embeddings = hf.get_input_embeddings()(part["ids"])
            visual = hf.model.visual
            tables = vision_tables(part["grids"], self._policy.shape, part["pixels"].device)
            grids = torch.from_numpy(part["grids"])
            features = visual(part["pixels"].to(visual.dtype), grid_thw=grids, **tables).pooler_output
            slots = (part["ids"].flatten() == self._policy.tokens.image).nonzero().flatten()
            flat = embeddings.flatten(0, 1).index_copy(0, slots, features.to(embeddings.dtype))
            hidden = hf.model.language_model(
                inputs_embeds=flat.view_as(embeddings),
                attention_mask={"full_attention": None},
                position_ids=part["positions"],
                use_cache=False,
            ).last_hidden_state.flatten(0, 1)
            mask = part["mask"].bool()
            states = hidden[part["logit_indices"][mask]]
            temperature = torch.ones(len(states), device=hidden.device)
            values = hf.lm_head(states, part["targets"][mask], temperature, self._policy.banned)
            zeros = torch.zeros_like(part["mask"])
            logprobs, entropy = (zeros.masked_scatter(mask, value) for value in values)
            loss, _ = grpo_loss(logprobs, entropy, first_update_inputs(part, logprobs), self._loss)
            loss.backward()
            total += float(loss.detach())
        return total


def first_update_inputs(part: dict[str, Any], logprobs: Tensor) -> LossInputs:
    """Return the inputs of the first update: old log-probs equal the current ones; the reference's are 0."""
    old = logprobs.detach()
    advantages, weights = part["advantage"][:, None], part["weight"][:, None]
    return LossInputs(advantages, weights, part["mask"], old, old * float("nan"), old * 0.0)


class TrlStep:
    """TRL's GRPO loss on prepared inputs.

    Prompts are padded on the left, completions on the right; clips are masked as tool output.
    """

    def __init__(
        self,
        hf: Any,
        checkpoint: Path,
        tokens: SpecialTokenIds,
        batch: LearnerBatch,
        spec: ImageSpec,
        rows: int,
        loss: LossConfig,
        out: Path,
    ) -> None:
        from datasets import Dataset
        from transformers import AutoProcessor
        from trl import GRPOConfig, GRPOTrainer

        settings = GRPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=rows,
            num_generations=len(batch.examples),
            gradient_accumulation_steps=len(batch.examples) // rows,
            beta=loss.kl_coef,
            epsilon=loss.clip_ratio_low,
            epsilon_high=loss.clip_ratio_high,
            entropy_coef=loss.entropy_coef,
            loss_type="grpo",
            temperature=1.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        self._trainer = GRPOTrainer(
            model=hf,
            args=settings,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * len(batch.examples)),
            processing_class=AutoProcessor.from_pretrained(checkpoint),
        )
        self._trainer.current_gradient_accumulation_steps = settings.gradient_accumulation_steps
        self._hf, self._tokens = hf.train(), tokens
        self._inputs = [self._part(batch, spec, examples) for examples in split_rows(batch, rows)]

    def _part(self, batch: LearnerBatch, spec: ImageSpec, indices: list[int]) -> dict[str, Any]:
        examples = [batch.examples[i] for i in indices]
        prompt = min(int(e.sampled_positions[0]) for e in examples)
        ids = _padded(examples, self._tokens.pad)
        mask = torch.stack([(torch.arange(ids.shape[1]) < e.length).long() for e in examples])
        sampled = torch.zeros_like(ids)
        for row, e in enumerate(examples):
            sampled[row, torch.from_numpy(e.sampled_positions)] = 1
        pixels, grids = _images(examples, batch, spec)
        completion = ids[:, prompt:]
        return {
            "prompt_ids": ids[:, :prompt],
            "prompt_mask": mask[:, :prompt],
            "completion_ids": completion,
            "completion_mask": mask[:, prompt:],
            "tool_mask": sampled[:, prompt:],
            "advantages": torch.tensor([float(batch.advantage[i]) for i in indices]),
            "ref_per_token_logps": torch.zeros(completion.shape),
            "pixel_values": pixels,
            "image_grid_thw": torch.from_numpy(grids),
            "num_images": [len(e.refs) for e in examples],
            "mm_token_type_ids": (ids == self._tokens.image).long(),
            "num_items_in_batch": sampled.sum(),
        }

    def step(self) -> float:
        """Run forward and backward of the whole group and return the loss."""
        total = 0.0
        for inputs in self._inputs:
            loss = self._trainer.compute_loss(self._hf, inputs)
            loss.backward()
            total += float(loss.detach())
        return total
