"""A whole run: every room's settings, and the loop's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.data import DataConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.eval import EvalConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.monitoring import MonitoringConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.config.weights import WeightsConfig

MUTABLE_ON_RESUME = tuple(
    f"{owner}.{key}"
    for owner, keys in {
        "learner": "world_size zero_stage param_persistence_threshold offload gradient_checkpointing micro_batch_tokens "
        "share_prefixes node_group num_threads max_restarts",
        "train": "checkpoint_every keep_checkpoints keep_best",
        "sft": "keep_checkpoints",
    }.items()
    for key in keys.split()
)
"""Keys with which a run may go on otherwise than it began: where the learner is placed and how it is divided,
and which checkpoints are kept."""


@dataclass
class RayConfig:
    """The Ray cluster that a run uses."""

    address: str = ""
    """An existing cluster to join (`auto` finds one on this machine); empty starts a private one."""
    num_cpus: int = 8
    """Logical CPUs of a private cluster: how many actors fit, not how many cores there are."""
    object_store_mib: int = 512
    """Shared memory of a private cluster's object store."""
    metrics_port: int = 0
    """Port at which a private cluster's metrics can be scraped; 0 takes a free one, which `prometheus_targets.json` in
    the run directory names."""
    start_timeout_s: float = 120.0
    """How long starting or joining may take."""
    use_gpus: str = "auto"
    """Whether engines and learner ranks get GPUs: `always`, `never`, or `auto`: if the cluster has any as the
    run starts. Where nodes with GPUs only come when something waits for them, it must be `always`."""

    def __post_init__(self) -> None:
        if self.use_gpus not in ("auto", "always", "never"):
            raise ValueError(f"ray.use_gpus is {self.use_gpus!r}; it must be 'auto', 'always' or 'never'")
        if self.num_cpus < 4:
            raise ValueError(f"ray.num_cpus is {self.num_cpus}; workers, learner and decoders need 4")
        if not 0 <= self.metrics_port < 65536:
            raise ValueError(
                f"ray.metrics_port is {self.metrics_port}; a port is at most 65535, 0 takes a free one"
            )
        if self.object_store_mib < 80:
            raise ValueError(f"ray.object_store_mib is {self.object_store_mib}; Ray needs at least 80")


@dataclass
class TrainConfig:
    """The reinforcement learning loop."""

    max_steps: int = 200
    """Iterations of the loop."""
    batch_size: int = 128
    """Groups in an iteration's batch (paper: 128)."""
    group_size: int = 16
    """Trajectories in a group (paper: 16)."""
    extra_samples: int = 0
    """Further trajectories played in each group; the first `samples` that end are kept. No group waits for
    its longest episodes, which are learned from less often than they are played; 0 has no such bias."""
    max_sampled_tasks: int = 384
    """Most tasks played in an iteration to fill the batch; groups of equal rewards teach nothing."""
    max_staleness: int = 0
    """Most updates that a token may be older than the weights that learn from it; 0 takes turns."""
    wait_for_episodes: bool = False
    """Episodes in flight end before engines load new weights; otherwise they go on with them."""
    temperature: float = 1.0
    """Sampling temperature of training episodes."""
    validate_every: int = 20
    """Iterations between evaluations on the validation tasks; 0 never evaluates."""
    checkpoint_every: int = 5
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are deleted."""
    keep_best: int = 0
    """Checkpoints kept besides, for their figure: accuracy on the validation tasks, for which every iteration
    that is evaluated is checkpointed, or where `evaluate_every` is 0 the mean reward of the iteration's
    training episodes. 0 keeps none for it."""
    max_mismatch_kl: float = 0.05
    """Training stops where engine and learner disagree by more than this (KL per token, nats)."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_staleness", "extra_samples", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if self.group_size < 2:
            raise ValueError(f"train.group_size is {self.group_size}; a group needs at least 2 to compare")
        if self.max_sampled_tasks < self.batch_size:
            raise ValueError(
                f"train.max_sampled_tasks is {self.max_sampled_tasks}, below train.batch_size ({self.batch_size})"
            )
        if self.temperature <= 0:
            raise ValueError(f"train.temperature is {self.temperature}; it must be above 0")


@dataclass
class RolloutRunConfig:
    """What every run that plays episodes needs: a model, engines, decoders, a cluster."""

    name: str = "run"
    """Directory of the run under `runs`."""
    runs: str = "runs"
    """Where run directories are made."""
    seed: int = 0
    """Order of tasks, sampling and shuffling."""
    model: str = ""
    """Checkpoint directory that training starts from, or that is evaluated."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    """What an episode may do."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How it is scored."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """The decoders."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How new weights reach the engines."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """How figures are taken."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """What is told of it while it goes on, and to whom."""

    def __post_init__(self) -> None:
        if self.reward.max_zoom_frames != self.episode.max_zoom_frames:
            raise ValueError(
                f"reward.max_zoom_frames is {self.reward.max_zoom_frames} and episode.max_zoom_frames "
                f"{self.episode.max_zoom_frames}; they must be equal, or good zooms would lose format reward"
            )
        if self.reward.timeout_s > 2 * self.rollout.turn_timeout_s:
            raise ValueError(
                f"reward.timeout_s is {self.reward.timeout_s:g}, above twice rollout.turn_timeout_s "
                f"({self.rollout.turn_timeout_s:g}): episodes would be given up while they are being scored"
            )
        if self.episode.max_context > self.rollout.engine.max_model_len:
            raise ValueError(
                f"episode.max_context is {self.episode.max_context}, above rollout.engine.max_model_len "
                f"({self.rollout.engine.max_model_len}): the engine would refuse long episodes"
            )


@dataclass
class GrpoRunConfig(RolloutRunConfig):
    """One training run; `vz-ray train conf/x.yaml key=value` fills it in."""

    data: DataConfig = field(default_factory=DataConfig)
    """Task files."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The GRPO learner."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learner.model:
            raise ValueError(
                f"learner.model is {self.learner.model!r}; it is `model` of the run, set that instead"
            )
        self.learner.check_max_context(self.episode.max_context)
        tasks, part = self.train.batch_size, self.learner.mini_batch_size
        if tasks > part and tasks % part:
            raise ValueError(
                f"train.batch_size is {tasks}, no multiple of learner.mini_batch_size ({part}): the last update "
                f"of an iteration would be of {tasks % part} tasks alone; set train.batch_size to "
                f"{tasks - tasks % part} or {tasks - tasks % part + part}, or change the other"
            )
        if self.episode.gate.mode != "off":
            raise ValueError(
                f"episode.gate.mode is {self.episode.gate.mode!r}; a gate is for evaluation and serving, "
                "training needs 'off': a draft's log-probs are not those of a sampled turn"
            )
        if self.train.max_staleness and self.learner.loss.tis_cap is None:
            raise ValueError(
                f"train.max_staleness is {self.train.max_staleness} and learner.loss.tis_cap is not "
                "set; tokens of older weights need truncated importance weights, 2.0 is usual"
            )
        if self.train.max_staleness and self.learner.old_logprobs != "recompute":
            raise ValueError(
                f"learner.old_logprobs is {self.learner.old_logprobs!r}; with train.max_staleness "
                f"{self.train.max_staleness} it must be 'recompute'"
            )
        if self.weights.transport == "ipc":
            for name, value, wanted in (
                ("learner.world_size", self.learner.world_size, (1,)),
                ("learner.zero_stage", self.learner.zero_stage, (0, 1, 2)),
                ("rollout.engine.tensor_parallel_size", self.rollout.engine.tensor_parallel_size, (1,)),
                ("rollout.num_workers", self.rollout.worker_limit, (1,)),
            ):
                if value not in wanted:
                    raise ValueError(
                        f"{name} is {value}; with weights.transport ipc, which is for one GPU that one rank "
                        f"and one worker share, it must be {' or '.join(map(str, wanted))}: or use nccl"
                    )
