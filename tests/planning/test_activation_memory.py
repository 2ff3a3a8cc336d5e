"""What is kept for the backward pass, against what lives before it on the CPU: a real model, packed.

Formulas leave out index tables, positions and masks. FlashAttention of GPUs cannot run here: what it
keeps is checked with the fused attention of the CPU, which keeps the same (queries, keys and values
unrepeated, the output, log-sum-exps).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.learner.training_data import TrainingData
from tests.planning.pass_memory import LiveTensors, make_wide_world, pack_batch
from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.learner.logprobs import TokenLogprobs
from vz_ray.learner.policy_model import PolicyModel, load_pretrained
from vz_ray.planning import activation_memory
from vz_ray.planning.activation_memory import AttentionMemory
from vz_ray.planning.model_shape import ModelShape, TextShape
from vz_ray.planning.trainable_params import count_trainable_params

TOLERANCE = 0.05
UNFUSED = AttentionMemory(fused=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_wide_world(tmp_path_factory.mktemp("model"))


def saved_bytes(module: Any, call: Callable[[], Any]) -> int:
    """Of distinct storages that autograd was given to save, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Held, so that no later one has its address.
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in kept.values())


def expected_of(policy: PolicyModel, batch: Any, *, checkpointing: bool, frozen: bool) -> int:
    shape, width = ModelShape.from_hf_config(policy.hf.config), policy.hf.dtype.itemsize
    tokens, patches, sampled = batch.input_ids.numel(), len(batch.pixel_values), int(batch.mask.sum())
    kept = activation_memory.text_saved_bytes(
        shape.text, width, tokens, checkpointing=checkpointing, attention=UNFUSED
    ) + activation_memory.head_saved_bytes(shape.text, width, sampled)
    if frozen:
        return kept
    return kept + activation_memory.vision_saved_bytes(
        shape.vision, width, patches, checkpointing=checkpointing
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lives_after_a_policys_forward_pass_is_what_the_formulas_say(
    world: TrainingData, dtype: torch.dtype, frozen: bool, checkpointing: bool
) -> None:
    policy = PolicyModel.from_pretrained(world.model, dtype, chunk=64).train()
    policy.hf.model.visual.requires_grad_(not frozen)
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pack_batch(world, policy)
    with LiveTensors() as live:
        result = policy(batch)
        found = live.now()
    del result
    expected = expected_of(policy, batch, checkpointing=checkpointing, frozen=frozen)
    if dtype == torch.float32 and not frozen:
        # Pixels are read as they come, and were there before.
        expected -= batch.pixel_values.nbytes
    assert expected == pytest.approx(found, rel=TOLERANCE), expected / found


@pytest.mark.parametrize("frozen", [False, True])
def test_autograd_saves_what_the_formulas_say(world: TrainingData, frozen: bool) -> None:
    policy = PolicyModel.from_pretrained(world.model, torch.float32, chunk=64).train()
    policy.hf.model.visual.requires_grad_(not frozen)
    batch = pack_batch(world, policy)
    found = saved_bytes(policy, lambda: policy(batch))
    expected = expected_of(policy, batch, checkpointing=False, frozen=frozen)
    assert expected == pytest.approx(found, rel=TOLERANCE), expected / found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_attention_keeps_what_the_formula_says(world: TrainingData, dtype: torch.dtype) -> None:
    hf = load_pretrained(world.model, dtype)
    text, shape = hf.model.language_model.train(), ModelShape.from_hf_config(hf.config).text
    tokens = 512
    states = torch.randn(1, tokens, shape.hidden, dtype=dtype)
    places = torch.arange(tokens).expand(3, 1, -1)
    mask = {"full_attention": None}
    found = saved_bytes(
        text,
        lambda: text(inputs_embeds=states, position_ids=places, attention_mask=mask, use_cache=False),
    )
    expected = activation_memory.text_saved_bytes(shape, dtype.itemsize, tokens, checkpointing=False)
    assert expected == pytest.approx(found, rel=TOLERANCE), expected / found


@pytest.mark.parametrize("rows", [40, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_work_with_what_the_formula_says(dtype: torch.dtype, rows: int) -> None:
    """Less than a chunk, one, and several."""
    hidden, vocab, chunk = 64, 2048, 64
    text = TextShape(hidden, 1, 1, 1, 1, vocab, tie_word_embeddings=False)
    states = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    banned = torch.zeros(vocab, dtype=torch.bool)
    banned[:3] = True
    targets, temperature = torch.randint(3, vocab, (rows,)), torch.ones(rows)
    with LiveTensors() as live:
        logprobs, entropy = TokenLogprobs.apply(states, weight, targets, temperature, banned, chunk)
        (logprobs.sum() + entropy.sum()).backward()
    expected = activation_memory.logits_workspace_bytes(text, dtype.itemsize, rows, chunk)
    assert expected == pytest.approx(live.peak, rel=TOLERANCE), expected / live.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_pass_is_no_further_off_than_a_fifth(
    world: TrainingData, dtype: torch.dtype, checkpointing: bool
) -> None:
    """What is kept, what a layer or the logits work with, and gradients."""
    policy = PolicyModel.from_pretrained(world.model, dtype, chunk=64).train()
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pack_batch(world, policy)
    shape, width = ModelShape.from_hf_config(policy.hf.config), dtype.itemsize
    tokens, patches, sampled = batch.input_ids.numel(), len(batch.pixel_values), int(batch.mask.sum())
    with LiveTensors() as live:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + entropy.sum()).backward()
    layer = activation_memory.layer_workspace_bytes(
        shape, width, tokens, patches, checkpointing=checkpointing, attention=UNFUSED
    )
    logits = activation_memory.logits_workspace_bytes(shape.text, width, sampled, 64)
    kept = expected_of(policy, batch, checkpointing=checkpointing, frozen=False)
    if dtype == torch.float32:
        kept -= batch.pixel_values.nbytes
    expected = kept + max(layer, logits)
    assert expected == pytest.approx(live.peak, rel=0.2), (expected / live.peak, kept, layer, logits)


@pytest.fixture(scope="module")
def peaks(world: TrainingData) -> dict[tuple[str, float, bool], int]:
    """Of passes with adapters, by dtype, dropout, and whether activations are computed again."""
    command = [sys.executable, "-m", "tests.planning.adapter_peak_memory", str(world.model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(case): found for *case, found in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_with_adapters_is_not_above_the_formulas(
    world: TrainingData,
    peaks: dict[tuple[str, float, bool], int],
    dtype: torch.dtype,
    dropout: float,
    checkpointing: bool,
) -> None:
    """Frozen norms and matrices keep less than formulas say, which are of trained ones."""
    policy, lora = (
        PolicyModel.from_pretrained(world.model, dtype, chunk=64),
        LoraConfig(rank=4, dropout=dropout),
    )
    batch = pack_batch(world, policy)
    shape, width = ModelShape.from_hf_config(policy.hf.config), dtype.itemsize
    tokens, sampled = batch.input_ids.numel(), int(batch.mask.sum())
    dropped = tokens * (width + 1) * count_trainable_params(shape, LearnerConfig(lora=lora)).dropout_inputs
    layer = activation_memory.layer_workspace_bytes(
        shape, width, tokens, 0, checkpointing=checkpointing, attention=UNFUSED
    ) + (dropped // shape.text.layers if checkpointing else 0)
    logits = activation_memory.logits_workspace_bytes(shape.text, width, sampled, 64, head_trained=False)
    kept = expected_of(policy, batch, checkpointing=checkpointing, frozen=True)
    expected = kept + (0 if checkpointing else dropped) + max(layer, logits)
    found = peaks[str(dtype).removeprefix("torch."), dropout, checkpointing]
    assert 1 <= expected / found <= 1.3, expected / found
