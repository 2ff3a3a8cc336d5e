"""Plans of the recipes that ship with the project, and advice held to what it promises."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vz_ray import cli
from vz_ray.config import load_config
from vz_ray.config.load import ConfigError
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.planning.advice import MemoryAdvice, advise
from vz_ray.planning.gpu_memory import GIB, MemoryFootprint, MemoryItem, MemoryPhase, parse_bytes
from vz_ray.planning.planner import (
    Assumptions,
    PlannableConfig,
    ResourcePlan,
    load_plannable_config,
    make_plan,
)
from vz_ray.utils.errors import UserError

RL, SFT, TINY = (
    Path("conf/videozoomer-7b-rl.yaml"),
    Path("conf/videozoomer-7b-sft.yaml"),
    Path("conf/tiny.yaml"),
)
MODEL = "model=Qwen2.5-VL-7B"


def planned(
    path: Path, *overrides: str, gib: float = 80, model: str = MODEL
) -> tuple[PlannableConfig, ResourcePlan, list[MemoryAdvice]]:
    config, assumed = load_plannable_config(path, [model, *overrides]), Assumptions(int(gib * GIB))
    plan = make_plan(config, assumed)
    return config, plan, advise(config, plan, assumed)


def part(footprint: MemoryFootprint, name: str) -> int:
    return sum(part.bytes for part in footprint.items if part.name == name)


@pytest.mark.parametrize(
    ("path", "schema"), [(RL, GrpoRunConfig), (SFT, SftRunConfig), (TINY, GrpoRunConfig)]
)
def test_a_config_is_read_as_what_it_is(path: Path, schema: type) -> None:
    assert type(load_plannable_config(path, [])) is schema


def test_a_wrong_key_is_named() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        load_plannable_config(RL, ["learner.gradient_checkpoint=true"])


def test_the_papers_recipes_fit_80_gib() -> None:
    for path in (RL, SFT):
        _, plan, advice = planned(path)
        assert plan.fits
        assert plan.learner.fits
        assert not advice
    assert plan.engine is None


def test_states_are_16_bytes_a_weight_and_2_of_the_reference() -> None:
    _, plan, _ = planned(RL)
    always = {p.name: p.bytes for p in plan.learner.items if p.phase is MemoryPhase.ALWAYS}
    names = ("weights", "master weights, float32", "two moments, float32", "gradients, float32")
    shares = {2: "weights", 4: "master weights, float32", 8: "two moments, float32"}
    for size, name in shares.items():
        assert always[name] == size * plan.shape.parameters // 8
    # Gradients add up in float32: four bytes where bfloat16 would be two.
    assert sum(always[name] for name in names) == 18 * plan.shape.parameters // 8
    assert always["reference model"] == 2 * plan.shape.parameters // 8


@pytest.mark.parametrize(
    ("stage", "whole"),
    [
        (1, {"weights": 2, "gradients, float32": 4}),
        (2, {"weights": 2}),
        (3, {}),
    ],
)
def test_a_stage_shards_what_it_says(stage: int, whole: dict[str, int]) -> None:
    _, plan, _ = planned(RL, f"learner.zero_stage={stage}")
    size = plan.shape.parameters
    for name, width in {"weights": 2, "gradients, float32": 4, "master weights, float32": 4}.items():
        assert part(plan.learner, name) == width * size // (1 if name in whole else 8)


def test_what_is_frozen_has_no_gradient_and_no_optimizer() -> None:
    _, plan, _ = planned(SFT)
    text = plan.shape.text.parameters
    assert plan.trainable_params == text
    assert part(plan.learner, "two moments, float32") == text
    assert part(plan.learner, "frozen weights") == 2 * plan.shape.vision.parameters // 8


def test_offloading_leaves_weights_alone_on_the_gpu() -> None:
    _, plan, _ = planned(RL, "learner.offload=optimizer", "learner.world_size=1")
    names = {p.name for p in plan.learner.items}
    assert not names & {"master weights, float32", "two moments, float32", "gradients, float32"}
    caches = (2048 + 4096) * 2**20
    assert plan.host_bytes == 20 * plan.shape.parameters + caches
    # Over more ranks the whole models that each reads are more than its share of the optimizer.
    _, plan, _ = planned(RL, "learner.offload=optimizer")
    assert plan.host_bytes == 2 * 2 * plan.shape.parameters + caches


@pytest.mark.parametrize("ranks", [1, 8])
def test_offloading_all_leaves_what_a_pass_gathers(ranks: int) -> None:
    settings = (f"learner.world_size={ranks}", "learner.micro_batch_tokens=32768")
    _, some, _ = planned(RL, "learner.offload=optimizer", *settings)
    _, all_, _ = planned(RL, "learner.offload=all", *settings)
    held = {"weights", "reference model", "weights gathered for a pass"}
    assert {p.name for p in all_.learner.items} & held == {"weights gathered for a pass"}
    assert part(all_.learner, "weights gathered for a pass") == 2 * 10**9
    assert all_.learner.peak_bytes < some.learner.peak_bytes
    # The reference model, too.
    assert all_.host_bytes - some.host_bytes == 2 * (2 * some.shape.parameters // ranks)


def test_offloading_none_is_the_default_and_offloads_nothing() -> None:
    _, none, _ = planned(RL, "learner.offload=none")
    _, plain, _ = planned(RL)
    assert none == plain
    assert part(none.learner, "two moments, float32") == none.shape.parameters


LORA = ("learner.lora.rank=16",)


def test_adapters_alone_have_gradients_and_an_optimizer() -> None:
    _, full, _ = planned(RL)
    _, plan, _ = planned(RL, *LORA)
    text = plan.shape.text
    sides = 4 * text.hidden + 2 * (text.hidden + text.kv_dim) + 3 * (text.hidden + text.intermediate)
    assert plan.trainable_params == 16 * text.layers * sides
    always = {p.name: p.bytes for p in plan.learner.items if p.phase is MemoryPhase.ALWAYS}
    assert always["weights"] == 2 * plan.trainable_params // 8
    assert always["frozen weights"] == 2 * plan.shape.parameters // 8
    assert always["two moments, float32"] == 8 * plan.trainable_params // 8
    assert always["gradients, float32"] == 4 * plan.trainable_params // 8
    made = part(plan.learner, "gradients as they are made")
    assert made == 2 * 16 * text.intermediate
    assert plan.learner.peak_bytes < full.learner.peak_bytes
    # The tower is frozen, the rest has no gradients of weights.
    assert plan.unpacked_work.model_flops < 0.8 * full.unpacked_work.model_flops


@pytest.mark.parametrize(
    ("settings", "held"),
    [((), False), (("learner.lora.train_merger=true",), True), (("learner.reference_model=other",), True)],
)
def test_adapters_need_no_second_reference_model(settings: tuple[str, ...], held: bool) -> None:
    _, plan, _ = planned(RL, *LORA, *settings)
    assert bool(part(plan.learner, "reference model")) is held
    # It is asked all the same.
    assert plan.passes.forward_only == 2


def test_the_reference_may_be_named_as_the_model_itself() -> None:
    _, plan, _ = planned(RL, *LORA, f"learner.reference_model={MODEL.removeprefix('model=')}")
    assert not part(plan.learner, "reference model")


def test_dropout_of_adapters_copies_what_goes_in() -> None:
    for checkpointing in ("true", "false"):
        settings = (*LORA, f"learner.gradient_checkpointing={checkpointing}")
        _, without, _ = planned(RL, *settings)
        _, dropping, _ = planned(RL, *settings, "learner.lora.dropout=0.1")
        assert dropping.learner.peak_bytes > without.learner.peak_bytes


def test_a_target_that_is_no_layer_is_told() -> None:
    with pytest.raises(UserError, match=r"learner\.lora\.targets has 'x_proj'"):
        planned(RL, *LORA, "learner.lora.target_modules=[x_proj]")


def test_advice_offers_to_offload_the_optimizer_then_all() -> None:
    _, _, (learner,) = planned(RL, gib=40)
    settings = [setting for change in learner.single_changes for setting in change.settings]
    offered = [setting for setting in settings if "offload" in setting]
    assert offered == ["learner.offload=optimizer", "learner.offload=all"]
    _, plan, advice = planned(RL, "learner.offload=all", gib=20)
    assert not plan.learner.fits
    assert not any("offload" in s for one in advice for change in one.single_changes for s in change.settings)


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
def test_settings_move_the_peak_as_they_should(setting: str, grows: bool) -> None:
    _, before, _ = planned(RL)
    _, after, _ = planned(RL, setting)
    assert (after.learner.peak_bytes > before.learner.peak_bytes) is grows
    assert after.learner.peak_bytes != before.learner.peak_bytes


def test_one_gpu_of_a_kind_holds_what_is_held_at_the_worst_time() -> None:
    parts = (
        MemoryItem("a", 10),
        MemoryItem("b", 5, phase=MemoryPhase.FORWARD_BACKWARD),
        MemoryItem("c", 7, phase=MemoryPhase.OPTIMIZER_STEP),
        MemoryItem("d", 16, phase=MemoryPhase.LOADING),
    )
    found = MemoryFootprint("learner", 1, 16, parts)
    assert (found.peak_phase, found.peak_bytes, found.bytes_over, found.fits) == (
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
    (RL, ("learner.offload=optimizer",), 40),
    (RL, (*LORA, "learner.micro_batch_tokens=131072"), 40),
]


@pytest.mark.parametrize(("path", "overrides", "gib"), CASES)
def test_advice_keeps_what_it_promises(path: Path, overrides: tuple[str, ...], gib: float) -> None:
    """Every change, written on the command line, gives the number that was promised for it."""
    _, plan, advice = planned(path, *overrides, gib=gib)
    assert not plan.fits
    assert {one.component for one in advice} >= {"learner"}
    for one in advice:
        changes = [*one.single_changes, *([one.combined_change] if one.combined_change else [])]
        assert changes
        for change in changes:
            _, after, _ = planned(path, *overrides, *change.settings, gib=gib)
            over = after.learner_bytes_over if one.component == "learner" else after.engine_bytes_over
            assert over == change.bytes_over_after < change.bytes_over_before
        if one.combined_change:
            assert one.combined_change.bytes_over_after <= 0


def test_advice_names_no_needless_change() -> None:
    _, _, advice = planned(RL, "learner.gradient_checkpointing=false")
    (learner,) = advice
    assert learner.combined_change is not None
    for left_out in learner.combined_change.settings:
        rest = [setting for setting in learner.combined_change.settings if setting != left_out]
        _, after, _ = planned(RL, "learner.gradient_checkpointing=false", *rest)
        assert after.learner_bytes_over > 0


def test_an_engine_that_vllm_would_refuse_is_found_and_helped() -> None:
    _, plan, advice = planned(RL, gib=22)
    assert plan.engine is not None
    assert not plan.engine.can_start
    engine = next(one for one in advice if one.component == "engine")
    assert engine.combined_change is not None
    _, after, _ = planned(RL, *engine.combined_change.settings, gib=22)
    assert after.engine is not None
    assert after.engine.can_start


def test_learner_and_engine_share_a_gpu_with_ipc() -> None:
    shared = (
        "weights.transport=ipc",
        "learner.world_size=1",
        "learner.zero_stage=2",
        "rollout.num_workers=1",
    )
    _, plan, _ = planned(RL, *shared, model="model=Qwen2.5-VL-3B")
    assert plan.shared_gpu is not None
    assert plan.engine is not None
    parts = plan.learner.peak_bytes + plan.engine.footprint.peak_bytes
    assert plan.shared_gpu.peak_bytes == parts
    assert plan.learner_bytes_over == parts - 80 * GIB


def test_the_tiny_recipe_is_float32() -> None:
    _, plan, _ = planned(TINY, model="model=assets/tiny-base")
    assert plan.weight_bytes == 4
    assert plan.fits
    assert any("zero_stage 0" in note for note in plan.notes)
    with pytest.raises(UserError, match="zero_stage"):
        planned(TINY, "learner.dtype=bfloat16", model="model=assets/tiny-base")


def test_passes_follow_the_config() -> None:
    _, plan, _ = planned(RL)
    # Four minibatches: old log-probs are scored before them; and the reference model scores.
    assert (plan.passes.updates, plan.passes.forward_only) == (1, 2)
    _, one, _ = planned(RL, "learner.mini_batch_size=128", "learner.loss.kl_coef=0")
    assert (one.passes.updates, one.passes.forward_only) == (1, 0)
    _, engine, _ = planned(RL, "learner.old_logprobs=engine", "learner.epochs=2")
    assert (engine.passes.updates, engine.passes.forward_only) == (2, 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("80 GB", 80 * 10**9), ("24576MiB", 24 << 30), ("1.5gib", 3 << 29)],
)
def test_memory_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80TiBs", "1.2.3GB", "-4GB", "0GB"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="80GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "wrong", [{"mfu": 0.0}, {"mfu": 1.1}, {"peak_tflops": 0.0}, {"zooms": -1}, {"turn_tokens": 0}]
)
def test_what_cannot_be_assumed_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        Assumptions(**wrong)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vz-ray", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_prints_verdicts_and_its_assumptions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, str(RL), MODEL) == 0
    said = capsys.readouterr().out
    for words in (
        "8,292,166,656 weights",
        "learner: fits",
        "engine: fits",
        "Assumed, not measured: 0.35 of 989",
    ):
        assert words in said
    assert command(monkeypatch, str(RL), MODEL, "--gpu-memory", "22GiB") == 1
    said = capsys.readouterr().out
    for words in (
        "learner: does not fit",
        "engine: does not start",
        "What helps the learner",
        "What helps the engine",
    ):
        assert words in said


def test_the_command_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command(monkeypatch, str(SFT), MODEL, "learner.world_size=2", "--gpu-memory", "24GB", "--json") == 1
    )
    found = json.loads(capsys.readouterr().out)
    plan = make_plan(load_plannable_config(SFT, [MODEL, "learner.world_size=2"]), Assumptions(24 * 10**9))
    assert found["parameters"] == plan.shape.parameters
    assert found["fits"] is False
    assert found["memory"][0]["peak"] == plan.learner.peak_bytes
    assert found["separate"]["executed_flops"] == plan.unpacked_work.executed_flops
    assert found["advice"][0]["alone"]


@pytest.mark.parametrize("arguments", [(MODEL,), (str(RL), str(SFT))])
def test_the_command_wants_one_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert "config files" in capsys.readouterr().err


def test_a_plan_is_the_same_for_a_config_that_was_copied() -> None:
    config = load_config(GrpoRunConfig, RL, [MODEL])
    assert make_plan(config, Assumptions()) == make_plan(replace(config), Assumptions())
