"""Plans with a teacher: GPUs, memory, time of scoring, timeouts, and the actors on the cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.command_line import run_command
from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.jobs.preflight import node_queries
from vz_ray.jobs.resource_demands import resource_demands
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.gpu_memory import GIB
from vz_ray.planning.planner import ResourcePlan, make_plan
from vz_ray.planning.step_time import count_gpus, step_time
from vz_ray.planning.timeouts import plan_timeouts
from vz_ray.utils.errors import UserError

RECIPE = "conf/videozoomer-7b-rl-split.yaml"
STUDENT = "model=Qwen2.5-VL-3B"
TEACHER = (
    "teacher.model=Qwen2.5-VL-7B",
    "teacher.num_workers=2",
    "teacher.engine.dtype=bfloat16",
    "teacher.engine.kv_cache_gib=null",
)


def make(*overrides: str, gib: float = 80) -> tuple[GrpoRunConfig, ResourcePlan]:
    config = load_config(GrpoRunConfig, RECIPE, [STUDENT, *overrides])
    return config, make_plan(config, Assumptions(int(gib * GIB)))


def test_teacher_has_its_own_gpus_with_its_weights() -> None:
    config, plan = make(*TEACHER)
    assert plan.teacher is not None
    footprint = plan.teacher.footprint
    items = {item.name: item.bytes for item in footprint.items}
    assert (footprint.component, footprint.num_gpus) == ("teacher", 2)
    assert items["weights"] == 2 * 8_292_166_656
    assert items["logits of prompt tokens"] == 3 * 4 * 1024 * 152_064
    assert plan.footprints[-1] is footprint
    without = make()[1]
    assert without.teacher is None
    assert plan.learner == without.learner
    assert plan.engine == without.engine
    assert count_gpus(config) == 16, "the splits are those of student and learner"


def test_teacher_that_does_not_fit_fails_the_plan() -> None:
    fitting, too_large = make(*TEACHER)[1], make(*TEACHER, gib=22)[1]
    assert fitting.teacher is not None
    assert too_large.teacher is not None
    assert fitting.teacher.bytes_over <= 0 < too_large.teacher.bytes_over
    assert not too_large.fits
    small_cache = make(*TEACHER, "teacher.engine.kv_cache_gib=1")[1]
    assert small_cache.teacher is not None
    assert small_cache.teacher.footprint.fits
    assert small_cache.teacher.bytes_over > 0, "one longest episode needs 1.75 GiB of keys and values"


def test_scores_are_part_of_the_rollout() -> None:
    assumptions = Assumptions()
    config, plan = make(*TEACHER)
    assert plan.teacher is not None
    assert plan.teacher.step_s == pytest.approx(config.train.batch_size * plan.teacher.group_s / 2)
    single = make(*TEACHER, "train.group_size=1", "teacher.reward_weight=0")[1].teacher
    assert single is not None
    assert single.group_s < plan.teacher.group_s < config.train.group_size * single.group_s, "the prompt is shared"
    slow = step_time(config, plan, assumptions)
    assert slow.rollout_s == pytest.approx(plan.teacher.step_s + plan.teacher.group_s)
    many, fast_plan = make(*TEACHER, "teacher.num_workers=64")
    assert fast_plan.teacher is not None
    alone = step_time(*make(), assumptions).rollout_s
    assert step_time(many, fast_plan, assumptions).rollout_s == pytest.approx(alone + fast_plan.teacher.group_s)


def test_teacher_with_other_visual_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"teacher.model Qwen3-VL-8B has visual tokens of 32 x 32 pixels, .* 28 x 28"):
        make("teacher.model=Qwen3-VL-8B")


def test_timeouts_cover_the_larger_model() -> None:
    assumptions = replace(Assumptions(), prefill_mfu=0.01, storage_gbps=0.01)
    (config, _), (alone, _) = make(*TEACHER, "teacher.max_concurrent_episodes=128"), make()
    with_teacher, without = (
        {timeout.key: timeout for timeout in plan_timeouts(c, assumptions)} for c in (config, alone)
    )
    assert with_teacher["turn_s"].seconds > without["turn_s"].seconds
    assert "the teacher's scores of 128 episodes" in with_teacher["turn_s"].reason
    assert with_teacher["engine_start_s"].seconds > without["engine_start_s"].seconds


def test_teacher_workers_are_placed_and_read_their_model() -> None:
    config = load_config(GrpoRunConfig, RECIPE, [STUDENT, *TEACHER, "teacher.node_group=large"])
    demands = resource_demands(config, gpus=True)
    assert [demand.name for demand in demands] == ["learner ranks", "rollout workers", "teacher workers", "decoders"]
    teacher = demands[2]
    assert (teacher.min_count, teacher.resources["GPU"], teacher.count_key) == (2, 1.0, "teacher.num_workers")
    queries = node_queries(config, demands, None)
    assert queries["large"].readable == ["Qwen2.5-VL-7B"]
    assert queries["large"].gpus


def test_plan_names_the_teacher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "plan", RECIPE, STUDENT, *TEACHER) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "GPU memory: teacher, 2 GPUs" in page
    assert "Teacher: 2 more GPUs. It scores a step in" in page
    assert "teacher: fits" in page
