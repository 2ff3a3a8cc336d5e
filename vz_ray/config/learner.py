"""Config of the learner; the defaults are the paper's RL recipe for the 7B model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vz_ray.config.fields import InvalidValueError, Section, choice, derived, number
from vz_ray.config.loss import LossConfig
from vz_ray.config.timeouts import timeout
from vz_ray.utils.errors import UserError


@dataclass
class OptimizerConfig(Section):
    """AdamW and its learning rate schedule."""

    learning_rate: float = number(1e-6, above=0)
    """Peak learning rate (paper: RL stage)."""
    lr_schedule: str = choice("constant", "cosine")
    """`constant`, or `cosine` from the peak down to 0 at `total_steps`."""
    warmup_ratio: float = number(0.0, minimum=0, maximum=1)
    """Fraction of `total_steps` with linear warmup."""
    total_steps: int = number(1, above=0)
    """Optimizer steps of the schedule; not used by `constant` without warmup."""
    beta1: float = number(0.9, minimum=0, below=1)
    """Decay of the first moment."""
    beta2: float = number(0.999, minimum=0, below=1)
    """Decay of the second moment."""
    epsilon: float = number(1e-8, above=0)
    """Term added to the denominator."""
    weight_decay: float = number(0.01, minimum=0)
    """Decoupled weight decay."""
    max_grad_norm: float = number(1.0, minimum=0)
    """Maximum global 2-norm of the gradient; 0 disables clipping."""


ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM allocates memory of an adapter (`max_lora_rank`)."""


@dataclass
class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: int = number(0, minimum=0)
    """Rank of the adapters; 0 trains the full weights."""
    alpha: float = number(32.0, above=0)
    """Scale of the adapters: an adapter adds B A x times `alpha / rank`."""
    dropout: float = number(0.0, minimum=0, below=1)
    """Dropout of an adapter's inputs."""
    target_modules: list[str] = field(
        default_factory=lambda: [
            r"language_model\..*\.(q|k|v|o)_proj",
            r"language_model\..*\.(gate|up|down)_proj",
        ]
    )
    """Linear layers with an adapter: regular expressions for the end of a layer's HF name after a dot
    (`v_proj` matches every layer of that name, including the vision tower's)."""
    train_merger: bool = False
    """Also train the full weights of the merger, which projects visual features to the language model."""
    publish: str = choice("auto", "adapters", "merged")
    """What engines receive. `adapters`: the adapters, which vLLM applies beside the checkpoint's weights; layers of
    the language model only. `merged`: all weights, with the adapters added. `auto`: adapters if all targets begin with
    `language_model\\.`, the rank is at most 512 and the merger is not trained, else merged."""
    publishes_adapters: bool = derived(False, "publishes_adapters", "learner.lora.publish")
    """Whether engines receive the adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.target_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InvalidValueError(
                    "target_modules", f"has {pattern!r}, which is not a regular expression: {error}"
                ) from error
        if self.rank and not self.target_modules:
            raise InvalidValueError("target_modules", "is empty; with rank above 0 it must name linear layers", "rank")
        self._check_publish()

    @property
    def engine_rank(self) -> int:
        """Rank for which engines allocate the adapters."""
        return next((rank for rank in ENGINE_RANKS if rank >= self.rank), self.rank)

    @property
    def chooses_adapters(self) -> bool:
        """Whether `publish` chooses the adapters in a run whose engines hold no other model."""
        if not self.rank or self.publish == "merged":
            return False
        text_only = all(target.startswith(r"language_model\.") for target in self.target_modules)
        return self.publish == "adapters" or (text_only and self.rank <= ENGINE_RANKS[-1] and not self.train_merger)

    def _check_publish(self) -> None:
        """Check that vLLM supports published adapters, as far as that does not depend on the model."""
        if self.publish != "adapters":
            return
        if not self.rank:
            raise InvalidValueError("publish", "is 'adapters' and rank is 0; there are no adapters, use 'auto'", "rank")
        if self.rank > ENGINE_RANKS[-1]:
            raise InvalidValueError(
                "rank",
                f"is {self.rank}; published adapters have at most {ENGINE_RANKS[-1]}. Set publish=merged",
                "publish",
            )
        if self.train_merger:
            raise InvalidValueError(
                "train_merger", "is true; adapters do not hold the merger's weights. Set publish=merged", "publish"
            )

    def match_layers(self, linear_layers: Sequence[str]) -> list[str]:
        """Return the sorted HF names of the linear layers that get an adapter.

        Raises:
            UserError: A target matches no layer.
        """
        return match_layers(self.target_modules, linear_layers)


def match_layers(targets: Sequence[str], linear_layers: Sequence[str]) -> list[str]:
    """Return the sorted HF names of the linear layers that `LoraConfig.target_modules` match.

    Raises:
        UserError: A target matches no layer.
    """
    matches: set[str] = set()
    for pattern in targets:
        pattern_matches = {name for name in linear_layers if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)}
        if not pattern_matches:
            raise UserError(
                f"learner.lora.target_modules has {pattern!r}, which matches no linear layer; "
                f"examples of layers: {', '.join(linear_layers[-3:])}"
            )
        matches |= pattern_matches
    return sorted(matches)


@dataclass
class LearnerConfig(Section):
    """The learner: `world_size` processes that train one model."""

    model: str = derived("", "model")
    """Checkpoint directory (HF format) of the initial model."""
    reference_model: str | None = None
    """Checkpoint directory of the reference model; default `model`."""
    world_size: int = number(1, minimum=1)
    """Processes, one per GPU."""
    sequence_parallel_size: int = number(1, minimum=1)
    """Ranks that share each sequence: each holds a part of its tokens in all layers, and computes attention for a
    part of the heads (Ulysses). Divides `world_size` and the heads of the model."""
    zero_stage: int = number(3, minimum=0, maximum=3)
    """DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimizer, 2 also gradients, 3 also weights."""
    offload: str = choice("none", "optimizer", "all")
    """State in host memory: `none`, `optimizer` (stages 1 to 3), or `all`: also the weights, which are copied
    to the GPU per layer (stage 3)."""
    param_persistence_threshold: int = number(100_000, minimum=0)
    """ZeRO 3: tensors with fewer elements stay replicated on every rank."""
    dtype: str = choice("auto", "bfloat16", "float32")
    """`bfloat16`, `float32`, or `auto`: `bfloat16` on GPUs, `float32` on CPUs."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, slower."""
    freeze_vision: bool = False
    """Freeze the vision tower and its merger."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    micro_batch_tokens: int = number(32_768, minimum=1)
    """Maximum tokens of one forward pass, without padding; a shared prefix counts once."""
    vision_slice_patches: int = number(0, minimum=0)
    """Maximum patches of one pass of the vision tower. More frames pass in slices, which a trained tower recomputes
    in the backward pass: memory does not grow with the frames of a micro-batch. 0: all frames in one pass."""
    mlp_tile_tokens: int = number(0, minimum=0)
    """Maximum tokens of a tile of the language model's MLPs or experts. Longer sequences are computed in tiles, which
    the backward pass computes again: a layer's intermediates exist for one tile. With `gradient_checkpointing` this
    takes no further forward pass. 0: all tokens at once."""
    share_prefixes: bool = True
    """Compute the shared prefix of a group's samples once; false computes each sample alone, with equal
    gradients."""
    prefetch_batches: int = number(1, minimum=0)
    """Forward passes whose inputs a thread prepares ahead; 0 prepares each directly before its use."""
    feature_cache_mib: int = number(4096, minimum=0)
    """Cache per rank, in MiB, of frame features from frozen vision towers, including the reference model's; 0
    disables it."""
    logprob_chunk_tokens: int = number(2_048, minimum=1)
    """Sampled tokens per chunk of `[tokens, vocab]` logits."""
    mini_batch_size: int = number(32, minimum=1)
    """Groups per optimizer step of RL."""
    epochs: int = number(1, minimum=1)
    """Passes over the groups of a step."""
    old_logprobs: str = choice("recompute", "engine")
    """Old log-probs of the loss. `recompute`: computed by the learner before the first update; `engine`:
    sampled by the engine."""
    seed: int = number(0, minimum=0)
    """Seed of the mini-batch order."""
    max_skipped_updates: int = number(3, minimum=1)
    """Consecutive updates with a non-finite loss or gradient after which training stops."""
    replay_dir: str = ""
    """Directory for the batches of skipped updates; default `replay` in the run directory."""
    max_unreadable_share: float = number(0.1, minimum=0, maximum=1)
    """Maximum share of a step's groups that are skipped because their frames cannot be decoded again."""
    frame_cache_mib: int | None = number(None, minimum=0)
    """Maximum cache of decoded frames per rank in MiB, for repeated passes over a step's frames; null allows as
    much as a step's largest possible frames need, up to 8 GiB."""
    step_frames_mib: int = derived(2048, "step_frames_mib", "episode.max_images")
    """Maximum size of a step's frames per rank, in MiB."""
    cpus_per_rank: float = number(1.0, above=0)
    """CPUs that Ray reserves per rank, and PyTorch's CPU threads per rank (at least 1); more shorten the optimizer
    step of offloaded states."""
    node_group: str = ""
    """Ray resource of the nodes for the ranks; empty allows every node."""
    timeout_s: float = timeout("learner_call_s")
    """Timeout of one call to a rank, and of the placement of all ranks."""
    max_restarts: int = number(3, minimum=0)
    """Consecutive restarts after a lost rank; a new step resets the count. 0 stops the run at the first
    loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Policy loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size % self.sequence_parallel_size:
            raise InvalidValueError(
                "sequence_parallel_size",
                f"is {self.sequence_parallel_size}; it must divide world_size ({self.world_size})",
                "world_size",
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise InvalidValueError("offload", "is 'optimizer'; it requires zero_stage 1, 2 or 3", "zero_stage")
        if self.offload == "all" and self.zero_stage != 3:
            raise InvalidValueError(
                "offload",
                f"is 'all' and zero_stage is {self.zero_stage}; 'all' requires zero_stage 3, use 'optimizer'",
                "zero_stage",
            )
        if self.old_logprobs == "engine" and self.loss.corrects_engine:
            key = "loss.rejection" if self.loss.tis_cap is None else "loss.tis_cap"
            raise InvalidValueError(
                "old_logprobs",
                f"is 'engine', so that {key} has no effect: old and engine log-probs are equal; set it to 'recompute'",
                key,
            )
        if self.freeze_vision and self.lora.train_merger:
            raise InvalidValueError(
                "lora.train_merger", "is true and freeze_vision is true; unset one of them", "freeze_vision"
            )

    @property
    def frame_cache_bytes(self) -> int:
        """Maximum size of the cache of decoded frames."""
        return (self.step_frames_mib if self.frame_cache_mib is None else self.frame_cache_mib) << 20

    @property
    def num_threads(self) -> int:
        """PyTorch's CPU threads per rank."""
        return max(1, int(self.cpus_per_rank))

    @property
    def needs_separate_reference(self) -> bool:
        """True if the reference model, if any, must be loaded besides the trained model.

        With adapters, the trained model without them is the reference, unless `reference_model` is another
        model or the merger is trained too.
        """
        other = self.reference_model not in (None, self.model)
        return not self.lora.rank or other or self.lora.train_merger

    def check_max_context(self, section: str, max_context: int) -> None:
        """Check that an episode of `max_context` tokens fits in one forward pass.

        Args:
            section: Key of this section, for the error.
        """
        if self.micro_batch_tokens < max_context:
            raise InvalidValueError(
                f"{section}.micro_batch_tokens",
                f"is {self.micro_batch_tokens}; it must be at least episode.max_context ({max_context}), or the "
                "longest episodes cannot be trained on",
                "episode.max_context",
            )

    def check_constant_schedule(self, section: str, schedule_key: str) -> None:
        """Check that the learning rate schedule is left to the SFT stage.

        Args:
            section: Key of this section, for the error.
            schedule_key: Key to set instead.
        """
        if self.optimizer.lr_schedule != "constant":
            raise InvalidValueError(
                f"{section}.optimizer.lr_schedule",
                f"is {self.optimizer.lr_schedule!r}; set {schedule_key} instead",
            )
