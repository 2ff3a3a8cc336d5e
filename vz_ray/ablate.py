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

from vz_ray import actors
from vz_ray.ablation_plan import Part, Stage, Tree, evaluated_as, left_s, stages, timed
from vz_ray.clips import ClipPool
from vz_ray.coldstart.distill.reflect import read_wrong
from vz_ray.coldstart.distill.select import without_faults
from vz_ray.coldstart.reflections import correcting, drawn, learned_of, play_reflections
from vz_ray.config import to_yaml
from vz_ray.config.ablate import WITHOUT_TOOL_REWARD, AblateConfig
from vz_ray.config.distill import CurateConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import MAY_CHANGE
from vz_ray.data.needle.synth import synthesize
from vz_ray.data.record import EpisodeRecord, read_records, record_to_dict, to_line
from vz_ray.data.rl_file import read_tasks
from vz_ray.data.sft_source import wire_of
from vz_ray.desk import Desk, desk
from vz_ray.episode.trajectory import Sampling
from vz_ray.evaluate.ablation import JSON, MARKDOWN, Json, ablation, write_json
from vz_ray.evaluate.ablation_tables import print_ablation, write_markdown
from vz_ray.evaluate.play import evaluate
from vz_ray.evaluate.results import EvalLog, EvalResult, read_results
from vz_ray.evaluate.summary import COLD_START, RL
from vz_ray.examiner import Examiner, hold
from vz_ray.observe.run_dir import RunDir, write_atomic
from vz_ray.observe.spoken import duration
from vz_ray.quickstart import cold_start_exemplars, make_world, reinforce, sft, start_fleet
from vz_ray.report.ablation import PAGE, write_ablation_page
from vz_ray.reward import require_scorers
from vz_ray.rollout.fleet import Fleet
from vz_ray.video.local import LocalFrames

COUNTS = "counts.json"
"""Beside the reflections: what they were made from, and why the rest are none."""


def run_ablation(config: AblateConfig) -> None:
    """Does what is left of an ablation, then writes and prints what it found.

    Raises:
        StopRequested: A stop was asked for; the same command goes on.
    """
    require_scorers(config.reward, (), "the needle world")
    with desk(config) as at:
        tree = Tree(at.run.path, Path(config.model))
        make_worlds(config, at)
        questions = len(read_tasks(config.data.test))
        todo = stages(config.seeds, config.variants)
        left = [stage for stage in todo if not tree.done(stage, questions)]
        if left:
            asyncio.run(_Ablation(config, at, tree, todo).run(left))
        found = write_findings(config, tree)
    print_ablation(found)
    print(f"figures: {at.run.path / JSON}\npage: {at.run.path / PAGE}")


def make_worlds(config: AblateConfig, at: Desk) -> None:
    """Makes the needle videos that are missing: those to be asked about, and the quickstart's."""
    total = sum(config.test_synth.videos.values())
    with at.timed("synth"), at.progress.stage("synth, questions", total) as stage:
        synthesize(config.test_synth, stage.advance)
    make_world(config, at)


def write_findings(config: AblateConfig, tree: Tree) -> Json:
    """Figures of all that has been evaluated: `ablation.json`, `.csv`, `.md` and `.html`."""
    results: dict[str, dict[int, Sequence[EvalResult]]] = {variant: {} for variant in config.variants}
    questions = len(read_tasks(config.data.test))
    for variant, runs in results.items():
        for seed in config.seeds:
            path = tree.answers(seed, variant)
            played = read_results(path) if path.exists() else []
            if len(played) >= questions:
                runs[seed] = played
    found = ablation(results, config.evaluate)
    counts = {seed: tree.reflections(seed).with_name(COUNTS) for seed in config.seeds}
    found["reflections"] = {
        str(seed): json.loads(path.read_text()) for seed, path in counts.items() if path.exists()
    }
    done = [stage for stage in stages(config.seeds, config.variants) if tree.done(stage, questions)]
    found["seconds"] = timed(tree, done)
    write_json(tree.root, found)
    write_markdown(tree.root, found)
    write_ablation_page(tree.root)
    return found


def config_of(config: AblateConfig, seed: int, variant: str, folder: Path) -> QuickstartConfig:
    """The settings of a variant's own run: the ablation's, with its seed and what it does without."""
    shared = {field.name: getattr(config, field.name) for field in fields(QuickstartConfig)}
    shared |= {"name": folder.name, "runs": str(folder.parent), "seed": seed}
    if variant == WITHOUT_TOOL_REWARD:
        shared |= {"reward": replace(config.reward, tool=0.0)}
    return QuickstartConfig(**shared)


class Engines:
    """The rollout workers of the moment; started again only for a stage that is paid otherwise.

    Episodes are scored where they are played, and whether zooming is paid is a setting of the
    workers. Evaluations, and the episodes that are reflected on, look at right and wrong alone.
    """

    def __init__(self, at: Desk, frames: ClipPool) -> None:
        self._at, self._frames = at, frames
        self._stack, self._tool = AsyncExitStack(), 0.0
        self._fleet: Fleet | None = None

    async def serving(self, stage: Stage, config: QuickstartConfig) -> Fleet:
        """A fleet that scores as `stage` needs it."""
        if self._fleet is None or (stage.part is Part.RL and self._tool != config.reward.tool):
            await self.close()
            self._tool = config.reward.tool
            with self._at.timed("start engine"), self._at.progress.stage("start engine", 1) as bar:
                self._fleet = await start_fleet(config, self._at, self._frames, self._stack)
                bar.advance()
        return self._fleet

    async def close(self) -> None:
        self._fleet = None
        await self._stack.aclose()


@dataclass
class _Ablation:
    """The stages of an ablation, one after another."""

    config: AblateConfig
    at: Desk
    tree: Tree
    todo: Sequence[Stage]

    async def run(self, left: Sequence[Stage]) -> None:
        """Does the stages that are `left` of all."""
        async with AsyncExitStack() as stack:
            with self.at.timed("start Ray"):
                await stack.enter_async_context(actors.cluster_of(self.config))
                frames = await stack.enter_async_context(actors.clip_pool(self.config))
            engines = Engines(self.at, frames)
            stack.push_async_callback(engines.close)
            for number, stage in enumerate(left):
                self.at.interrupt.check()
                self.at.progress.clear()
                self._announce(stage, left[number:])
                await self._do(stage, frames, engines)
                if all(later.seed != stage.seed for later in left[number + 1 :]):
                    write_findings(self.config, self.tree)
                    self.at.progress.say(f"seed {stage.seed} is done: {self.tree.root / MARKDOWN}")

    def _announce(self, stage: Stage, left: Sequence[Stage]) -> None:
        behind = [one for one in self.todo if one not in left]
        seconds = left_s(left, timed(self.tree, behind))
        count = f"{len(behind) + 1} of {len(self.todo)}"
        self.at.progress.say(f"[{count}] {stage}; about {duration(seconds)} left in all")

    async def _do(self, stage: Stage, frames: ClipPool, engines: Engines) -> None:
        tree, seed, variant = self.tree, stage.seed, stage.variant
        folder = tree.folder(seed, variant)
        config = config_of(self.config, seed, variant, folder)
        run, _ = RunDir.begin(folder, to_yaml(config), MAY_CHANGE)
        run.adopt(to_yaml(config))
        at = replace(self.at, run=run, badge=actors.badge_of(config))
        if stage.part in (Part.EXEMPLARS, Part.REFLECTIONS):
            await self._cold_start(config, stage, at, frames)
            return
        fleet = await engines.serving(stage, config)
        if stage.part is Part.REFLECT:
            await self._reflect(config, stage, at, frames, fleet)
        elif stage.part is Part.RL:
            await reinforce(config, at, tree.start(seed, variant), frames, fleet, RL)
        else:
            await Examiner(config, at, fleet).agent(evaluated_as(variant), tree.trained(seed, variant))

    async def _cold_start(self, config: QuickstartConfig, stage: Stage, at: Desk, frames: ClipPool) -> None:
        """The base taught by exemplars, and by reflections if this is that part; equally many steps."""
        with at.timed(stage.part):
            lessons = await cold_start_exemplars(config, frames)
            if stage.part is Part.REFLECTIONS:
                lessons += map(learned_of, read_records(self.tree.reflections(stage.seed)))
            base = Path(config.model)
            await sft(config, at, frames, stage.part, base, lessons, config.cold_start)

    async def _reflect(
        self, config: QuickstartConfig, stage: Stage, at: Desk, frames: ClipPool, fleet: Fleet
    ) -> None:
        """The policy that exemplars alone have made plays the cold start's tasks, and is corrected."""
        sizes, product = self.config.reflection, self.tree.reflections(stage.seed)
        with at.timed(stage.part):
            log = await self._play(config, stage, at, fleet)
            wire, rules = wire_of(config.model, config.episode), config.episode
            jobs, counts = read_wrong([log.path], wire.name, rounds=rules.max_rounds, most=sizes.per_task)
            # Questions were played to their ends in any order.
            jobs.sort(key=lambda job: job.key)
            ranker = await actors.image_text(rules.selector, frames)
            with LocalFrames(decoder=config.clips.decoder) as local:
                expert = correcting(wire)
                corrected = await play_reflections(jobs, local, wire, rules, config.reward, expert, ranker)
        kept, dropped = without_faults(corrected, CurateConfig(), rules.max_zoom_frames)
        learned = drawn(kept, sizes.most, config.seed)
        counts.update(f"corrected: {one.reason}" for one in dropped)
        counts.update({"corrected and kept": len(kept), "learned from": len(learned)})
        if not learned:
            at.progress.say("  no wrong zoom could be corrected: the cold start has exemplars alone")
        write_atomic(product.with_name(COUNTS), (json.dumps(counts) + "\n").encode())
        write_atomic(product, "".join(_line(record) for record in learned).encode())

    async def _play(self, config: QuickstartConfig, stage: Stage, at: Desk, fleet: Fleet) -> EvalLog:
        """What the policy plays on the cold start's tasks, several times each."""
        sizes, model = self.config.reflection, self.tree.cold(stage.seed, Part.EXEMPLARS)
        tasks = read_tasks(config.data.sft)
        identity = {"model": str(model), "tasks": config.data.sft, "temperature": sizes.temperature}
        log = EvalLog(self.tree.played(stage.seed), identity)
        sampling = Sampling(sizes.temperature, 1.0, config.episode.max_turn_tokens, config.seed)
        with at.progress.stage(stage.part, len(tasks)) as bar:
            await hold(model, config, fleet)
            playing = evaluate(
                fleet, tasks, log, config.episode, stage=COLD_START,
                samples=sizes.samples, sampling=sampling, advance=bar.advance,
            )  # fmt: skip
            await at.interrupt.watch(playing)
        return log


def _line(record: EpisodeRecord) -> str:
    return to_line(record_to_dict(record))
