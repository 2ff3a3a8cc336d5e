"""What to change where something does not fit.

Each change is planned anew, so that what it promises is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

from vz_ray.config.run import GrpoRunConfig
from vz_ray.planning.model_shape import ModelShape
from vz_ray.planning.planner import Assumptions, PlannableConfig, ResourcePlan, make_plan
from vz_ray.utils.errors import UserError

BytesOver = Callable[[ResourcePlan], int]
"""Bytes that some GPU lacks under a plan."""

MIN_CHUNK_TOKENS = 256
"""Fewer tokens than this leave a GPU waiting for kernels."""


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """One setting, or several, given another value.

    Attributes:
        settings: As they are written on the command line.
        cost: What is paid for it.
        bytes_over_before: Bytes that were lacking.
        bytes_over_after: Bytes that are lacking then; 0 or less means that it fits.
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
    """For one kind of GPU.

    Attributes:
        component: Whose.
        single_changes: Each change by itself, cheapest first; those that save nothing are left out.
        combined_change: The fewest of them, cheapest first, with which it fits; None if not even all do.
    """

    component: str
    single_changes: tuple[ConfigChange, ...]
    combined_change: ConfigChange | None


@dataclass(frozen=True, slots=True)
class _Setting:
    """One setting given one value."""

    key: str
    value: object
    costs: str

    def __str__(self) -> str:
        value = self.value
        plain = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        return f"{self.key}={plain}"


@dataclass(frozen=True, slots=True)
class _Tunable:
    """Values of one setting to try, mildest first."""

    key: str
    values: Sequence[object]
    costs: str

    @property
    def turns(self) -> list[_Setting]:
        return [_Setting(self.key, value, self.costs) for value in self.values]


@dataclass(frozen=True, slots=True)
class _ConfigSearch:
    """Plans a config anew with some settings turned, and says what one kind of GPU then lacks."""

    config: PlannableConfig
    shape: ModelShape
    assumed: Assumptions
    over: BytesOver

    def lacking(self, turns: Sequence[_Setting]) -> int | None:
        """Bytes; None where such a config is refused."""
        config = self.config
        try:
            for turn in turns:
                config = _with(config, turn.key, turn.value)
            return self.over(make_plan(config, self.assumed, self.shape))
        except (UserError, ValueError):
            return None

    def best(self, knob: _Tunable, so_far: Sequence[_Setting]) -> tuple[_Setting, int] | None:
        """The mildest value with which it fits, or the one that lacks least."""
        best: tuple[_Setting, int] | None = None
        for turn in knob.turns:
            lacking = self.lacking([*so_far, turn])
            if lacking is not None and (best is None or lacking < best[1]):
                best = (turn, lacking)
            if lacking is not None and lacking <= 0:
                break
        return best

    def needed(self, turns: Sequence[_Setting]) -> list[_Setting]:
        """Without those that later ones made needless, dearest first."""
        kept = list(turns)
        for turn in reversed(turns):
            fewer = [other for other in kept if other is not turn]
            lacking = self.lacking(fewer)
            if lacking is not None and lacking <= 0:
                kept = fewer
        return kept


def advise(config: PlannableConfig, plan: ResourcePlan, assumed: Assumptions) -> list[MemoryAdvice]:
    """For each kind of GPU that does not hold what it must."""
    found = []
    if plan.learner_bytes_over > 0:
        search = _ConfigSearch(config, plan.shape, assumed, _learner_over)
        found.append(_of("learner", search, plan.learner_bytes_over, _learner_knobs(config)))
    if plan.engine_bytes_over > 0 and isinstance(config, GrpoRunConfig):
        search = _ConfigSearch(config, plan.shape, assumed, _engine_over)
        found.append(_of("engine", search, plan.engine_bytes_over, _engine_knobs(config, plan)))
    return found


def _learner_over(plan: ResourcePlan) -> int:
    return plan.learner_bytes_over


def _engine_over(plan: ResourcePlan) -> int:
    return plan.engine_bytes_over


def _of(who: str, search: _ConfigSearch, before: int, knobs: Sequence[_Tunable]) -> MemoryAdvice:
    alone: list[ConfigChange] = []
    chosen: list[_Setting] = []
    least = before
    for knob in knobs:
        single = search.best(knob, [])
        if single and single[1] < before:
            alone.append(ConfigChange((str(single[0]),), knob.costs, before, single[1]))
        if least > 0 and (best := search.best(knob, chosen)) and best[1] < least:
            chosen.append(best[0])
            least = best[1]
    if least > 0:
        return MemoryAdvice(who, tuple(alone), None)
    chosen = search.needed(chosen)
    lacking = search.lacking(chosen)
    assert lacking is not None
    settings, costs = tuple(map(str, chosen)), "; ".join(turn.costs for turn in chosen)
    return MemoryAdvice(who, tuple(alone), ConfigChange(settings, costs, before, lacking))


def _learner_knobs(config: PlannableConfig) -> list[_Tunable]:
    learner = config.learner
    length = config.episode.max_context
    budgets = sorted({max(length, learner.micro_batch_tokens // 2**k) for k in range(1, 6)}, reverse=True)
    knobs: list[tuple[str, Sequence[object], str]] = [
        ("logprob_chunk_tokens", _halves(learner.logprob_chunk_tokens, MIN_CHUNK_TOKENS), "next to nothing"),
        (
            "micro_batch_tokens",
            [b for b in budgets if b < learner.micro_batch_tokens],
            "more, smaller passes",
        ),
        ("zero_stage", range(learner.zero_stage + 1, 4), "communication"),
        ("gradient_checkpointing", [True] * (not learner.gradient_checkpointing), "a third more arithmetic"),
        ("offload", ["optimizer"] * (learner.offload == "none"), "an optimizer step on CPUs, host memory"),
        (
            "offload",
            ["all"] * (learner.offload != "all"),
            "an optimizer step on CPUs, weights copied for each pass, host memory",
        ),
        ("ranks", [learner.world_size * k for k in (2, 4, 8)], "GPUs"),
        ("freeze_vision", [True] * (not learner.freeze_vision), "the vision tower learns nothing"),
    ]
    return [_Tunable(f"learner.{name}", list(values), costs) for name, values, costs in knobs]


def _engine_knobs(config: GrpoRunConfig, plan: ResourcePlan) -> list[_Tunable]:
    engine = config.rollout.engine
    text = plan.shape.text
    parts = [k * engine.tensor_parallel_size for k in (2, 4, 8)]
    parts = [k for k in parts if text.heads % k == text.kv_heads % min(k, text.kv_heads) == 0]
    knobs: list[tuple[str, Sequence[object], str]] = [
        ("kv_cache_gib", [None] * (engine.kv_cache_gib is not None), "nothing: it takes what there is"),
        (
            "gpu_memory",
            [s for s in (0.9, 0.95) if s > engine.gpu_memory_utilization],
            "room for other processes",
        ),
        ("dtype", ["bfloat16"] * (engine.dtype == "float32"), "precision"),
        ("tensor_parallel", parts, "GPUs"),
    ]
    return [_Tunable(f"rollout.engine.{name}", list(values), costs) for name, values, costs in knobs]


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _with(config: PlannableConfig, key: str, value: object) -> PlannableConfig:
    """A copy of `config` with the dotted `key` set; its checks are made again.

    Raises:
        ValueError: The config refuses that value.
    """
    changed: Any = value
    names = key.split(".")
    for depth in reversed(range(len(names))):
        section: Any = reduce(getattr, names[:depth], config)
        changed = replace(section, **{names[depth]: changed})
    return cast(PlannableConfig, changed)
