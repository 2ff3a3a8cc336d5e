"""Plans of the shipped recipes, and verification of the advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import run_command
from vz_ray.config import load_config
from vz_ray.config.learner import LoraConfig
from vz_ray.config.load import ConfigError
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.families import load_model_shape
from vz_ray.planning.advice import MemoryAdvice, advise
from vz_ray.planning.gpu_memory import GIB, MemoryFootprint, MemoryItem, MemoryPhase, parse_bytes
from vz_ray.planning.planner import (
    Assumptions,
    PlannableConfig,
    ResourcePlan,
    load_plannable_config,
    make_plan,
)
from vz_ray.planning.published_weights import check_published_adapters, published_bytes
from vz_ray.utils.errors import UserError

RL, SFT, TINY = (
    Path("conf/videozoomer-7b-rl-split.yaml"),
    Path("conf/videozoomer-7b-sft.yaml"),
    Path("conf/laptop.yaml"),
)
MODEL = "model=Qwen2.5-VL-7B"


def make_test_plan(
    path: Path, *overrides: str, gib: float = 80, model: str = MODEL
) -> tuple[PlannableConfig, ResourcePlan, list[MemoryAdvice]]:
    config, assumed = load_plannable_config(path, [model, *overrides]), Assumptions(int(gib * GIB))
    plan = make_plan(config, assumed)
    return config, plan, advise(config, plan, assumed)


def item_bytes(footprint: MemoryFootprint, name: str) -> int:
    return sum(item.bytes for item in footprint.items if item.name == name)


@pytest.mark.parametrize(("path", "schema"), [(RL, GrpoRunConfig), (SFT, SftRunConfig), (TINY, GrpoRunConfig)])
def test_config_schema_follows_its_keys(
    path: Path, schema: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert type(load_plannable_config(path, [])) is schema
    monkeypatch.chdir(tmp_path)
    assert type(load_plannable_config(path, [])) is schema, "the shipped file"


def test_unknown_key_raises() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        load_plannable_config(RL, ["learner.gradient_checkpoint=true"])


def test_paper_recipes_fit_80_gib() -> None:
    for path in (RL, SFT):
        _, plan, advice = make_test_plan(path)
        assert plan.fits
        assert plan.learner.fits
        assert not advice
    assert plan.engine is None


def test_states_take_18_bytes_per_weight_plus_reference() -> None:
    _, plan, _ = make_test_plan(RL)
    always = {item.name: item.bytes for item in plan.learner.items if item.phase is MemoryPhase.ALWAYS}
    names = ("weights", "master weights, float32", "optimizer moments, float32", "gradients, float32")
    shares = {2: "weights", 4: "master weights, float32", 8: "optimizer moments, float32"}
    for size, name in shares.items():
        assert always[name] == size * plan.shape.parameters // 8
    # Gradients accumulate in float32: four bytes instead of two.
    assert sum(always[name] for name in names) == 18 * plan.shape.parameters // 8
    assert always["reference model"] == 2 * plan.shape.parameters // 8


@pytest.mark.parametrize(
    ("stage", "unpartitioned"),
    [
        (1, {"weights": 2, "gradients, float32": 4}),
        (2, {"weights": 2}),
        (3, {}),
    ],
)
def test_zero_stage_partitions_states(stage: int, unpartitioned: dict[str, int]) -> None:
    _, plan, _ = make_test_plan(RL, f"learner.zero_stage={stage}")
    size = plan.shape.parameters
    for name, width in {"weights": 2, "gradients, float32": 4, "master weights, float32": 4}.items():
        assert item_bytes(plan.learner, name) == width * size // (1 if name in unpartitioned else 8)


def test_frozen_weights_have_no_optimizer_state() -> None:
    _, plan, _ = make_test_plan(SFT)
    text = plan.shape.text.parameters
    assert plan.trainable_params == text
    assert item_bytes(plan.learner, "optimizer moments, float32") == text
    assert item_bytes(plan.learner, "frozen weights") == 2 * plan.shape.vision.parameters // 8


def test_offloaded_optimizer_is_in_host_memory() -> None:
    _, plan, _ = make_test_plan(RL, "learner.offload=optimizer", "learner.world_size=1", "learner.frame_cache_mib=2048")
    names = {item.name for item in plan.learner.items}
    assert not names & {"master weights, float32", "optimizer moments, float32", "gradients, float32"}
    caches = (2048 + 4096) * 2**20
    snapshot = 12 * plan.shape.parameters  # several updates in a step
    assert plan.host_bytes == 20 * plan.shape.parameters + caches + snapshot
    # With more ranks, loading two full models takes more than a shard of the optimizer.
    _, plan, _ = make_test_plan(RL, "learner.offload=optimizer", "learner.frame_cache_mib=2048")
    assert plan.host_bytes == 2 * 2 * plan.shape.parameters + caches + snapshot // 8


@pytest.mark.parametrize("ranks", [1, 8])
def test_offload_all_keeps_only_gathered_weights(ranks: int) -> None:
    settings = (f"learner.world_size={ranks}", "learner.micro_batch_tokens=32768")
    _, optimizer, _ = make_test_plan(RL, "learner.offload=optimizer", *settings)
    _, everything, _ = make_test_plan(RL, "learner.offload=all", *settings)
    weight_items = {"weights", "reference model", "gathered weights"}
    assert {item.name for item in everything.learner.items} & weight_items == {"gathered weights"}
    assert item_bytes(everything.learner, "gathered weights") == 2 * 10**9
    assert everything.learner.peak_bytes < optimizer.learner.peak_bytes
    # Policy and reference model.
    assert everything.host_bytes - optimizer.host_bytes == 2 * (2 * optimizer.shape.parameters // ranks)


def test_offload_none_is_the_default() -> None:
    _, explicit, _ = make_test_plan(RL, "learner.offload=none")
    _, default, _ = make_test_plan(RL)
    assert explicit == default
    assert item_bytes(default.learner, "optimizer moments, float32") == default.shape.parameters


LORA = ("learner.lora.rank=16",)


def test_lora_has_optimizer_states_for_adapters_only() -> None:
    _, full, _ = make_test_plan(RL)
    _, plan, _ = make_test_plan(RL, *LORA)
    text = plan.shape.text
    adapter_sizes = 4 * text.hidden + 2 * (text.hidden + text.kv_dim) + 3 * (text.hidden + text.intermediate)
    assert plan.trainable_params == 16 * text.layers * adapter_sizes
    always = {item.name: item.bytes for item in plan.learner.items if item.phase is MemoryPhase.ALWAYS}
    assert always["weights"] == 2 * plan.trainable_params // 8
    assert always["frozen weights"] == 2 * plan.shape.parameters // 8
    assert always["optimizer moments, float32"] == 8 * plan.trainable_params // 8
    assert always["gradients, float32"] == 4 * plan.trainable_params // 8
    unreduced = item_bytes(plan.learner, "gradients before reduction")
    assert unreduced == 2 * 16 * text.intermediate
    assert plan.learner.peak_bytes < full.learner.peak_bytes
    # The tower is frozen, and the text matrices have no weight gradients.
    assert plan.unpacked_work.model_flops < 0.8 * full.unpacked_work.model_flops


@pytest.mark.parametrize(
    ("settings", "has_reference"),
    [((), False), (("learner.lora.train_merger=true",), True), (("learner.reference_model=other",), True)],
)
def test_lora_needs_no_separate_reference(settings: tuple[str, ...], has_reference: bool) -> None:
    _, plan, _ = make_test_plan(RL, *LORA, *settings)
    assert bool(item_bytes(plan.learner, "reference model")) is has_reference
    # The reference pass runs in any case.
    assert plan.passes.forward_only == 2


def test_reference_equal_to_model_is_not_held_twice() -> None:
    _, plan, _ = make_test_plan(RL, *LORA, f"learner.reference_model={MODEL.removeprefix('model=')}")
    assert not item_bytes(plan.learner, "reference model")


def test_adapter_dropout_increases_peak() -> None:
    for checkpointing in ("true", "false"):
        settings = (*LORA, f"learner.gradient_checkpointing={checkpointing}")
        _, without, _ = make_test_plan(RL, *settings)
        _, with_dropout, _ = make_test_plan(RL, *settings, "learner.lora.dropout=0.1")
        assert with_dropout.learner.peak_bytes > without.learner.peak_bytes


def test_published_adapters_outside_the_language_model_raise() -> None:
    target = r"learner.lora.target_modules=['attn\.qkv', 'v_proj']"
    make_test_plan(RL, *LORA, target)
    with pytest.raises(UserError, match=r"target_modules match model\.visual\.blocks\.\*\.attn\.qkv; .*publish=merged"):
        make_test_plan(RL, *LORA, target, "learner.lora.publish=adapters")


def test_published_adapters_of_a_model_with_experts_raise() -> None:
    lora = LoraConfig(rank=8, target_modules=["q_proj"], publishes_adapters=True)
    shape = load_model_shape("Qwen3-VL-30B-A3B")
    with pytest.raises(UserError, match=r"qwen3_vl_moe\) has experts, .* learner\.lora\.publish=merged"):
        check_published_adapters(shape, lora)
    check_published_adapters(shape, replace(lora, publishes_adapters=False))


def test_engine_has_a_slot_for_the_adapter_and_receives_its_bytes() -> None:
    settings = (RL, "learner.lora.rank=33", "train.colocate=false", "weights.transport=shm")
    _, merged, _ = make_test_plan(*settings, "learner.lora.publish=merged")
    config, plan, _ = make_test_plan(*settings)
    assert isinstance(config, GrpoRunConfig)
    assert plan.engine is not None
    assert merged.engine is not None
    assert item_bytes(plan.engine.footprint, "adapter") == 2 * plan.trainable_params * 64 // 33
    assert item_bytes(merged.engine.footprint, "adapter") == 0
    assert published_bytes(plan.shape, config.learner) == 2 * plan.trainable_params
    merged_config = replace(config, learner=replace(config.learner, lora=LoraConfig(rank=33, publish="merged")))
    assert published_bytes(plan.shape, merged_config.learner) == 2 * plan.shape.parameters


def test_lora_target_without_layer_raises() -> None:
    with pytest.raises(UserError, match=r"learner\.lora\.target_modules has 'x_proj'"):
        make_test_plan(RL, *LORA, "learner.lora.target_modules=[x_proj]")


def test_advice_offers_optimizer_offload_then_all() -> None:
    _, _, (learner,) = make_test_plan(RL, gib=40)
    settings = [setting for change in learner.single_changes for setting in change.settings]
    offload = [setting for setting in settings if "offload" in setting]
    assert offload == ["learner.offload=optimizer", "learner.offload=all"]
    _, plan, advice = make_test_plan(RL, "learner.offload=all", gib=20)
    assert not plan.learner.fits
    changes = [change for component in advice for change in component.single_changes]
    assert not any("offload" in setting for change in changes for setting in change.settings)


@pytest.mark.parametrize(
    ("setting", "grows"),
    [
        ("learner.gradient_checkpointing=false", True),
        ("learner.micro_batch_tokens=65536", True),
        ("learner.world_size=4", True),
        ("learner.loss.kl_coef=0", False),
        ("learner.freeze_vision=true", False),
        ("learner.world_size=16", False),
    ],
)
def test_setting_changes_peak(setting: str, grows: bool) -> None:
    _, before, _ = make_test_plan(RL)
    _, after, _ = make_test_plan(RL, setting)
    assert (after.learner.peak_bytes > before.learner.peak_bytes) is grows
    assert after.learner.peak_bytes != before.learner.peak_bytes


def test_footprint_peak_is_the_worst_phase() -> None:
    items = (
        MemoryItem("a", 10),
        MemoryItem("b", 5, phase=MemoryPhase.FORWARD_BACKWARD),
        MemoryItem("c", 7, phase=MemoryPhase.OPTIMIZER_STEP),
        MemoryItem("d", 16, phase=MemoryPhase.LOADING),
    )
    footprint = MemoryFootprint("learner", 1, 16, items)
    assert (footprint.peak_phase, footprint.peak_bytes, footprint.bytes_over, footprint.fits) == (
        MemoryPhase.OPTIMIZER_STEP,
        17,
        1,
        False,
    )


CASES: list[tuple[Path, tuple[str, ...], float]] = [
    (RL, ("learner.gradient_checkpointing=false",), 80),
    (RL, (), 40),
    (RL, ("learner.zero_stage=1", "learner.micro_batch_tokens=131072"), 80),
    (SFT, ("learner.world_size=2",), 48),
    (SFT, ("learner.freeze_vision=false",), 24),
    (RL, ("learner.offload=optimizer",), 36),
    (RL, (*LORA, "learner.micro_batch_tokens=131072"), 40),
]


@pytest.mark.parametrize(("path", "overrides", "gib"), CASES)
def test_advice_matches_replanned_config(path: Path, overrides: tuple[str, ...], gib: float) -> None:
    """Each change as a command-line override gives the reported bytes."""
    _, plan, advice = make_test_plan(path, *overrides, gib=gib)
    assert not plan.fits
    assert {component.component for component in advice} >= {"learner"}
    for component in advice:
        combined = component.combined_change
        changes = [*component.single_changes, *([combined] if combined else [])]
        assert changes
        for change in changes:
            _, after, _ = make_test_plan(path, *overrides, *change.settings, gib=gib)
            over = after.learner_bytes_over if component.component == "learner" else after.engine_bytes_over
            assert over == change.bytes_over_after < change.bytes_over_before
        if combined:
            assert combined.bytes_over_after <= 0


def test_combined_advice_is_minimal() -> None:
    _, _, advice = make_test_plan(RL, "learner.gradient_checkpointing=false")
    (learner,) = advice
    assert learner.combined_change is not None
    for omitted in learner.combined_change.settings:
        others = [setting for setting in learner.combined_change.settings if setting != omitted]
        _, after, _ = make_test_plan(RL, "learner.gradient_checkpointing=false", *others)
        assert after.learner_bytes_over > 0


LONG = ("episode.max_context=131072", "learner.micro_batch_tokens=131072")
TILES = "learner.mlp_tile_tokens=8192"


def test_tiles_of_mlps_are_recommended_where_they_lower_the_peak() -> None:
    _, _, (learner, *_) = make_test_plan(RL, *LONG)
    (tiles,) = (change for change in learner.single_changes if change.settings == (TILES,))
    assert tiles.bytes_saved > 10 * GIB
    one_tile = ("episode.max_context=16384", "learner.micro_batch_tokens=16384", "learner.sequence_parallel_size=2")
    for overrides, gib in (((TILES, *LONG), 80), (one_tile, 20)):
        _, plan, (learner, *_) = make_test_plan(RL, *overrides, gib=gib)
        assert not plan.fits
        assert TILES not in [setting for change in learner.single_changes for setting in change.settings]


def test_tiles_cost_flops_only_without_gradient_checkpointing() -> None:
    for checkpointing in (True, False):
        setting = f"learner.gradient_checkpointing={str(checkpointing).lower()}"
        _, whole, _ = make_test_plan(RL, setting)
        _, tiled, _ = make_test_plan(RL, setting, TILES)
        assert tiled.learner.peak_bytes < whole.learner.peak_bytes
        ratio = tiled.unpacked_work.executed_flops / whole.unpacked_work.executed_flops
        if checkpointing:
            assert ratio == 1
        else:
            # An update has three forward passes' FLOPs; the MLPs have 78 % of the matrices of Qwen2.5-VL-7B.
            assert 1.1 < ratio < 1.26
        assert tiled.unpacked_work.model_flops == whole.unpacked_work.model_flops


def test_advice_makes_engine_start() -> None:
    _, plan, advice = make_test_plan(RL, gib=22)
    assert plan.engine is not None
    assert not plan.engine.can_start
    engine = next(component for component in advice if component.component == "engine")
    assert engine.combined_change is not None
    _, after, _ = make_test_plan(RL, *engine.combined_change.settings, gib=22)
    assert after.engine is not None
    assert after.engine.can_start


def test_ipc_shares_one_gpu() -> None:
    overrides = (
        "weights.transport=ipc",
        "learner.world_size=1",
        "learner.zero_stage=2",
        "rollout.num_workers=1",
    )
    _, plan, _ = make_test_plan(RL, *overrides, model="model=Qwen2.5-VL-3B")
    assert plan.shared_gpu is not None
    assert plan.engine is not None
    peak_bytes = plan.learner.peak_bytes + plan.engine.footprint.peak_bytes
    assert plan.shared_gpu.peak_bytes == peak_bytes
    assert plan.learner_bytes_over == peak_bytes - 80 * GIB


def test_tiny_recipe_is_float32() -> None:
    _, plan, _ = make_test_plan(TINY, model="model=assets/tiny-base")
    assert plan.weight_bytes == 4
    assert plan.fits
    assert any("zero_stage 0" in note for note in plan.notes)
    with pytest.raises(UserError, match="zero_stage"):
        make_test_plan(TINY, "learner.dtype=bfloat16", model="model=assets/tiny-base")


def test_passes_follow_the_config() -> None:
    _, plan, _ = make_test_plan(RL)
    # Four mini-batches: a forward pass for old log-probs and one for the reference model.
    assert (plan.passes.updates, plan.passes.forward_only) == (1, 2)
    _, single, _ = make_test_plan(RL, "learner.mini_batch_size=128", "learner.loss.kl_coef=0")
    assert (single.passes.updates, single.passes.forward_only) == (1, 0)
    _, engine, _ = make_test_plan(RL, "learner.old_logprobs=engine", "learner.epochs=2")
    assert (engine.passes.updates, engine.passes.forward_only) == (2, 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("80 GB", 80 * 10**9), ("24576MiB", 24 << 30), ("1.5gib", 3 << 29)],
)
def test_parse_bytes_accepts_common_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80TiBs", "1.2.3GB", "-4GB", "0GB"])
def test_parse_bytes_rejects_other_formats(text: str) -> None:
    with pytest.raises(UserError, match="80GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "values", [{"mfu": 0.0}, {"mfu": 1.1}, {"peak_tflops": 0.0}, {"zooms": -1}, {"turn_tokens": 0}]
)
def test_invalid_assumptions_raise(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(values)).replace("_", "-")):
        Assumptions(**values)


def test_command_prints_results_and_assumptions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "plan", str(RL), MODEL) == 0
    output = capsys.readouterr().out
    for text in (
        "8,292,166,656 parameters",
        "learner: fits",
        "engine: fits",
        "Assumed, not measured: 0.35 of 989",
    ):
        assert text in output
    assert run_command(monkeypatch, "plan", str(RL), MODEL, "--gpu-memory", "22GiB") == 1
    output = capsys.readouterr().out
    for text in (
        "learner: does not fit",
        "engine: does not start",
        "Changes for the learner",
        "Changes for the engine",
    ):
        assert text in output


def test_command_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [MODEL, "learner.world_size=2"]
    assert run_command(monkeypatch, "plan", str(SFT), *overrides, "--gpu-memory", "24GB", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    plan = make_plan(load_plannable_config(SFT, overrides), Assumptions(24 * 10**9))
    assert report["parameters"] == plan.shape.parameters
    assert report["fits"] is False
    assert report["memory"][0]["peak_bytes"] == plan.learner.peak_bytes
    assert report["unpacked_work"]["executed_flops"] == plan.unpacked_work.executed_flops
    assert report["advice"][0]["single_changes"]
    assert report["steps"] is None
    assert [timeout["key"] for timeout in report["timeouts"]] == ["learner_call_s"]


def test_command_prints_step_times_timeouts_and_warnings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    check_file = tmp_path / "gpu-check.json"
    check_file.write_text("{}")
    assert run_command(monkeypatch, "plan", str(RL), MODEL, "--gpu-check", str(check_file), "--gpu", "A100") == 0
    output = " ".join(capsys.readouterr().out.split())
    for text in (
        "Step time on 16 GPUs",
        "Recommended: colocated, 16 engines and 16 ranks",
        "timeouts.turn_s",
        "Figures: A100-80GB; `vz-ray doctor --gpu` measures it",
        "assumed",
        "gpu-check.json is ignored: it has no valid figures",
    ):
        assert text in output
    assert run_command(monkeypatch, "plan", str(RL), MODEL, "--gpu-check", str(tmp_path / "none.json")) == 2
    assert "none.json, which is not a file" in capsys.readouterr().err
    assert run_command(monkeypatch, "plan", str(RL), MODEL, "--gpu", "H1000") == 2
    assert "--gpu is 'H1000'; known are" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(MODEL,), (str(RL), str(SFT))])
def test_command_requires_one_config_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run_command(monkeypatch, "plan", *arguments) == 2
    assert "config files" in capsys.readouterr().err


def test_plan_of_a_copied_config_is_equal() -> None:
    config = load_config(GrpoRunConfig, RL, [MODEL])
    assert make_plan(config, Assumptions()) == make_plan(replace(config), Assumptions())
