"""Ablation (`vz-ray ablate`): the full method and variants without one component, over several seeds.

All variants use the same videos, engines and questions, and cold starts of the same length. `ablation_plan`
defines the order of the stages and which are done. The result files are rewritten after each seed.
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
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.episode_record import read_records, record_to_dict
from vz_ray.data.task_file import read_tasks
from vz_ray.decode import DecodePool
from vz_ray.distill.filters import find_fault, split_episodes
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
    prepare_base,
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
from vz_ray.runtime import ray_cluster, runtime
from vz_ray.runtime.run_context import RunContext, open_run
from vz_ray.training.run import run_rl_stage, start_rollout
from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.durations import format_duration
from vz_ray.utils.json_lines import to_json_line
from vz_ray.video.local_source import LocalFrameSource

REFLECTION_COUNTS_FILE = "counts.json"
"""File next to the reflections: input counts, and exclusions by reason."""


def run_ablation(config: AblationConfig) -> None:
    """Run the remaining stages, then write and print the results.

    Raises:
        StopRequested: The user stopped the run. The same command resumes it.
    """
    check_scorers(config.reward, (), "the needle world")
    prepare_base(config)
    with open_run(config) as run:
        layout = AblationLayout(run.run_dir.path, Path(config.model))
        make_needle_datasets(config, run)
        questions = len(read_tasks(config.data.test))
        stages = plan_stages(config.seeds, config.variants)
        remaining = [stage for stage in stages if not layout.is_done(stage, questions)]
        if remaining:
            asyncio.run(_AblationRunner(config, run, layout, stages).run(remaining))
        results = write_ablation_results(config, layout)
    print_ablation(results)
    print(f"results: {run.run_dir.path / ABLATION_JSON}\nreport: {run.run_dir.path / REPORT_FILE}")


def make_needle_datasets(config: AblationConfig, run: RunContext) -> None:
    """Synthesize the missing needle videos of the test set and of the quickstart."""
    total = sum(config.test_synth.videos.values())
    with run.time_stage("synth"), run.progress.stage("synth, questions", total) as stage:
        synthesize(config.test_synth, stage.advance)
    make_needle_dataset(config, run)


def write_ablation_results(config: AblationConfig, layout: AblationLayout) -> Json:
    """Write the results of all finished evaluations as `ablation.json`, `.csv`, `.md` and `.html`."""
    eval_results: dict[str, dict[int, Sequence[EvalResult]]] = {variant: {} for variant in config.variants}
    questions = len(read_tasks(config.data.test))
    for variant, runs in eval_results.items():
        for seed in config.seeds:
            path = layout.eval_results(seed, variant)
            seed_results = read_results(path) if path.exists() else []
            if len(seed_results) >= questions:
                runs[seed] = seed_results
    results = build_ablation_results(eval_results, config.eval)
    counts = {seed: layout.reflections(seed).with_name(REFLECTION_COUNTS_FILE) for seed in config.seeds}
    results["reflections"] = {str(seed): json.loads(path.read_text()) for seed, path in counts.items() if path.exists()}
    done = [stage for stage in plan_stages(config.seeds, config.variants) if layout.is_done(stage, questions)]
    results["seconds"] = measure_stage_seconds(layout, done)
    write_ablation_files(layout.root, results)
    write_markdown(layout.root, results)
    write_ablation_report(layout.root)
    return results


def make_variant_config(config: AblationConfig, seed: int, variant: str, run_dir: Path) -> QuickstartConfig:
    """Derive the config of one variant and seed from the config of the ablation."""
    shared = {field.name: getattr(config, field.name) for field in fields(QuickstartConfig)}
    shared |= {"name": run_dir.name, "runs": str(run_dir.parent), "seed": seed}
    if variant == WITHOUT_TOOL_REWARD:
        shared |= {"reward": replace(config.reward, tool=0.0)}
    return QuickstartConfig(**shared)


class AblationEngines:
    """Current rollout workers. They restart only if an RL stage needs another tool reward.

    Workers score their episodes, so the tool reward is part of their config. Evaluation and reflection use
    the accuracy only and accept any workers.
    """

    def __init__(self, run: RunContext, frames: DecodePool) -> None:
        self._run, self._frames = run, frames
        self._stack, self._tool_reward = AsyncExitStack(), 0.0
        self._scheduler: RolloutScheduler | None = None

    async def get_scheduler(self, stage: AblationStage, config: QuickstartConfig) -> RolloutScheduler:
        """Return a scheduler with the tool reward of `stage`."""
        needs_restart = stage.kind is StageKind.RL and self._tool_reward != config.reward.tool
        if self._scheduler is None or needs_restart:
            await self.close()
            self._tool_reward = config.reward.tool
            with self._run.time_stage("start engine"), self._run.progress.stage("start engine", 1) as bar:
                self._scheduler = await start_rollout(config, self._run, self._frames, self._stack)
                bar.advance()
        return self._scheduler

    async def close(self) -> None:
        self._scheduler = None
        await self._stack.aclose()


@dataclass
class _AblationRunner:
    """Runs the stages of an ablation in order."""

    config: AblationConfig
    run_context: RunContext
    layout: AblationLayout
    stages: Sequence[AblationStage]

    async def run(self, remaining: Sequence[AblationStage]) -> None:
        """Run the remaining stages."""
        async with AsyncExitStack() as stack:
            with self.run_context.time_stage("start Ray"):
                await stack.enter_async_context(ray_cluster.checked_ray_cluster(self.config))
                frames = await stack.enter_async_context(runtime.decode_pool(self.config))
            engines = AblationEngines(self.run_context, frames)
            stack.push_async_callback(engines.close)
            for number, stage in enumerate(remaining):
                self.run_context.interrupt.raise_if_requested()
                self.run_context.progress.clear_stages()
                self._print_stage(stage, remaining[number:])
                await self._run_stage(stage, frames, engines)
                if all(later.seed != stage.seed for later in remaining[number + 1 :]):
                    write_ablation_results(self.config, self.layout)
                    self.run_context.progress.print_line(
                        f"seed {stage.seed} is done: {self.layout.root / ABLATION_MARKDOWN}"
                    )

    def _print_stage(self, stage: AblationStage, remaining: Sequence[AblationStage]) -> None:
        done = [other for other in self.stages if other not in remaining]
        seconds = estimate_remaining_s(remaining, measure_stage_seconds(self.layout, done))
        count = f"{len(done) + 1} of {len(self.stages)}"
        self.run_context.progress.print_line(f"[{count}] {stage}; about {format_duration(seconds)} left in total")

    async def _run_stage(self, stage: AblationStage, frames: DecodePool, engines: AblationEngines) -> None:
        layout, seed, variant = self.layout, stage.seed, stage.variant
        path = layout.run_dir(seed, variant)
        config = make_variant_config(self.config, seed, variant, path)
        run_dir, _ = RunDir.create_or_resume(path, to_yaml(config), MUTABLE_ON_RESUME)
        run_dir.update_config(to_yaml(config))
        run = replace(self.run_context, run_dir=run_dir, run_identity=runtime.run_identity(config))
        if stage.kind in (StageKind.EXEMPLARS, StageKind.REFLECTIONS):
            await self._train_cold_start(config, stage, run, frames)
            return
        scheduler = await engines.get_scheduler(stage, config)
        if stage.kind is StageKind.REFLECT:
            await self._make_reflections(config, stage, run, frames, scheduler)
        elif stage.kind is StageKind.RL:
            await run_rl_stage(config, run, layout.initial_model(seed, variant), frames, scheduler, RL)
        else:
            await CheckpointEvaluator(config, run, scheduler).evaluate_agent(
                eval_stage_name(variant), layout.evaluated_model(seed, variant)
            )

    async def _train_cold_start(
        self, config: QuickstartConfig, stage: AblationStage, run: RunContext, frames: DecodePool
    ) -> None:
        """Train the base model on exemplars, plus reflections if the stage requires them."""
        with run.time_stage(stage.kind):
            trajectories = await collect_cold_start_exemplars(config, frames)
            if stage.kind is StageKind.REFLECTIONS:
                trajectories += map(to_training_trajectory, read_records(self.layout.reflections(stage.seed)))
            base = Path(config.model)
            await train_sft_model(config, run, frames, stage.kind, base, trajectories, config.cold_start)

    async def _make_reflections(
        self,
        config: QuickstartConfig,
        stage: AblationStage,
        run: RunContext,
        frames: DecodePool,
        scheduler: RolloutScheduler,
    ) -> None:
        """Run the policy that was trained on exemplars only, and correct its wrong episodes."""
        reflection, episode = self.config.reflection, config.episode
        with run.time_stage(stage.kind):
            log = await self._run_policy(config, stage, run, scheduler)
            chat_format = load_chat_format(config.model, episode)
            jobs, counts = load_reflection_jobs(
                [log.path],
                chat_format.name,
                max_rounds=episode.max_rounds,
                max_per_task=reflection.max_per_task,
            )
            # The log is in order of completion.
            jobs.sort(key=lambda job: job.key)
            ranker = await runtime.load_image_text_ranker(episode.selector, frames)
            with LocalFrameSource(decoder=config.clips.decoder) as local:
                make_policy = correction_oracle_factory(chat_format)
                corrected = await collect_reflections(
                    jobs, local, chat_format, episode, config.reward, make_policy, ranker
                )
        filter_config = FilterConfig()
        kept, dropped = split_episodes(
            corrected, lambda record: find_fault(record, filter_config, episode.max_zoom_frames)
        )
        sampled = sample_reflections(kept, reflection.max_reflections, config.seed)
        counts.update(f"corrected: {drop.reason}" for drop in dropped)
        counts.update({"corrected and kept": len(kept), "sampled": len(sampled)})
        if not sampled:
            run.progress.print_line("  no wrong zoom could be corrected: the cold start uses exemplars only")
        path = self.layout.reflections(stage.seed)
        write_atomic(path.with_name(REFLECTION_COUNTS_FILE), (json.dumps(counts) + "\n").encode())
        lines = (to_json_line(record_to_dict(record)) for record in sampled)
        write_atomic(path, "".join(lines).encode())

    async def _run_policy(
        self, config: QuickstartConfig, stage: AblationStage, run: RunContext, scheduler: RolloutScheduler
    ) -> EvalLog:
        """Sample several episodes of the policy for each SFT task."""
        reflection = self.config.reflection
        model = self.layout.cold_start_model(stage.seed, StageKind.EXEMPLARS)
        tasks = read_tasks(config.data.sft)
        identity = {"model": str(model), "tasks": config.data.sft, "temperature": reflection.temperature}
        log = EvalLog(self.layout.policy_episodes(stage.seed), identity)
        sampling = SamplingParams(reflection.temperature, 1.0, config.episode.max_turn_tokens, config.seed)
        with run.progress.stage(stage.kind, len(tasks)) as bar:
            await load_weights(model, config, scheduler)
            evaluation = evaluate(
                scheduler, tasks, log, config.episode, stage=COLD_START,
                samples_per_task=reflection.samples_per_task, sampling_params=sampling,
                on_progress=bar.advance,
            )  # fmt: skip
            await run.interrupt.run_interruptible(evaluation)
        return log
