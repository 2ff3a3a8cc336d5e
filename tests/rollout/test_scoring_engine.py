"""A teacher's log-probs of whole episodes, against the Hugging Face model with token mask and temperature."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import pytest_asyncio

from tests.rollout.hf_reference import EngineVariant, HfReference, build_tiny_checkpoint
from vz_ray.config.rollout import EngineConfig
from vz_ray.env.protocols import Prompt
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    RejectedZoom,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
    ZoomErrorKind,
)
from vz_ray.rollout.scoring_engine import ScoringEngine, _logprobs_at
from vz_ray.video.frame import Frame, ZoomRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "<|im_start|>user\n{images}what flashes?<|im_end|>\n<|im_start|>assistant\n<think>"
OBSERVATION = "<|im_end|>\n<|im_start|>user\n<tool_response>{images}</tool_response><|im_end|>\n<|im_start|>assistant\n"
TURNS = (
    '<think>look closer</think><video_zoom>{"segment":[2,1],"fps":2}</video_zoom>',
    '<think>look closer</think><video_zoom>{"segment":[1,2],"fps":2}</video_zoom>',
    "<answer>A</answer><|im_end|>",
)
ENGINES = [
    pytest.param((EngineVariant(), 0.7), id="qwen2_5_vl"),
    pytest.param((EngineVariant(family="qwen3_vl"), 1.0), id="qwen3_vl"),
    pytest.param((EngineVariant(family="qwen3_5"), 1.0), id="qwen3_5", marks=pytest.mark.slow),
    pytest.param((EngineVariant("cuda"), 0.7), id="cuda", marks=pytest.mark.gpu),
    pytest.param((EngineVariant("cuda", family="qwen3_vl"), 1.0), id="cuda-qwen3_vl", marks=pytest.mark.gpu),
]


@dataclass
class Teacher:
    """An engine, the same model in transformers, and the temperature of the student."""

    engine: ScoringEngine
    reference: HfReference
    variant: EngineVariant
    temperature: float

    def context(self, text: str, frames: Sequence[Frame]) -> TokenContext:
        prompt, grid = self.reference.prompt(text, frames), self.reference.grid
        return TokenContext(
            prompt.compact_ids,
            tuple(grid.patch_grid(*frame.rgb.shape[:2]) for frame in frames),
            tuple(frame.ref for frame in frames),
            self.reference.model.config.image_token_id,
            grid.merge_size,
        )

    def episode(self, frames: Sequence[Frame]) -> Trajectory:
        """Build an episode with a rejected zoom, whose observation has no frames, and a zoom with the last two."""
        images = "".join(f"<frame{i}_time{2.0 * i:.2f}s><image>" for i in range(len(frames) - 2))
        rejected = RejectedZoom(ZoomErrorKind.REVERSED, "reversed", ZoomRequest(2, 1, 2))
        observations = [
            self.context(OBSERVATION.format(images="error"), []),
            self.context(OBSERVATION.format(images="<image><image>"), frames[-2:]),
            None,
        ]
        zooms = [rejected, ZoomRequest(1, 2, 2), None]
        turns = tuple(
            Turn(self.action(text), text, zoom, observation)
            for text, zoom, observation in zip(TURNS, zooms, observations, strict=True)
        )
        prompt = self.context(QUESTION.format(images=images), frames[:-2])
        return Trajectory(EpisodeId(0, "t", 0), "", prompt, turns, EpisodeStatus.ANSWERED)

    def action(self, text: str) -> SampledAction:
        ids = tuple(self.reference.tokenizer.encode(text, add_special_tokens=False))
        versions = (VersionSpan(0, len(ids), 0),)
        return SampledAction(ids, (0.0,) * len(ids), versions, SamplingParams(self.temperature), "end")

    def expected(self, trajectory: Trajectory, frames: Sequence[Frame]) -> list[float]:
        """Return the log-probs of the sampled tokens, turn by turn."""
        logprobs: list[float] = []
        compact, shown = list(trajectory.prompt.compact_ids), len(trajectory.prompt.frame_refs)
        for turn in trajectory.turns:
            prompt = Prompt(tuple(compact), tuple(frames[:shown]), ())
            logprobs += self.reference.logprobs(prompt, turn.action.token_ids, self.temperature)
            compact += turn.action.token_ids
            if turn.observation is not None:
                compact += turn.observation.compact_ids
                shown += len(turn.observation.frame_refs)
        return logprobs

    def frames(self) -> list[Frame]:
        """Return frames of four sizes; those of the overview fill a block of the prefix cache."""
        frame = self.reference.frame
        overview = [frame(i, 4, 3) for i in range(self.variant.overview_frames)]
        return [*overview, frame(100, 2, 5), frame(101, 1, 1), frame(40, 3, 2)]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def teacher(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[Teacher]:
    variant, temperature = request.param
    path = tmp_path_factory.mktemp("teacher")
    model = build_tiny_checkpoint(path / "model", family=variant.family)
    engine = await ScoringEngine.start(
        model, variant.config(engine_config), name="teacher", log_file=path / "engine.log"
    )
    await engine.set_temperature(temperature)
    reference = HfReference(model, engine.banned_token_ids, variant.dtype, variant.device)
    yield Teacher(engine, reference, variant, temperature)
    await engine.shutdown()


async def test_scores_match_the_model_over_turns_and_frame_sizes(teacher: Teacher) -> None:
    frames = teacher.frames()
    trajectory = teacher.episode(frames)
    scores = await teacher.engine.score(trajectory, frames)
    assert len(scores) == sum(trajectory.loss_mask)
    assert teacher.variant.difference(scores, teacher.expected(trajectory, frames)) <= teacher.variant.tolerance


async def test_mask_and_temperature_change_the_scores(teacher: Teacher) -> None:
    """Verify that the comparison detects an engine without them."""
    frames = teacher.frames()
    trajectory = teacher.episode(frames)
    scores = await teacher.engine.score(trajectory, frames)
    plain = replace(teacher, temperature=1.3)
    plain.reference.banned, banned = [], plain.reference.banned
    try:
        assert teacher.variant.difference(scores, plain.expected(trajectory, frames)) > 10 * teacher.variant.tolerance
    finally:
        plain.reference.banned = banned


async def test_cached_prefixes_do_not_change_the_scores(teacher: Teacher) -> None:
    """The first episode fills the cache; the others share its prompt, and one its first turns, too."""
    frames = teacher.frames()
    first = teacher.episode(frames)
    start = teacher.reference.tokenizer.encode("A what flashes?", add_special_tokens=False)
    other_action = teacher.action("A what flashes?" + TURNS[0])
    assert other_action.token_ids[0] == start[0]
    other = replace(first, turns=(replace(first.turns[0], action=other_action), *first.turns[1:]))
    last_action = teacher.action(TURNS[2].replace("A", "what flashes?"))
    same_start = replace(first, turns=(*first.turns[:-1], replace(first.turns[-1], action=last_action)))
    await teacher.engine.score(first, frames)
    cached = []
    for trajectory in (other, same_start, first):
        before = teacher.engine.stats()
        scores = await teacher.engine.score(trajectory, frames)
        after = teacher.engine.stats()
        assert teacher.variant.difference(scores, teacher.expected(trajectory, frames)) <= teacher.variant.tolerance
        cached.append((after.turns - before.turns, after.cached_tokens - before.cached_tokens))
    (requests, from_cache), *again = cached
    assert requests == 1
    assert 0 < from_cache < first.prompt.num_tokens
    assert [requests for requests, _ in again] == [2, 2], "sampled tokens were cached"


async def test_rows_of_both_model_runners_are_read() -> None:
    """Seven tokens, three of them cached; those at 4 and 6 were sampled."""
    ids = (10, 11, 12, 13, 14, 15, 16)
    rows = [None, *({token: SimpleNamespace(logprob=-token / 10)} for token in ids[1:])]
    garbage = [None, *({0: SimpleNamespace(logprob=7.0)} for _ in range(3)), *rows[4:]]
    computed = [None, *rows[4:]]
    for found in (garbage, computed):
        assert _logprobs_at([4, 6], ids, found, 3) == (-1.4, -1.6)
        assert _logprobs_at([3, 6], ids, found, 3) is None
        assert _logprobs_at([3, 6], ids, found, 0) is None, "a wrong number of cached tokens"
    assert _logprobs_at([1, 6], ids, rows, 0) == (-1.1, -1.6)


async def test_longest_episode_is_scored(teacher: Teacher) -> None:
    """An episode may have as many tokens as the student's context."""
    frames = teacher.frames()
    trajectory = teacher.episode(frames)
    limit = teacher.variant.config(EngineConfig()).max_model_len
    last = trajectory.turns[-1]
    ids = last.action.token_ids + (last.action.token_ids[0],) * (limit - trajectory.num_tokens)
    action = replace(teacher.action(""), token_ids=ids, logprobs=(0.0,) * len(ids))
    longest = replace(trajectory, turns=(*trajectory.turns[:-1], replace(last, action=action)))
    assert longest.num_tokens == limit
    assert len(await teacher.engine.score(longest, frames)) == sum(longest.loss_mask)


async def test_resized_frames_are_refused(teacher: Teacher) -> None:
    frames = teacher.frames()
    larger = [*frames[:-1], teacher.reference.frame(41, 3, 3)]
    with pytest.raises(ValueError, match=r"teacher reads .* the image processors of teacher and student differ"):
        await teacher.engine.score(teacher.episode(frames), larger)
