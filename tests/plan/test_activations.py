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

from tests.learner.worlds import World
from tests.plan.making import Live, batch_of, wide_world
from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.learner.logprobs import TokenLogprobs
from vz_ray.learner.model import Policy, load_pretrained
from vz_ray.plan import activations
from vz_ray.plan.activations import Attention
from vz_ray.plan.shape import ModelShape, TextShape
from vz_ray.plan.trained import trained_of

TOLERANCE = 0.05
UNFUSED = Attention(fused=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return wide_world(tmp_path_factory.mktemp("model"))


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


def expected_of(policy: Policy, batch: Any, *, checkpointing: bool, frozen: bool) -> int:
    shape, width = ModelShape.of_config(policy.hf.config), policy.hf.dtype.itemsize
    tokens, patches, sampled = batch.input_ids.numel(), len(batch.pixel_values), int(batch.mask.sum())
    kept = activations.text_kept(
        shape.text, width, tokens, checkpointing=checkpointing, attention=UNFUSED
    ) + activations.head_kept(shape.text, width, sampled)
    if frozen:
        return kept
    return kept + activations.vision_kept(shape.vision, width, patches, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lives_after_a_policys_forward_pass_is_what_the_formulas_say(
    world: World, dtype: torch.dtype, frozen: bool, checkpointing: bool
) -> None:
    policy = Policy.load(world.model, dtype, chunk=64).train()
    policy.hf.model.visual.requires_grad_(not frozen)
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(world, policy)
    with Live() as live:
        result = policy(batch)
        found = live.now()
    del result
    expected = expected_of(policy, batch, checkpointing=checkpointing, frozen=frozen)
    if dtype == torch.float32 and not frozen:
        # Pixels are read as they come, and were there before.
        expected -= batch.pixel_values.nbytes
    assert expected == pytest.approx(found, rel=TOLERANCE), expected / found


@pytest.mark.parametrize("frozen", [False, True])
def test_autograd_saves_what_the_formulas_say(world: World, frozen: bool) -> None:
    policy = Policy.load(world.model, torch.float32, chunk=64).train()
    policy.hf.model.visual.requires_grad_(not frozen)
    batch = batch_of(world, policy)
    found = saved_bytes(policy, lambda: policy(batch))
    expected = expected_of(policy, batch, checkpointing=False, frozen=frozen)
    assert expected == pytest.approx(found, rel=TOLERANCE), expected / found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_attention_keeps_what_the_formula_says(world: World, dtype: torch.dtype) -> None:
    hf = load_pretrained(world.model, dtype)
    text, shape = hf.model.language_model.train(), ModelShape.of_config(hf.config).text
    tokens = 512
    states = torch.randn(1, tokens, shape.hidden, dtype=dtype)
    places = torch.arange(tokens).expand(3, 1, -1)
    mask = {"full_attention": None}
    found = saved_bytes(
        text,
        lambda: text(inputs_embeds=states, position_ids=places, attention_mask=mask, use_cache=False),
    )
    expected = activations.text_kept(shape, dtype.itemsize, tokens, checkpointing=False)
    assert expected == pytest.approx(found, rel=TOLERANCE), expected / found


@pytest.mark.parametrize("rows", [40, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_work_with_what_the_formula_says(dtype: torch.dtype, rows: int) -> None:
    """Less than a chunk, one, and several."""
    hidden, vocab, chunk = 64, 2048, 64
    text = TextShape(hidden, 1, 1, 1, 1, vocab, tied=False)
    states = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    banned = torch.zeros(vocab, dtype=torch.bool)
    banned[:3] = True
    targets, temperature = torch.randint(3, vocab, (rows,)), torch.ones(rows)
    with Live() as live:
        logprobs, entropy = TokenLogprobs.apply(states, weight, targets, temperature, banned, chunk)
        (logprobs.sum() + entropy.sum()).backward()
    expected = activations.logits_at_work(text, dtype.itemsize, rows, chunk)
    assert expected == pytest.approx(live.peak, rel=TOLERANCE), expected / live.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_pass_is_no_further_off_than_a_fifth(
    world: World, dtype: torch.dtype, checkpointing: bool
) -> None:
    """What is kept, what a layer or the logits work with, and gradients."""
    policy = Policy.load(world.model, dtype, chunk=64).train()
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(world, policy)
    shape, width = ModelShape.of_config(policy.hf.config), dtype.itemsize
    tokens, patches, sampled = batch.input_ids.numel(), len(batch.pixel_values), int(batch.mask.sum())
    with Live() as live:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + entropy.sum()).backward()
    layer = activations.layer_at_work(
        shape, width, tokens, patches, checkpointing=checkpointing, attention=UNFUSED
    )
    logits = activations.logits_at_work(shape.text, width, sampled, 64)
    kept = expected_of(policy, batch, checkpointing=checkpointing, frozen=False)
    if dtype == torch.float32:
        kept -= batch.pixel_values.nbytes
    expected = kept + max(layer, logits)
    assert expected == pytest.approx(live.peak, rel=0.2), (expected / live.peak, kept, layer, logits)


@pytest.fixture(scope="module")
def peaks(world: World) -> dict[tuple[str, float, bool], int]:
    """Of passes with adapters, by dtype, dropout, and whether activations are computed again."""
    command = [sys.executable, "-m", "tests.plan.adapter_peaks", str(world.model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(case): found for *case, found in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_with_adapters_is_not_above_the_formulas(
    world: World,
    peaks: dict[tuple[str, float, bool], int],
    dtype: torch.dtype,
    dropout: float,
    checkpointing: bool,
) -> None:
    """Frozen norms and matrices keep less than formulas say, which are of trained ones."""
    policy, lora = Policy.load(world.model, dtype, chunk=64), LoraConfig(rank=4, dropout=dropout)
    batch = batch_of(world, policy)
    shape, width = ModelShape.of_config(policy.hf.config), dtype.itemsize
    tokens, sampled = batch.input_ids.numel(), int(batch.mask.sum())
    dropped = tokens * (width + 1) * trained_of(shape, LearnerConfig(lora=lora)).dropped
    layer = activations.layer_at_work(
        shape, width, tokens, 0, checkpointing=checkpointing, attention=UNFUSED
    ) + (dropped // shape.text.layers if checkpointing else 0)
    logits = activations.logits_at_work(shape.text, width, sampled, 64, trained=False)
    kept = expected_of(policy, batch, checkpointing=checkpointing, frozen=True)
    expected = kept + (0 if checkpointing else dropped) + max(layer, logits)
    found = peaks[str(dtype).removeprefix("torch."), dropout, checkpointing]
    assert 1 <= expected / found <= 1.3, expected / found
