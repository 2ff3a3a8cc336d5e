"""Python API: configs, agents, runs and checkpoints, for scripts and notebooks.

    config = vz_ray.load_config("conf/laptop.yaml", ["train.max_steps=3"])
    with vz_ray.VideoAgent.from_checkpoint("runs/quickstart/models/rl", config.episode) as agent:
        print(agent.run("talk.mp4", "What is on the second slide?").answer)
    rows = pandas.DataFrame(vz_ray.episode_rows("runs/quickstart"))

Import these names from `vz_ray`. Names in `vz_ray.<package>` may change between versions.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vz_ray.config import load_config as _load_config
from vz_ray.config.ablation import AblationConfig
from vz_ray.config.distill import ExemplarRunConfig, ReflectionRunConfig, TeacherConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.rollout import EngineConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.env.events import EventCallback, ignore_event
from vz_ray.env.protocols import Policy
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, SamplingParams, Trajectory
from vz_ray.eval.eval_log import read_results
from vz_ray.monitoring import metric_logger
from vz_ray.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from vz_ray.env.chat_format import ChatFormat

T = TypeVar("T")

SCHEMAS: dict[str, type] = {
    "train": GrpoRunConfig,
    "sft": SftRunConfig,
    "eval": EvalRunConfig,
    "serve": ServeConfig,
    "quickstart": QuickstartConfig,
    "ablate": AblationConfig,
    "distill exemplar": ExemplarRunConfig,
    "distill reflect": ReflectionRunConfig,
}
"""Config class of each command."""


def load_config(path: Path | str | None = None, overrides: Sequence[str] = (), command: str = "train") -> Any:
    """Load the config of a command, as `vz-ray COMMAND path override...` does.

    Args:
        path: YAML file; None uses the defaults.
        overrides: `section.key=value`, the value as YAML.
        command: A key of `SCHEMAS`.

    Returns:
        An instance of the command's config class.

    Raises:
        UserError: Unknown command, key, type or value; the message names the line.
    """
    if command not in SCHEMAS:
        raise UserError(f"command is {command!r}; it must be one of {', '.join(SCHEMAS)}")
    return _load_config(SCHEMAS[command], path, overrides)


class VideoAgent:
    """Runs episodes on videos, with a vLLM engine of this process or a model behind an HTTP endpoint.

    The agent owns an event loop in a background thread, so it works in scripts and notebooks alike. Videos are
    decoded in this process: use trusted files.

    Args:
        start: Opens the policy and its chat format on the stack that `close` unwinds.
        episode: Rules of the episodes.
    """

    def __init__(
        self,
        start: Callable[[AsyncExitStack], Coroutine[Any, Any, tuple[Policy, ChatFormat]]],
        episode: EpisodeConfig,
    ) -> None:
        from vz_ray.video.local_source import LocalFrameSource

        self.episode = episode
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="video-agent", daemon=True)
        self._thread.start()
        self._stack, self._question_numbers = AsyncExitStack(), count()
        self._frames = LocalFrameSource()
        try:
            self._policy, self._chat_format = self._call(start(self._stack))
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_checkpoint(
        cls, model: Path | str, episode: EpisodeConfig | None = None, engine: EngineConfig | None = None
    ) -> VideoAgent:
        """Start a vLLM engine on a Hugging Face checkpoint directory.

        Args:
            model: Checkpoint directory, such as `runs/NAME/models/rl`.
            episode: Rules of the episodes; use those that the model was trained with.
            engine: vLLM's settings; the defaults run on CPU.

        Raises:
            UserError: `model` is not a checkpoint directory.
        """
        episode = episode or EpisodeConfig()

        async def start(stack: AsyncExitStack) -> tuple[Policy, ChatFormat]:
            return await stack.enter_async_context(_engine_policy(Path(model), episode, engine or EngineConfig()))

        return cls(start, episode)

    @classmethod
    def from_endpoint(
        cls, endpoint: TeacherConfig, tokenizer: Path | str, episode: EpisodeConfig | None = None
    ) -> VideoAgent:
        """Use a model behind an OpenAI-compatible chat endpoint.

        Args:
            endpoint: Model name, address, key variable, retries and cost limit.
            tokenizer: Checkpoint directory whose tokenizer writes the trajectory's token ids.
            episode: Rules of the episodes.

        Raises:
            UserError: The key is missing, or the endpoint refuses it.
        """
        episode = episode or EpisodeConfig()

        async def start(stack: AsyncExitStack) -> tuple[Policy, ChatFormat]:
            return await stack.enter_async_context(_endpoint_policy(endpoint, tokenizer, episode))

        return cls(start, episode)

    def run(
        self,
        video: Path | str | Sequence[Path | str],
        question: str,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        on_event: EventCallback = ignore_event,
    ) -> Trajectory:
        """Run one episode and return its trajectory.

        `answer` is None if the model gave none. If a video cannot be read, `status` is `failed` and `error` has the
        reason.

        Args:
            video: Path or URL, or several.
            question: The question, options included.
            temperature: Sampling temperature; 0 is greedy.
            seed: Seed of the sampling.
            on_event: Called with each `vz_ray.env.events` event, from the agent's thread.

        Raises:
            UserError: A video file does not exist.
        """
        from vz_ray.env.episode_runner import run_episode
        from vz_ray.video.video_file import require_files

        uris = [str(uri) for uri in ([video] if isinstance(video, (str, Path)) else video)]
        require_files(uris)
        first, *others = uris
        number = next(self._question_numbers)
        task = Task(f"question-{number}", first, question, "", extra_videos=tuple(others))
        sampling = SamplingParams(temperature=temperature, max_tokens=self.episode.max_turn_tokens, seed=seed)
        return self._call(
            run_episode(
                task,
                self._policy,
                self._frames,
                self._chat_format,
                self.episode,
                episode_id=EpisodeId(0, task.task_id, 0),
                sampling_params=sampling,
                on_event=on_event,
            )
        )

    def close(self) -> None:
        """Stop the engine or client, the decoder and the thread. Idempotent."""
        if not self._loop.is_running():
            return
        try:
            self._call(self._stack.aclose())
        finally:
            self._frames.close()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)

    def __enter__(self) -> VideoAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C stops the episode too
            raise


@asynccontextmanager
async def _engine_policy(
    model: Path, episode: EpisodeConfig, engine: EngineConfig
) -> AsyncIterator[tuple[Policy, ChatFormat]]:
    from vz_ray.data.chat_format_loader import load_chat_format
    from vz_ray.rollout.vllm_engine import VllmEngine

    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not a checkpoint directory: it has no config.json")
    chat_format = load_chat_format(model, episode)
    engine = replace(engine, max_model_len=episode.max_context, images_per_prompt=episode.max_images)
    with tempfile.TemporaryDirectory(prefix="vz_ray_agent_") as folder:
        vllm_engine = await VllmEngine.start(
            model, engine, name="agent", log_file=Path(folder) / "engine.log", training=False
        )
        try:
            yield vllm_engine, chat_format
        finally:
            await vllm_engine.shutdown()


@asynccontextmanager
async def _endpoint_policy(
    endpoint: TeacherConfig, tokenizer: Path | str, episode: EpisodeConfig
) -> AsyncIterator[tuple[Policy, ChatFormat]]:
    from vz_ray.data.chat_format_loader import load_chat_format
    from vz_ray.distill.chat_messages import TeacherPrompt
    from vz_ray.distill.cost_ledger import CostLedger
    from vz_ray.distill.teacher_client import TeacherClient, TeacherPolicy

    chat_format = load_chat_format(tokenizer, episode)
    with tempfile.TemporaryDirectory(prefix="vz_ray_agent_") as folder:
        client = TeacherClient(endpoint, CostLedger(Path(folder) / "replies.jsonl", endpoint.max_cost_usd))
        try:
            yield TeacherPolicy(client, chat_format, TeacherPrompt.load(endpoint.prompt)), chat_format
        finally:
            await client.close()


def read_metrics(run: Path | str, file: str = "metrics.jsonl") -> list[dict[str, float]]:
    """Return the rows of a run's metrics, in order; SFT stages write `<stage>.jsonl`.

    Example: `pandas.DataFrame(read_metrics("runs/rl")).plot("step", "reward/accuracy")`

    Raises:
        UserError: The run has no such file.
    """
    path = Path(run) / file
    if not path.is_file():
        raise UserError(f"{path} does not exist; a run directory has metrics.jsonl, and <stage>.jsonl for SFT stages")
    return metric_logger.read_metrics(path)


def read_episodes(run: Path | str, folder: str = "episodes") -> Iterator[EpisodeRecord]:
    """Yield the episodes of a run with their tasks, in order of the steps.

    Args:
        run: Run directory.
        folder: `episodes` (training), `validation` or `eval`.

    Raises:
        UserError: The run has no such folder.
    """
    path = Path(run) / folder
    if not path.is_dir():
        raise UserError(f"{path} does not exist; a run directory has episodes/, validation/ or eval/")
    for file in sorted(path.glob("*.jsonl")):
        yield from read_results(file)


def episode_rows(run: Path | str, folder: str = "episodes") -> Iterator[dict[str, Any]]:
    """Yield one flat dict per episode, ready for `pandas.DataFrame`.

    Keys: `stage`, `step`, `task`, `sample`, `kind`, `question`, `truth`, `answer`, `status`, `reward`, `accuracy`,
    `format`, `tool`, `advantage`, `zooms`, `zoom_calls`, `frames`, `tokens`, `turns`, `seconds`.
    """
    for record in read_episodes(run, folder):
        task, trajectory = record.task, record.trajectory
        reward = trajectory.reward
        yield {
            "stage": record.stage,
            "step": record.step,
            "task": task.task_id,
            "sample": trajectory.id.sample,
            "kind": task.kind,
            "question": task.question,
            "truth": task.answer,
            "answer": trajectory.answer,
            "status": str(trajectory.status),
            "reward": reward.total if reward else None,
            "accuracy": reward.accuracy if reward else None,
            "format": reward.format if reward else None,
            "tool": reward.tool if reward else None,
            "advantage": record.advantage,
            "zooms": len(trajectory.zooms),
            "zoom_calls": trajectory.num_zoom_calls,
            "frames": len(trajectory.frame_refs),
            "tokens": trajectory.num_tokens,
            "turns": len(trajectory.turns),
            "seconds": trajectory.seconds,
        }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training checkpoint.

    Attributes:
        path: Checkpoint directory.
        step: Number of completed steps.
        model: Model that training started from.
        shapes: Shape of each trained parameter, by Hugging Face name.
    """

    path: Path
    step: int
    model: str
    shapes: dict[str, tuple[int, ...]]

    def tensor(self, name: str) -> torch.Tensor:
        """Return one trained parameter in float32.

        Raises:
            KeyError: The checkpoint has no such parameter.
        """
        from vz_ray.learner.checkpoint_files import ShardReader
        from vz_ray.learner.zero_state import WEIGHTS

        return ShardReader(self.path / "learner").read(WEIGHTS, name).view(self.shapes[name])


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Open a run's newest checkpoint, or the checkpoint directory itself; verifies all hashes.

    Args:
        path: `runs/NAME` or `runs/NAME/checkpoints/step-000012`.

    Raises:
        UserError: There is no checkpoint, or it is damaged.
    """
    from vz_ray.learner.checkpoint import read_checkpoint_meta
    from vz_ray.learner.checkpoint_files import ShardReader, verify_files
    from vz_ray.learner.distributed import RankInfo
    from vz_ray.utils.step_dirs import list_steps

    path = Path(path)
    if (path / "checkpoints").is_dir():
        steps = list_steps(path / "checkpoints")
        if not steps:
            raise UserError(f"{path} has no checkpoint yet")
        path = steps[-1]
    learner = path / "learner"
    if not learner.is_dir():
        raise UserError(f"{path} is neither a run directory with checkpoints nor a checkpoint")
    import torch

    verify_files(learner, RankInfo(0, 1, torch.device("cpu")))
    return Checkpoint(
        path,
        int(path.name.rpartition("-")[2]),
        read_checkpoint_meta(learner).model,
        dict(ShardReader(learner).shapes),
    )
