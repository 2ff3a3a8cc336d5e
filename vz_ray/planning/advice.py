"""Config changes that make a run fit the GPUs.

Each candidate change is planned, so the reported savings are computed rather than estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vz_ray.config.run import GrpoRunConfig
from vz_ray.families import ModelShape
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.config_changes import format_setting, with_values
from vz_ray.planning.planner import PlannableConfig, ResourcePlan, make_plan
from vz_ray.planning.sequence_parallel import SIZES, sequence_parallel_problem
from vz_ray.utils.errors import UserError

BytesOver = Callable[[ResourcePlan], int]
"""Returns the bytes that a component's GPU lacks under a plan."""

MIN_CHUNK_TOKENS = 256
"""Minimum chunk of logits; smaller chunks are dominated by kernel launches."""
TILE_TOKENS = 8192
"""Recommended tile of the MLPs: large matrix products, and intermediates of a few hundred MiB."""
MAX_SLICE_PATCHES = 16_384
"""Recommended slice of the vision tower: 32 frames of 128 visual tokens."""


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """New values of one or several settings.

    Attributes:
        settings: Overrides as written on the command line.
        cost: Cost of the change.
        bytes_over_before: Missing bytes without the change.
        bytes_over_after: Missing bytes with the change; 0 or less means that the run fits.
    """

    settings: tuple[str, ...]
    cost: str
    bytes_over_before: int
    bytes_over_after: int

    @property
    def bytes_saved(self) -> int:
        return self.bytes_over_before - self.bytes_over_after


@dataclass(frozen=True, slots=True)
class MemoryAdvice:
    """Advice for the GPUs of one component.

    Attributes:
        component: `learner` or `engine`.
        single_changes: Single changes that save memory, cheapest first.
        combined_change: Minimal set of changes with which the component fits; None if all changes together
            do not suffice.
    """

    component: str
    single_changes: tuple[ConfigChange, ...]
    combined_change: ConfigChange | None


@dataclass(frozen=True, slots=True)
class _Setting:
    """One value of config keys that change together."""

    keys: tuple[str, ...]
    value: object
    cost: str

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(format_setting(key, self.value) for key in self.keys)


@dataclass(frozen=True, slots=True)
class _Tunable:
    """Candidate values of config keys that change together, mildest first."""

    keys: tuple[str, ...]
    values: Sequence[object]
    cost: str

    @property
    def settings(self) -> list[_Setting]:
        return [_Setting(self.keys, value, self.cost) for value in self.values]


@dataclass(frozen=True, slots=True)
class _ConfigSearch:
    """Plans variants of a config and returns the bytes that one component lacks."""

    config: PlannableConfig
    shape: ModelShape
    assumptions: Assumptions
    bytes_over: BytesOver

    def plan_bytes_over(self, settings: Sequence[_Setting]) -> int | None:
        """Return the missing bytes with the settings, or None if the config is invalid."""
        config = self.config
        try:
            for setting in settings:
                config = with_values(config, dict.fromkeys(setting.keys, setting.value))
            return self.bytes_over(make_plan(config, self.assumptions, self.shape))
        except (UserError, ValueError):
            return None

    def best(self, tunable: _Tunable, chosen: Sequence[_Setting]) -> tuple[_Setting, int] | None:
        """Return the mildest value that fits on top of `chosen`, or the one with the fewest missing bytes."""
        best: tuple[_Setting, int] | None = None
        for setting in tunable.settings:
            over = self.plan_bytes_over([*chosen, setting])
            if over is None:
                continue
            if best is None or over < best[1]:
                best = (setting, over)
            if over <= 0:
                break
        return best

    def minimal(self, settings: Sequence[_Setting]) -> list[_Setting]:
        """Drop settings, most expensive first, without which the run still fits."""
        kept = list(settings)
        for setting in reversed(settings):
            fewer = [other for other in kept if other is not setting]
            over = self.plan_bytes_over(fewer)
            if over is not None and over <= 0:
                kept = fewer
        return kept


def advise(config: PlannableConfig, plan: ResourcePlan, assumptions: Assumptions) -> list[MemoryAdvice]:
    """Return advice for each component that does not fit."""
    advice = []
    if plan.learner_bytes_over > 0:
        search = _ConfigSearch(config, plan.shape, assumptions, lambda plan: plan.learner_bytes_over)
        advice.append(_search(search, "learner", plan.learner_bytes_over, _learner_tunables(config, plan)))
    if plan.engine_bytes_over > 0 and isinstance(config, GrpoRunConfig):
        search = _ConfigSearch(config, plan.shape, assumptions, lambda plan: plan.engine_bytes_over)
        advice.append(_search(search, "engine", plan.engine_bytes_over, _engine_tunables(config, plan)))
    return advice


def _search(search: _ConfigSearch, component: str, over_before: int, tunables: Sequence[_Tunable]) -> MemoryAdvice:
    """Evaluate each tunable alone, and add tunables greedily until the component fits."""
    single: list[ConfigChange] = []
    chosen: list[_Setting] = []
    over = over_before
    for tunable in tunables:
        candidate = search.best(tunable, [])
        if candidate and candidate[1] < over_before:
            single.append(ConfigChange(candidate[0].overrides, tunable.cost, over_before, candidate[1]))
        if over > 0 and (best := search.best(tunable, chosen)) and best[1] < over:
            chosen.append(best[0])
            over = best[1]
    if over > 0:
        return MemoryAdvice(component, tuple(single), None)
    chosen = search.minimal(chosen)
    over_after = search.plan_bytes_over(chosen)
    assert over_after is not None
    settings = tuple(override for setting in chosen for override in setting.overrides)
    cost = "; ".join(setting.cost for setting in chosen)
    return MemoryAdvice(component, tuple(single), ConfigChange(settings, cost, over_before, over_after))


def _learner_tunables(config: PlannableConfig, plan: ResourcePlan) -> list[_Tunable]:
    learner = config.learner
    shards = [
        size
        for size in SIZES
        if size > learner.sequence_parallel_size
        and learner.world_size % size == 0
        and sequence_parallel_problem(plan.shape, size) is None
    ]
    max_context = config.episode.max_context
    budgets = sorted({max(max_context, learner.micro_batch_tokens // 2**k) for k in range(1, 6)}, reverse=True)
    tunables: list[tuple[str, Sequence[object], str]] = [
        ("logprob_chunk_tokens", _halvings(learner.logprob_chunk_tokens, MIN_CHUNK_TOKENS), "negligible"),
        (
            "mlp_tile_tokens",
            [TILE_TOKENS] * (not learner.mlp_tile_tokens),
            "smaller matrix products" if learner.gradient_checkpointing else "one more forward pass of the MLPs",
        ),
        (
            "micro_batch_tokens",
            [budget for budget in budgets if budget < learner.micro_batch_tokens],
            "more, smaller passes",
        ),
        (
            "vision_slice_patches",
            [MAX_SLICE_PATCHES] * (not learner.vision_slice_patches and not learner.freeze_vision),
            "one more forward pass of the vision tower",
        ),
        ("zero_stage", range(learner.zero_stage + 1, 4), "communication"),
        ("gradient_checkpointing", [True] * (not learner.gradient_checkpointing), "a third more FLOPs"),
        ("sequence_parallel_size", shards, "an exchange of heads and tokens in each layer"),
        ("offload", ["optimizer"] * (learner.offload == "none"), "optimizer step on CPUs, host memory"),
        (
            "offload",
            ["all"] * (learner.offload != "all"),
            "optimizer step on CPUs, weights copied for each pass, host memory",
        ),
        ("world_size", [learner.world_size * k for k in (2, 4, 8)], "GPUs"),
        ("freeze_vision", [True] * (not learner.freeze_vision), "the vision tower is not trained"),
        ("lora.rank", [32] * (not learner.lora.rank), "only adapters are trained"),
    ]
    # On shared GPUs there is one engine per rank.
    shared = ("rollout.num_workers",) if isinstance(config, GrpoRunConfig) and config.shares_gpus else ()
    return [
        _Tunable((f"learner.{key}", *(shared if key == "world_size" else ())), list(values), cost)
        for key, values, cost in tunables
    ]


def _engine_tunables(config: GrpoRunConfig, plan: ResourcePlan) -> list[_Tunable]:
    engine, text = config.rollout.engine, plan.shape.text
    sizes = [k * engine.tensor_parallel_size for k in (2, 4, 8)]
    sizes = [k for k in sizes if text.heads % k == text.kv_heads % min(k, text.kv_heads) == 0]
    utilizations = [value for value in (0.9, 0.95) if value > engine.gpu_memory_utilization]
    tunables: list[tuple[str, Sequence[object], str]] = [
        ("kv_cache_gib", [None] * (engine.kv_cache_gib is not None), "none: it uses the free memory"),
        ("gpu_memory_utilization", utilizations, "memory for other processes"),
        ("dtype", ["bfloat16"] * (engine.dtype == "float32"), "precision"),
        ("tensor_parallel_size", sizes, "GPUs"),
    ]
    return [_Tunable((f"rollout.engine.{key}",), list(values), cost) for key, values, cost in tunables]


def _halvings(value: int, minimum: int) -> list[int]:
    values = []
    while value // 2 >= minimum:
        value //= 2
        values.append(value)
    return values
