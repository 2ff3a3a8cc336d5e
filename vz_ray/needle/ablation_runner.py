"""`vz-ray ablate`: the loop whole and without one of its parts at a time, several seeds; the paper's table.

Every variant is trained and examined on the same videos, engines and questions, from cold starts
of the same length; `ablation_plan` says in which order, and what is done already. What came out is
written anew after each seed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vz_ray.config import to_yaml
from vz_ray.config.ablation import WITHOUT_TOOL_REWARD, AblationConfig
from vz_ray.config.distill import FilterConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import MUTABLE_ON_RESUME
from vz_ray.data.episode_record import EpisodeRecord, read_records, record_to_dict
from vz_ray.data.sft_data import load_chat_format
from vz_ray.data.task_file import read_tasks
from vz_ray.decode import DecodePool
from vz_ray.distill.filters import filter_faults
from vz_ray.distill.reflection import load_reflection_jobs
from vz_ray.env.trajectory import SamplingParams
from vz_ray.eval.ablation_results import (
    ABLATION_JSON,
    ABLATION_MARKDOWN,
    Json,
    build_ablation_results,
    write_ablation_files,
)
from vz_ray.eval.ablation_tables import print_ablation, write_markdown
from vz_ray.eval.checkpoint_evaluator import CheckpointEvaluator, load_weights
from vz_ray.eval.eval_log import EvalLog, EvalResult, read_results
from vz_ray.eval.run_summary import COLD_START, RL
from vz_ray.eval.runner import evaluate
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.needle.ablation_plan import (
    AblationLayout,
    AblationStage,
    StageKind,
    estimate_remaining_s,
    eval_stage_name,
    measure_stage_seconds,
    plan_stages,
)
from vz_ray.needle.quickstart import (
    collect_cold_start_exemplars,
    make_needle_dataset,
    train_sft_model,
)
from vz_ray.needle.reflections import (
    collect_reflections,
    correction_oracle_factory,
    sample_reflections,
    to_training_trajectory,
)
from vz_ray.needle.synthesis import synthesize
from vz_ray.report.ablation_report import REPORT_FILE, write_ablation_report
from vz_ray.rewards import check_scorers
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.runtime import runtime
from vz_ray.runtime.run_context import RunContext, open_run
from vz_ray.training.run import run_rl_stage, start_rollout
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.durations import format_duration
from vz_ray.utils.json_lines import to_json_line
from vz_ray.video.local_source import LocalFrameSource

REFLECTION_COUNTS_FILE = "counts.json"
"""Beside the reflections: what they were made from, and why the rest are none."""


def run_ablation(config: AblationConfig) -> None:
    """Does what is left of an ablation, then writes and prints what it found.

    Raises:
        StopRequested: A stop was asked for; the same command goes on.
    """
    check_scorers(config.reward, (), "the needle world")
    with open_run(config) as at:
        tree = AblationLayout(at.run_dir.path, Path(config.model))
        make_needle_datasets(config, at)
        questions = len(read_tasks(config.data.test))
        todo = plan_stages(config.seeds, config.variants)
        left = [stage for stage in todo if not tree.is_done(stage, questions)]
        if left:
            asyncio.run(_AblationRunner(config, at, tree, todo).run(left))
        found = write_ablation_results(config, tree)
    print_ablation(found)
    print(f"figures: {at.run_dir.path / ABLATION_JSON}\npage: {at.run_dir.path / REPORT_FILE}")


def make_needle_datasets(config: AblationConfig, at: RunContext) -> None:
    """Makes the needle videos that are missing: those to be asked about, and the quickstart's."""
    total = sum(config.test_synth.videos.values())
    with at.time_stage("synth"), at.progress.stage("synth, questions", total) as stage:
        synthesize(config.test_synth, stage.advance)
    make_needle_dataset(config, at)


def write_ablation_results(config: AblationConfig, tree: AblationLayout) -> Json:
    """Figures of all that has been evaluated: `ablation.json`, `.csv`, `.md` and `.html`."""
    results: dict[str, dict[int, Sequence[EvalResult]]] = {variant: {} for variant in config.variants}
    questions = len(read_tasks(config.data.test))
    for variant, runs in results.items():
        for seed in config.seeds:
            path = tree.eval_results(seed, variant)
            played = read_results(path) if path.exists() else []
            if len(played) >= questions:
                runs[seed] = played
    found = build_ablation_results(results, config.eval)
    counts = {seed: tree.reflections(seed).with_name(REFLECTION_COUNTS_FILE) for seed in config.seeds}
    found["reflections"] = {
        str(seed): json.loads(path.read_text()) for seed, path in counts.items() if path.exists()
    }
    done = [stage for stage in plan_stages(config.seeds, config.variants) if tree.is_done(stage, questions)]
    found["seconds"] = measure_stage_seconds(tree, done)
    write_ablation_files(tree.root, found)
    write_markdown(tree.root, found)
    write_ablation_report(tree.root)
    return found


def make_variant_config(config: AblationConfig, seed: int, variant: str, folder: Path) -> QuickstartConfig:
    """The settings of a variant's own run: the ablation's, with its seed and what it does without."""
    shared = {field.name: getattr(config, field.name) for field in fields(QuickstartConfig)}
    shared |= {"name": folder.name, "runs": str(folder.parent), "seed": seed}
    if variant == WITHOUT_TOOL_REWARD:
        shared |= {"reward": replace(config.reward, tool=0.0)}
    return QuickstartConfig(**shared)


class AblationEngines:
    """The rollout workers of the moment; started again only for a stage that is paid otherwise.

    Episodes are scored where they are played, and whether zooming is paid is a setting of the
    workers. Evaluations, and the episodes that are reflected on, look at right and wrong alone.
    """

    def __init__(self, at: RunContext, frames: DecodePool) -> None:
        self._at, self._frames = at, frames
        self._stack, self._tool = AsyncExitStack(), 0.0
        self._fleet: RolloutScheduler | None = None

    async def get_scheduler(self, stage: AblationStage, config: QuickstartConfig) -> RolloutScheduler:
        """A fleet that scores as `stage` needs it."""
        if self._fleet is None or (stage.kind is StageKind.RL and self._tool != config.reward.tool):
            await self.close()
            self._tool = config.reward.tool
            with self._at.time_stage("start engine"), self._at.progress.stage("start engine", 1) as bar:
                self._fleet = await start_rollout(config, self._at, self._frames, self._stack)
                bar.advance()
        return self._fleet

    async def close(self) -> None:
        self._fleet = None
        await self._stack.aclose()


@dataclass
class _AblationRunner:
    """The stages of an ablation, one after another."""

    config: AblationConfig
    run_context: RunContext
    layout: AblationLayout
    stages: Sequence[AblationStage]

    async def run(self, left: Sequence[AblationStage]) -> None:
        """Does the stages that are `left` of all."""
        async with AsyncExitStack() as stack:
            with self.run_context.time_stage("start Ray"):
                await stack.enter_async_context(runtime.checked_ray_cluster(self.config))
                frames = await stack.enter_async_context(runtime.decode_pool(self.config))
            engines = AblationEngines(self.run_context, frames)
            stack.push_async_callback(engines.close)
            for number, stage in enumerate(left):
                self.run_context.interrupt.raise_if_requested()
                self.run_context.progress.clear_stages()
                self._announce(stage, left[number:])
                await self._do(stage, frames, engines)
                if all(later.seed != stage.seed for later in left[number + 1 :]):
                    write_ablation_results(self.config, self.layout)
                    self.run_context.progress.print_line(
                        f"seed {stage.seed} is done: {self.layout.root / ABLATION_MARKDOWN}"
                    )

    def _announce(self, stage: AblationStage, left: Sequence[AblationStage]) -> None:
        behind = [one for one in self.stages if one not in left]
        seconds = estimate_remaining_s(left, measure_stage_seconds(self.layout, behind))
        count = f"{len(behind) + 1} of {len(self.stages)}"
        self.run_context.progress.print_line(
            f"[{count}] {stage}; about {format_duration(seconds)} left in all"
        )

    async def _do(self, stage: AblationStage, frames: DecodePool, engines: AblationEngines) -> None:
        tree, seed, variant = self.layout, stage.seed, stage.variant
        folder = tree.run_dir(seed, variant)
        config = make_variant_config(self.config, seed, variant, folder)
        run, _ = RunDir.create_or_resume(folder, to_yaml(config), MUTABLE_ON_RESUME)
        run.update_config(to_yaml(config))
        at = replace(self.run_context, run_dir=run, run_identity=runtime.run_identity(config))
        if stage.kind in (StageKind.EXEMPLARS, StageKind.REFLECTIONS):
            await self._cold_start(config, stage, at, frames)
            return
        fleet = await engines.get_scheduler(stage, config)
        if stage.kind is StageKind.REFLECT:
            await self._reflect(config, stage, at, frames, fleet)
        elif stage.kind is StageKind.RL:
            await run_rl_stage(config, at, tree.initial_model(seed, variant), frames, fleet, RL)
        else:
            await CheckpointEvaluator(config, at, fleet).evaluate_agent(
                eval_stage_name(variant), tree.evaluated_model(seed, variant)
            )

    async def _cold_start(
        self, config: QuickstartConfig, stage: AblationStage, at: RunContext, frames: DecodePool
    ) -> None:
        """The base taught by exemplars, and by reflections if this is that part; equally many steps."""
        with at.time_stage(stage.kind):
            lessons = await collect_cold_start_exemplars(config, frames)
            if stage.kind is StageKind.REFLECTIONS:
                lessons += map(to_training_trajectory, read_records(self.layout.reflections(stage.seed)))
            base = Path(config.model)
            await train_sft_model(config, at, frames, stage.kind, base, lessons, config.cold_start)

    async def _reflect(
        self,
        config: QuickstartConfig,
        stage: AblationStage,
        at: RunContext,
        frames: DecodePool,
        fleet: RolloutScheduler,
    ) -> None:
        """The policy that exemplars alone have made plays the cold start's tasks, and is corrected."""
        sizes, product = self.config.reflection, self.layout.reflections(stage.seed)
        with at.time_stage(stage.kind):
            log = await self._play(config, stage, at, fleet)
            wire, rules = load_chat_format(config.model, config.episode), config.episode
            jobs, counts = load_reflection_jobs(
                [log.path], wire.name, max_rounds=rules.max_rounds, max_per_task=sizes.max_per_task
            )
            # Questions were played to their ends in any order.
            jobs.sort(key=lambda job: job.key)
            ranker = await runtime.load_image_text_ranker(rules.selector, frames)
            with LocalFrameSource(decoder=config.clips.decoder) as local:
                expert = correction_oracle_factory(wire)
                corrected = await collect_reflections(jobs, local, wire, rules, config.reward, expert, ranker)
        kept, dropped = filter_faults(corrected, FilterConfig(), rules.max_zoom_frames)
        learned = sample_reflections(kept, sizes.max_reflections, config.seed)
        counts.update(f"corrected: {one.reason}" for one in dropped)
        counts.update({"corrected and kept": len(kept), "learned from": len(learned)})
        if not learned:
            at.progress.print_line("  no wrong zoom could be corrected: the cold start has exemplars alone")
        write_atomic(product.with_name(REFLECTION_COUNTS_FILE), (json.dumps(counts) + "\n").encode())
        write_atomic(product, "".join(_line(record) for record in learned).encode())

    async def _play(
        self, config: QuickstartConfig, stage: AblationStage, at: RunContext, fleet: RolloutScheduler
    ) -> EvalLog:
        """What the policy plays on the cold start's tasks, several times each."""
        sizes, model = self.config.reflection, self.layout.cold_start_model(stage.seed, StageKind.EXEMPLARS)
        tasks = read_tasks(config.data.sft)
        identity = {"model": str(model), "tasks": config.data.sft, "temperature": sizes.temperature}
        log = EvalLog(self.layout.policy_episodes(stage.seed), identity)
        sampling = SamplingParams(sizes.temperature, 1.0, config.episode.max_turn_tokens, config.seed)
        with at.progress.stage(stage.kind, len(tasks)) as bar:
            await load_weights(model, config, fleet)
            playing = evaluate(
                fleet, tasks, log, config.episode, stage=COLD_START,
                samples_per_task=sizes.samples_per_task, sampling_params=sampling, on_progress=bar.advance,
            )  # fmt: skip
            await at.interrupt.run_interruptible(playing)
        return log


def _line(record: EpisodeRecord) -> str:
    return to_json_line(record_to_dict(record))
