"""Config of runs: their common keys, runs with rollout workers, and RL training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.data import DataConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.fields import InvalidValueError, Section, check_at_least, number, set_derived_values
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.monitoring import MonitoringConfig, TrackingConfig
from vz_ray.config.ray import RayConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig, WeightsConfig
from vz_ray.config.teacher import OnPolicyTeacherConfig, check_shared_tokens
from vz_ray.config.timeouts import PLANNED_TIMEOUTS, TimeoutsConfig
from vz_ray.utils.resources import find_resource

MUTABLE_ON_RESUME = (
    "learner.world_size",
    "learner.zero_stage",
    "learner.param_persistence_threshold",
    "learner.offload",
    "learner.gradient_checkpointing",
    "learner.sequence_parallel_size",
    "learner.lora.publish",
    "learner.vision_slice_patches",
    "learner.mlp_tile_tokens",
    "learner.micro_batch_tokens",
    "learner.share_prefixes",
    "learner.prefetch_batches",
    "learner.node_group",
    "learner.cpus_per_rank",
    "learner.max_restarts",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "sft.keep_checkpoints",
    *(f"timeouts.{key}" for key in PLANNED_TIMEOUTS),
)
"""Keys that may change when a run is resumed: placement and sharding of the learner, checkpoints to keep, timeouts that
follow from the plan."""


@dataclass
class TrainConfig(Section):
    """The RL training loop."""

    max_steps: int = number(200, minimum=1)
    """Training steps."""
    batch_size: int = number(128, minimum=1)
    """Tasks (groups) per step (paper: 128)."""
    group_size: int = number(16, minimum=1)
    """Samples per task (paper: 16); 1 only without rewards (`teacher.reward_weight: 0`)."""
    min_overview_frames: int = number(0, minimum=0)
    """Minimum frames of the overview in training: each group gets a number between it and
    `episode.overview_frames`, so that some overviews need a zoom. 0 always uses `episode.overview_frames`."""
    max_skip_rate: float = number(0.0, minimum=0, maximum=0.95)
    """Maximum probability to skip a task in an epoch, reached by tasks whose groups always had equal rewards; 0 draws
    every task once per epoch."""
    extra_samples: int = number(0, minimum=0)
    """Extra samples per task; the first `group_size` that finish are kept. Groups then do not wait for their
    longest episodes, which biases training towards short ones; 0 has no bias."""
    max_sampled_tasks: int = 384
    """Maximum tasks sampled per step to fill the batch; groups of equal rewards are dropped."""
    max_staleness: int = number(0, minimum=0)
    """Maximum number of updates between the weights that sampled a token and the weights that train on it; 0
    is synchronous."""
    colocate: bool = False
    """Learner ranks and engines share the same GPUs and alternate: engines sleep while the learner works, and
    the learner's states are in host memory while engines sample."""
    sleep_level: int | None = number(None, minimum=1, maximum=2)
    """Memory of a sleeping engine's weights with `colocate`. 2: discarded, because every wake-up is followed by a
    complete set of weights; 1: kept in host memory, for models whose weights vLLM cannot restore completely. Default:
    1 if adapters are published (`learner.lora.publish`), else 2."""
    wait_for_episodes: bool = False
    """Finish running episodes before engines load new weights; otherwise episodes continue with the new
    weights."""
    temperature: float = number(1.0, above=0)
    """Sampling temperature of training episodes."""
    validate_every: int = number(20, minimum=0)
    """Steps between evaluations on the validation tasks; 0 disables validation."""
    checkpoint_every: int = number(5, minimum=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = number(2, minimum=1)
    """Newest checkpoints to keep."""
    keep_best: int = number(0, minimum=0)
    """Best checkpoints to keep in addition, ranked by validation accuracy (every validated step is then
    checkpointed), or by mean training reward if `validate_every` is 0."""
    max_mismatch_kl: float = number(0.05, above=0)
    """Maximum KL per token between engine and learner, in nats; training stops above it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "max_sampled_tasks", "batch_size")


@dataclass
class EvalConfig(Section):
    """Confidence intervals of evaluation metrics."""

    bootstrap_resamples: int = number(2000, minimum=100)
    """Bootstrap resamples per interval."""
    confidence_level: float = number(0.95, above=0, below=1)
    """Confidence level of the intervals."""
    seed: int = number(0, minimum=0)
    """Seed of the bootstrap."""


@dataclass
class RunConfig(Section):
    """Keys of every run: its directory and model, episodes, decode pool, cluster."""

    name: str = "run"
    """Name of the run directory in `runs`."""
    runs: str = "runs"
    """Parent of run directories."""
    seed: int = number(0, minimum=0)
    """Seed of task and batch order, sampling and shuffling."""
    model: str = ""
    """Checkpoint directory of the initial model, or of the model to evaluate."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Limits and prompts of an episode."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """Decode pool."""
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    """Timeouts."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Ray cluster."""
    monitoring: TrackingConfig = field(default_factory=TrackingConfig)
    """Logs, metrics and trackers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        set_derived_values(self)


def frames_mib(frames: int, episode: EpisodeConfig, learner: LearnerConfig) -> int:
    """Return the size of a rank's share of this many frames of maximum size, in MiB: rounded up, at most 8 GiB."""
    return min(-(-frames * 3 * episode.max_pixels // (learner.world_size << 20)), 8192)


@dataclass
class RolloutRunConfig(RunConfig):
    """Common config of runs with rollout workers."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward of an episode."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Rollout workers and their engines."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Weight publishes."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Confidence intervals of evaluation metrics."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """Logs, metrics, trackers and traces."""

    def __post_init__(self) -> None:
        if self.model:
            self.model = str(find_resource(self.model))
        super().__post_init__()

    @property
    def images_per_prompt(self) -> int:
        """Maximum frames of a conversation on the engines."""
        return self.episode.max_images

    @property
    def max_num_seqs(self) -> int:
        """Maximum turns in one batch of an engine."""
        return self.rollout.max_concurrent_episodes

    @property
    def gpu_share(self) -> float:
        """Fraction of a GPU that each engine, and each learner rank, requests."""
        return 1.0


@dataclass
class GrpoRunConfig(RolloutRunConfig):
    """Config of `vz-ray train`."""

    data: DataConfig = field(default_factory=DataConfig)
    """Task files."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """GRPO learner."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    teacher: OnPolicyTeacherConfig = field(default_factory=OnPolicyTeacherConfig)
    """Teacher of on-policy distillation."""

    @property
    def teacher_coef(self) -> float:
        """Coefficient of the reverse KL to the teacher; 0 without a teacher."""
        return self.teacher.kl_coef if self.teacher.enabled else 0.0

    @property
    def teacher_kl_cap(self) -> float | None:
        """Maximum absolute KL estimate of a token to the teacher."""
        return self.teacher.kl_cap

    @property
    def reward_weight(self) -> float:
        """Factor of the reward's advantage; 1 without a teacher."""
        return self.teacher.reward_weight if self.teacher.enabled else 1.0

    @property
    def step_frames_mib(self) -> int:
        """Maximum size of a step's frames per learner rank, in MiB; a group's samples share the overview."""
        shared, images = self.episode.overview_frames, self.episode.max_images
        frames = self.train.batch_size * (shared + self.train.group_size * (images - shared))
        return frames_mib(frames, self.episode, self.learner)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.learner.check_max_context("learner", self.episode.max_context)
        self._check_batches()
        if self.episode.gate.mode != "off":
            raise InvalidValueError(
                "episode.gate.mode",
                f"is {self.episode.gate.mode!r}; training requires 'off', because the log-probs of a draft are not "
                "those of a sampled turn",
            )
        if self.train.max_staleness and self.learner.loss.tis_cap is None:
            raise InvalidValueError(
                "train.max_staleness",
                f"is {self.train.max_staleness} and learner.loss.tis_cap is null; stale tokens require truncated "
                "importance weights, set learner.loss.tis_cap=2.0",
                "learner.loss.tis_cap",
            )
        if self.train.max_staleness and self.learner.old_logprobs != "recompute":
            raise InvalidValueError(
                "learner.old_logprobs",
                f"is {self.learner.old_logprobs!r}; with train.max_staleness {self.train.max_staleness} it must be "
                "'recompute'",
                "train.max_staleness",
            )
        self._check_turn_credit()
        self._check_teacher()
        self._check_frame_tie_break()
        if self.train.min_overview_frames > self.episode.overview_frames:
            raise InvalidValueError(
                "train.min_overview_frames",
                f"is {self.train.min_overview_frames}; it must be at most episode.overview_frames "
                f"({self.episode.overview_frames})",
                "episode.overview_frames",
            )
        if self.train.colocate:
            self._check_colocation()
        if self.shares_gpus:
            self._check_shared_gpus()

    def _check_turn_credit(self) -> None:
        """Check that turn rewards and their use in the advantages are configured together."""
        credit, rewards = self.learner.loss.turn_credit, self.reward.turns
        if credit != "none" and not rewards.enabled:
            raise InvalidValueError(
                "learner.loss.turn_credit",
                f"is {credit!r} and all weights of reward.turns are 0; set reward.turns.valid_zoom, new_time or "
                "evidence",
                "reward.turns.valid_zoom",
            )
        if credit == "none" and rewards.enabled:
            key = next(item.name for item in fields(rewards) if getattr(rewards, item.name))
            raise InvalidValueError(
                f"reward.turns.{key}",
                f"is {getattr(rewards, key)} and learner.loss.turn_credit is 'none'; it has no effect, set "
                "learner.loss.turn_credit to shaped or returns",
                "learner.loss.turn_credit",
            )

    def _check_teacher(self) -> None:
        """Check the teacher, and the keys that depend on rewards in the loss."""
        if self.train.group_size < 2 and not self.teacher.distills_only:
            raise InvalidValueError(
                "train.group_size",
                f"is {self.train.group_size}; it must be at least 2, because rewards are compared within a group. 1 is "
                "possible with teacher.model and teacher.reward_weight=0",
                "teacher.reward_weight",
            )
        if not self.teacher.enabled:
            return
        for key, unused in (("turn_credit", "none"), ("frame_tie_break", 0.0)):
            value = getattr(self.learner.loss, key)
            if self.teacher.distills_only and value != unused:
                raise InvalidValueError(
                    f"learner.loss.{key}",
                    f"is {value!r} and teacher.reward_weight is 0; it has no effect, set teacher.reward_weight above 0",
                    "teacher.reward_weight",
                )
        # Known names, which `vz-ray plan` accepts, have no files. A run checks its models again before it uses them.
        self.teacher.model = str(find_resource(self.teacher.model))
        if all((Path(model) / "config.json").is_file() for model in (self.model, self.teacher.model)):
            check_shared_tokens(self.model, self.teacher.model)

    def _check_frame_tie_break(self) -> None:
        """Check that breaking ties keeps the order of different rewards."""
        coef, reward = self.learner.loss.frame_tie_break, self.reward
        weights = {name: getattr(reward, name) for name in ("accuracy", "format", "tool")}
        smallest = min((name for name in weights if weights[name]), key=lambda name: weights[name], default="")
        if coef and (not smallest or coef >= weights[smallest]):
            limit = weights[smallest] if smallest else 0.0
            raise InvalidValueError(
                "learner.loss.frame_tie_break",
                f"is {coef:g}; it must be below the smallest weight of the reward, reward.{smallest or 'accuracy'} "
                f"({limit:g}), or the number of frames outweighs it",
                f"reward.{smallest or 'accuracy'}",
            )

    @property
    def publishes_adapters(self) -> bool:
        """Whether engines receive adapters instead of all weights."""
        return self.learner.lora.chooses_adapters

    @property
    def adapter_rank(self) -> int:
        """Rank for which engines allocate adapters; 0 if they receive all weights."""
        return self.learner.lora.engine_rank if self.publishes_adapters else 0

    @property
    def sleep_level(self) -> int:
        """Sleep level of the engines; see `EngineClient.sleep`."""
        return self.train.sleep_level or (1 if self.publishes_adapters else 2)

    @property
    def shares_gpus(self) -> bool:
        """Whether each GPU has one learner rank and one engine."""
        return self.train.colocate or self.weights.transport == "ipc"

    @property
    def gpu_share(self) -> float:
        return 0.5 if self.shares_gpus else 1.0

    def _check_batches(self) -> None:
        batch, mini_batch = self.train.batch_size, self.learner.mini_batch_size
        if batch > mini_batch and batch % mini_batch:
            smaller = batch - batch % mini_batch
            raise InvalidValueError(
                "train.batch_size",
                f"is {batch}; it must be a multiple of learner.mini_batch_size ({mini_batch}), or the last update of "
                f"a step has only {batch % mini_batch} tasks. Use {smaller} or {smaller + mini_batch}.",
                "learner.mini_batch_size",
            )

    def _check_colocation(self) -> None:
        """Check the keys that only `train.colocate` restricts."""
        if self.weights.transport == "nccl":
            raise InvalidValueError(
                "weights.transport",
                "is 'nccl'; with train.colocate it must be 'ipc' (GPUs) or 'shm', because NCCL cannot connect two "
                "processes on one GPU",
                "train.colocate",
            )
        if self.train.max_staleness:
            raise InvalidValueError(
                "train.max_staleness",
                f"is {self.train.max_staleness}; with train.colocate it must be 0, because engines sleep while the "
                "learner works",
                "train.colocate",
            )
        if self.sleep_level == 2 and self.publishes_adapters:
            raise InvalidValueError(
                "train.sleep_level",
                "is 2, which discards the checkpoint's weights; a publish of adapters does not restore them. Use 1, or "
                "learner.lora.publish=merged",
                "learner.lora.publish",
            )

    def _check_shared_gpus(self) -> None:
        """Check that there is one rank and one worker per GPU, on the same nodes."""
        cause = "train.colocate" if self.train.colocate else "weights.transport"
        reason = "true" if self.train.colocate else "ipc"
        rollout, world_size = self.rollout, self.learner.world_size
        if rollout.engine.tensor_parallel_size != 1:
            raise InvalidValueError(
                "rollout.engine.tensor_parallel_size",
                f"is {rollout.engine.tensor_parallel_size}; with {cause} {reason} it must be 1: Ray cannot give an "
                "engine parts of several GPUs",
                cause,
            )
        if rollout.max_workers not in (0, rollout.num_workers):
            raise InvalidValueError(
                "rollout.max_workers",
                f"is {rollout.max_workers}; with {cause} {reason} the workers are as many as the GPUs. Use 0.",
                cause,
            )
        if rollout.num_workers != world_size:
            raise InvalidValueError(
                "rollout.num_workers",
                f"is {rollout.num_workers} and learner.world_size is {world_size}; with {cause} {reason} each GPU has "
                f"one worker and one rank. Use {world_size} for both, or the number of GPUs.",
                "learner.world_size",
                cause,
            )
        if rollout.node_group not in ("", self.learner.node_group):
            raise InvalidValueError(
                "rollout.node_group",
                f"is {rollout.node_group!r} and learner.node_group is {self.learner.node_group!r}; with {cause} "
                f"{reason} workers run on the nodes of the learner. Leave it empty.",
                "learner.node_group",
                cause,
            )
