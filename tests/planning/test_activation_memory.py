"""Activation formulas against the live tensors of a real packed model on the CPU.

The formulas omit index tables, positions and masks. FlashAttention cannot run on the CPU; its formula is
checked with the CPU's fused attention, which saves the same tensors (unrepeated queries, keys and values,
the output, log-sum-exps).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.families.hf_configs import hf_config
from tests.planning.pass_memory import (
    MODEL_TYPES,
    WIDE_SHAPES,
    LiveTensors,
    chunk_padding,
    pack_batch,
    peak_bytes,
    wide_policy,
)
from tests.planning.peak_memory import measure_in_subprocess
from vz_ray.config.learner import LearnerConfig, LoraConfig
from vz_ray.families import TextShape
from vz_ray.learner.logprobs import TokenLogprobs
from vz_ray.learner.policy_model import PolicyModel
from vz_ray.planning import activation_memory
from vz_ray.planning.activation_memory import AttentionMemory
from vz_ray.planning.layer_workspace import layer_workspace_bytes
from vz_ray.planning.learner_activations import WorstCaseBatch, activation_items
from vz_ray.planning.trainable_params import count_trainable_params

pytestmark = pytest.mark.integration

TOLERANCE = 0.05
PEAK_TOLERANCE = {"cpu": 0.1, "cuda": 0.2}


def unfused(batch: Any) -> AttentionMemory:
    return AttentionMemory(fused=False, chunk_padding=chunk_padding(batch))


def saved_bytes(module: Any, call: Callable[[], Any]) -> int:
    """Return the bytes of distinct storages that autograd saves, excluding weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Keep a reference, so that the address is not reused.
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in saved.values())


def expected_saved_bytes(
    policy: PolicyModel,
    batch: Any,
    *,
    checkpointing: bool,
    frozen: bool,
    attention: AttentionMemory | None = None,
) -> int:
    shape, width = policy.shape, policy.hf.dtype.itemsize
    tokens, patches, sampled = batch.input_ids.numel(), len(batch.pixel_values), int(batch.mask.sum())
    saved = activation_memory.text_saved_bytes(
        shape.text, width, tokens, checkpointing=checkpointing, attention=attention or unfused(batch)
    ) + activation_memory.head_saved_bytes(shape.text, width, sampled)
    if frozen:
        return saved
    return saved + activation_memory.vision_saved_bytes(shape.vision, width, patches, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_live_bytes_after_forward_match_formulas(
    family: str, dtype: torch.dtype, frozen: bool, checkpointing: bool
) -> None:
    policy = wide_policy(family, dtype)
    policy.hf.model.visual.requires_grad_(not frozen)
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pack_batch(policy, samples=2, overview=6, clip=4)
    with LiveTensors() as live:
        result = policy(batch)
        live_bytes = live.now()
    del result
    expected = expected_saved_bytes(policy, batch, checkpointing=checkpointing, frozen=frozen)
    assert expected == pytest.approx(live_bytes, rel=TOLERANCE), expected / live_bytes


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_autograd_saved_bytes_match_formulas(family: str, frozen: bool) -> None:
    policy = wide_policy(family, torch.float32)
    policy.hf.model.visual.requires_grad_(not frozen)
    batch = pack_batch(policy, samples=2, overview=6, clip=4)
    saved = saved_bytes(policy, lambda: policy(batch))
    expected = expected_saved_bytes(policy, batch, checkpointing=False, frozen=frozen)
    if not frozen:
        # Float32 pixels are used without a copy.
        expected += batch.pixel_values.nbytes
    assert expected == pytest.approx(saved, rel=TOLERANCE), expected / saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [name for name, shape in WIDE_SHAPES.items() if not shape.text.linear])
def test_fused_attention_saved_bytes_match_formula(family: str, dtype: torch.dtype) -> None:
    shape = WIDE_SHAPES[family].text
    config = hf_config(WIDE_SHAPES[family])
    hf = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    text = hf.model.language_model.train()
    # HF prepares no mask for an attention function that it does not know; this one is then causal.
    AttentionInterface.register("causal", sdpa_attention_forward)
    text.config._attn_implementation = "causal"
    tokens = 512
    states = torch.randn(1, tokens, shape.hidden, dtype=dtype)
    positions = torch.arange(tokens).expand(3, 1, -1)
    mask = {"full_attention": None}
    saved = saved_bytes(
        text,
        lambda: text(inputs_embeds=states, position_ids=positions, attention_mask=mask, use_cache=False),
    )
    expected = activation_memory.text_saved_bytes(shape, dtype.itemsize, tokens, checkpointing=False)
    assert expected == pytest.approx(saved, rel=TOLERANCE), expected / saved


@pytest.mark.parametrize("num_chunks", [0.625, 1, 3.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprob_workspace_matches_formula(
    device: torch.device, dtype: torch.dtype, num_chunks: float, record_property: Callable[[str, object], None]
) -> None:
    """On a GPU with the shapes of a 7B model."""
    hidden, vocab, chunk = (64, 2048, 64) if device.type == "cpu" else (3584, 152_064, 256)
    rows = int(num_chunks * chunk)
    text = TextShape(hidden, 1, 1, 1, hidden, 1, vocab, tie_word_embeddings=False)
    states, weight = (torch.randn(n, hidden, dtype=dtype, device=device).requires_grad_() for n in (rows, vocab))
    banned = torch.zeros(vocab, dtype=torch.bool, device=device)
    banned[:3] = True
    targets, temperature = torch.randint(3, vocab, (rows,), device=device), torch.ones(rows, device=device)

    def run() -> None:
        logprobs, entropy = TokenLogprobs.apply(states, weight, targets, temperature, banned, chunk)
        (logprobs.sum() + entropy.sum()).backward()

    peak = peak_bytes(device, run)
    expected = activation_memory.logits_workspace_bytes(text, dtype.itemsize, rows, chunk)
    record_property("planned_to_measured", expected / peak)
    assert expected == pytest.approx(peak, rel=TOLERANCE), expected / peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_peak_of_a_pass_is_within_tolerance(
    device: torch.device,
    family: str,
    dtype: torch.dtype,
    checkpointing: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """The peak holds saved activations, the workspace of a layer or the logits, and gradients."""
    if device.type == "cuda" and dtype is torch.float32:
        pytest.skip("on a GPU, attention without FlashAttention has its own formula")
    policy = wide_policy(family, dtype).to(device)
    if checkpointing:
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pack_batch(policy)
    shape, width = policy.shape, dtype.itemsize
    tokens, patches, sampled = batch.input_ids.numel(), len(batch.pixel_values), int(batch.mask.sum())
    gathered_keys = int(batch.layout.cu_seqlens_k[-1]) / tokens
    attention = unfused(batch) if device.type == "cpu" else AttentionMemory(gathered_keys=gathered_keys)

    def run() -> None:
        logprobs, entropy = policy(batch)
        (logprobs.sum() + entropy.sum()).backward()

    if device.type == "cuda":
        run()  # loads the kernels and their workspaces
        policy.zero_grad(set_to_none=True)
    peak = peak_bytes(device, run)
    learner = LearnerConfig(gradient_checkpointing=checkpointing, logprob_chunk_tokens=64)
    worst_case = WorstCaseBatch(tokens, patches, sampled, attention_pairs=0, gathered_keys=gathered_keys)
    params = count_trainable_params(shape, learner)
    items = activation_items(shape, learner, params, worst_case, width, attention)
    # The pixels existed before.
    expected = sum(item.bytes for item in items) - batch.pixel_values.nbytes
    record_property("planned_to_measured", expected / peak)
    assert expected == pytest.approx(peak, rel=PEAK_TOLERANCE[device.type]), (expected / peak, items)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_peaks_with_slices_tiles_and_two_ranks_match_the_planner(family: str) -> None:
    """All items of the planner, with and without slices of the tower, tiles of the MLPs and shared sequences."""
    results = measure_in_subprocess(family)
    assert {(bool(r.slice_patches), bool(r.tile_tokens), r.ranks) for r in results} >= {
        *((slices, tiles, 1) for slices in (False, True) for tiles in (False, True)),
        (False, False, 2),
        (True, True, 2),
    }
    for result in results:
        assert result.ratio == pytest.approx(1, abs=0.1), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_frozen_tower_workspace_matches_formula(family: str, dtype: torch.dtype) -> None:
    policy = wide_policy(family, dtype)
    policy.hf.model.visual.requires_grad_(False)
    batch = pack_batch(policy, samples=1, overview=4, clip=1)
    patches, width, vision = len(batch.pixel_values), dtype.itemsize, policy.shape.vision
    peak = peak_bytes(torch.device("cpu"), lambda: policy.image_features(batch))
    copy = 0 if dtype is torch.float32 else width * patches * vision.patch_elements
    expected = activation_memory.frozen_tower_bytes(vision, width, patches) + copy
    assert expected == pytest.approx(peak, rel=TOLERANCE), expected / peak


@pytest.fixture(scope="module", params=MODEL_TYPES)
def peaks(request: pytest.FixtureRequest) -> tuple[str, dict[tuple[str, float, bool], int]]:
    """Family, and peak bytes of passes with adapters, by dtype, dropout and gradient checkpointing."""
    command = [sys.executable, "-m", "tests.planning.adapter_peak_memory", request.param]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return request.param, {tuple(case): peak for *case, peak in json.loads(process.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_with_adapters_is_below_the_formulas(
    peaks: tuple[str, dict[tuple[str, float, bool], int]], dtype: torch.dtype, dropout: float, checkpointing: bool
) -> None:
    """Frozen norms and matrices save less than the formulas, which assume trained ones."""
    family, measured_peaks = peaks
    policy, lora = wide_policy(family, dtype), LoraConfig(rank=4, dropout=dropout)
    batch = pack_batch(policy)
    shape, width = policy.shape, dtype.itemsize
    tokens, sampled = batch.input_ids.numel(), int(batch.mask.sum())
    dropped = tokens * (width + 1) * count_trainable_params(shape, LearnerConfig(lora=lora)).dropout_inputs
    layer = layer_workspace_bytes(shape.text, width, tokens, checkpointing=checkpointing, attention=unfused(batch)) + (
        dropped // shape.text.layers if checkpointing else 0
    )
    logits = activation_memory.logits_workspace_bytes(shape.text, width, sampled, 64, head_trained=False)
    saved = expected_saved_bytes(policy, batch, checkpointing=checkpointing, frozen=True)
    expected = saved + (0 if checkpointing else dropped) + max(layer, logits)
    measured = measured_peaks[str(dtype).removeprefix("torch."), dropout, checkpointing]
    assert 1 <= expected / measured <= 1.3, expected / measured
