"""Settings of the learner; defaults are the paper's RL recipe for the 7B model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vz_ray.utils.errors import UserError


def _choice(owner: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{key} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def _positive(owner: str, key: str, value: float, *, zero: bool = False) -> None:
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"{owner}.{key} is {value!r}; it must be {'at least' if zero else 'more than'} 0")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-6
    """Peak learning rate; the paper's RL stage."""
    lr_schedule: str = "constant"
    """`constant`, or `cosine` from the peak down to 0 at `total_steps`."""
    warmup_ratio: float = 0.0
    """Fraction of `total_steps` over which the rate rises linearly from 0."""
    total_steps: int = 1
    """Optimizer steps that the schedule spans; `constant` without warm-up does not need it."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global 2-norm; 0 leaves them as they are."""

    def __post_init__(self) -> None:
        _choice("optimizer", "lr_schedule", self.lr_schedule, ("constant", "cosine"))
        _positive("optimizer", "learning_rate", self.learning_rate)
        _positive("optimizer", "total_steps", self.total_steps)
        _positive("optimizer", "weight_decay", self.weight_decay, zero=True)
        _positive("optimizer", "max_grad_norm", self.max_grad_norm, zero=True)
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optimizer.warmup is {self.warmup_ratio!r}; it is a fraction from 0 to 1")


@dataclass
class LossConfig:
    """The policy loss and what is added to it."""

    importance_sampling_level: str = "token"
    """`token`: one importance ratio per token (GRPO); `sequence`: their geometric mean over the
    trajectory (GSPO)."""
    aggregation: str = "sequence_mean"
    """`sequence_mean`: mean over a trajectory's sampled tokens, then over trajectories (the paper);
    `token_mean`: over all tokens (DAPO); `fixed_length`: sum over tokens / `fixed_length`, mean over
    trajectories (Dr.GRPO)."""
    fixed_length: int = 4096
    """The constant that `fixed_length` divides by."""
    advantage_estimator: str = "grpo"
    """`grpo`: (r - mean) / (std + 1e-6) within the group; `dr_grpo`: r - mean."""
    min_reward_std: float = 1e-4
    """Groups whose rewards spread less than this teach nothing and are dropped."""
    clip_ratio_low: float = 0.2
    """The ratio counts no further below 1 than this."""
    clip_ratio_high: float = 0.27
    """The ratio counts no further above 1 than this."""
    kl_coef: float = 0.001
    """Weight of the low-variance KL to the reference model; 0 needs no reference model."""
    entropy_coef: float = 0.001
    """Weight of the entropy bonus."""
    tis_cap: float | None = None
    """C of the truncated importance weight min(exp(old - engine), C); none leaves tokens unweighted."""

    def __post_init__(self) -> None:
        _choice("loss", "importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        _choice("loss", "aggregation", self.aggregation, ("sequence_mean", "token_mean", "fixed_length"))
        _choice("loss", "advantage_estimator", self.advantage_estimator, ("grpo", "dr_grpo"))
        for key in ("fixed_length", "clip_ratio_low", "clip_ratio_high"):
            _positive("loss", key, getattr(self, key))
        for key in ("kl_coef", "entropy_coef", "min_reward_std"):
            _positive("loss", key, getattr(self, key), zero=True)
        if self.tis_cap is not None:
            _positive("loss", "tis_cap", self.tis_cap)


@dataclass
class LoraConfig:
    """Low-rank adapters in place of the weights themselves (arXiv 2106.09685)."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float = 32.0
    """What an adapter adds is B A x times `alpha / rank`."""
    dropout: float = 0.0
    """Share of an adapter's inputs that an update's forward pass leaves out."""
    target_modules: list[str] = field(
        default_factory=lambda: [
            r"language_model\..*\.(q|k|v|o)_proj",
            r"language_model\..*\.(gate|up|down)_proj",
        ]
    )
    """Linear layers that get one: regular expressions, each for the end of a layer's HF name after a dot
    (`v_proj` is every layer of that name, also of the vision tower)."""
    train_merger: bool = False
    """Also train the merger, which projects the vision tower's features to the language model, whole."""

    def __post_init__(self) -> None:
        _positive("lora", "rank", self.rank, zero=True)
        _positive("lora", "alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout!r}; it is a share from 0 to below 1")
        for target in self.target_modules:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"lora.targets has {target!r}, no regular expression: {error}") from error
        if self.rank and not self.target_modules:
            raise ValueError("lora.targets is empty; name the linear layers that get an adapter")

    def match_layers(self, linear: Sequence[str]) -> list[str]:
        """Which of a model's linear layers, by HF name, get an adapter; sorted.

        Raises:
            UserError: None matches a target.
        """
        found: set[str] = set()
        for pattern in self.target_modules:
            matching = {name for name in linear if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)}
            if not matching:
                raise UserError(
                    f"learner.lora.target_modules has {pattern!r}, which is the end of no linear layer's name; "
                    f"there are, for example, {', '.join(linear[-3:])}"
                )
            found |= matching
        return sorted(found)


@dataclass
class LearnerConfig:
    """One learner: `world_size` processes that train one model together."""

    model: str = ""
    """Directory of the HF checkpoint that training starts from."""
    reference_model: str | None = None
    """Directory of the reference model; none takes `model`."""
    world_size: int = 1
    """Processes, one per GPU."""
    zero_stage: int = 3
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimizer, 2 gradients too, 3 weights too."""
    offload: str = "none"
    """What is kept in host memory: `none`, the `optimizer` state (stages 1 to 3), or `all`: the weights too
    (stage 3), which come to the device when a layer needs them."""
    param_persistence_threshold: int = 100_000
    """Under ZeRO 3, tensors of fewer elements than this stay whole on every rank."""
    dtype: str = "auto"
    """`bfloat16`, `float32`, or `auto`: the former on GPUs, the latter on CPUs."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: slower, but long sequences fit."""
    freeze_vision: bool = False
    """Leave the vision tower and its projector as they are."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters alone."""
    micro_batch_tokens: int = 32_768
    """Most tokens in one forward pass, a shared prefix counted once; there is no padding."""
    share_prefixes: bool = True
    """Compute what the samples of a group have in common once; false gives each a sequence of its own,
    with the same gradients."""
    feature_cache_mib: int = 4096
    """Features that each rank keeps of frames that a frozen vision tower, the reference model's included,
    has seen, MiB; 0 keeps none."""
    logprob_chunk_tokens: int = 2_048
    """Sampled tokens whose `[tokens, vocab]` logits exist at one time."""
    mini_batch_size: int = 32
    """Groups in one optimizer step of RL."""
    epochs: int = 1
    """Passes over an iteration's groups."""
    old_logprobs: str = "recompute"
    """`recompute`: the learner's own, before the first update; `engine`: those that came with the
    trajectories."""
    seed: int = 0
    """Seed of the order of minibatches."""
    max_skipped_updates: int = 3
    """Updates in a row whose loss or gradient was no finite number, and which were skipped, that end
    training."""
    replay_dir: str = ""
    """Directory in which batches of skipped updates are kept; empty takes `replay` of the run."""
    max_unreadable_share: float = 0.1
    """Largest share of an iteration's groups with frames that cannot be got again: they are left out."""
    frame_cache_mib: int = 2048
    """Decoded frames that each rank keeps between passes over them, MiB."""
    num_threads: int = 0
    """CPU threads of each rank; 0 leaves torch's own choice."""
    node_group: str = ""
    """Ranks are placed on nodes that have a Ray resource of this name; empty allows all."""
    timeout_s: float = 3600.0
    """How long one call to a rank, or placing the ranks, may take before it counts as hung."""
    max_restarts: int = 3
    """Times in a row that a learner which lost a rank is started again; 0 ends the run at the first loss.
    A step that had not been done before ends the row."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The policy loss."""

    def __post_init__(self) -> None:
        _choice("learner", "zero_stage", self.zero_stage, (0, 1, 2, 3))
        _choice("learner", "offload", self.offload, ("none", "optimizer", "all"))
        _choice("learner", "dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _choice("learner", "old_logprobs", self.old_logprobs, ("recompute", "engine"))
        for key in (
            "world_size",
            "micro_batch_tokens",
            "logprob_chunk_tokens",
            "mini_batch_size",
            "epochs",
            "max_skipped_updates",
            "timeout_s",
        ):
            _positive("learner", key, getattr(self, key))
        for key in (
            "num_threads",
            "param_persistence_threshold",
            "frame_cache_mib",
            "feature_cache_mib",
            "max_restarts",
        ):
            _positive("learner", key, getattr(self, key), zero=True)
        if not 0 <= self.max_unreadable_share <= 1:
            raise ValueError(
                f"learner.max_unreadable_share is {self.max_unreadable_share!r}; it is a share from 0 to 1"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("learner.offload 'optimizer' needs learner.zero_stage 1, 2 or 3; it is 0")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"learner.offload 'all' needs learner.zero_stage 3, it is {self.zero_stage}; "
                "below that, weights are whole on every rank: use 'optimizer'"
            )
        if self.freeze_vision and self.lora.train_merger:
            raise ValueError("learner.lora.train_merger trains what learner.freeze_vision freezes: unset one")

    @property
    def needs_separate_reference(self) -> bool:
        """Whether a reference model, if there is one, must be loaded beside the trained one.

        With adapters it is the model itself without them, unless another is asked for, or what lies under
        them is trained as well.
        """
        other = self.reference_model not in (None, self.model)
        return not self.lora.rank or other or self.lora.train_merger

    def check_max_context(self, max_context: int) -> None:
        """`ValueError` if an episode may have more tokens than a forward pass."""
        if self.micro_batch_tokens < max_context:
            raise ValueError(
                f"learner.micro_batch_tokens is {self.micro_batch_tokens}, below episode.max_context "
                f"({max_context}): an episode of that length could not be learned from; raise the former"
            )
