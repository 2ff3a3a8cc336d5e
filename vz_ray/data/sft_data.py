"""What a supervised run learns from: samples of the SFT layout, or episodes of this project."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.episode_record import read_records
from vz_ray.data.sft_file import SftFile
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import Trajectory
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameSize


def read_sft_data(config: SftRunConfig) -> SftFile | list[Trajectory]:
    """What `config.data` holds, told apart by its first record: samples of the SFT layout, or episodes.

    Raises:
        UserError: It holds neither, or what it holds is not as it should be; the message names it.
    """
    path = Path(config.data)
    match _beginning(path):
        case [] | {"messages": _}:
            return SftFile.load(path)
        case {"trajectory": _}:
            return read_episodes(config)
    raise UserError(
        f"{path} holds neither samples (a JSON list of objects with messages and images) nor episodes of "
        "this project (a line each, with a trajectory)"
    )


def _beginning(path: Path) -> Any:
    """`[]` where a list begins, else what the first line says; None if that is no JSON."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = next((line for line in file if line.strip()), "")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        return None
    if line.lstrip().startswith("["):
        return []
    try:
        return json.loads(line)
    except ValueError:
        return None


async def read_samples(
    source: SftFile,
    config: SftRunConfig,
    frames: FrameSource,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Trajectory]:
    """The trajectories of a file of samples, in the model's own tokens; their images come from `frames`.

    Raises:
        UserError: An image cannot be read, or a trajectory is longer than an episode may be.
    """
    wire, episode = load_chat_format(config.model, config.episode), config.episode
    size = FrameSize(episode.min_pixels, episode.max_pixels)
    trajectories = await source.load_trajectories(wire, size, frames, advance)
    check_lengths(source.path, trajectories, episode)
    return trajectories


def read_episodes(config: SftRunConfig) -> list[Trajectory]:
    """The episodes of `config.data`, of the wording and within the limits of `config.episode`.

    Raises:
        UserError: One is not; the message names it, and the value.
    """
    path = Path(config.data)
    try:
        trajectories = [record.trajectory for record in read_records(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of episodes: {error!r}") from error
    if not trajectories:
        raise UserError(f"{path} holds no trajectories")
    wire = load_chat_format(config.model, config.episode).name
    for trajectory in trajectories:
        if trajectory.chat_format != wire:
            raise UserError(
                f"{path}: trajectory {trajectory.id} is written as {trajectory.chat_format}, and {config.model} "
                f"with {config.episode.prompt} writes {wire}: set episode.prompt and model to those it was "
                "made with"
            )
    check_lengths(path, trajectories, config.episode)
    return trajectories


def check_lengths(path: Path, trajectories: Sequence[Trajectory], episode: EpisodeConfig) -> None:
    """`UserError` that names a trajectory which is longer than an episode may be."""
    for trajectory in trajectories:
        if trajectory.num_tokens > episode.max_context:
            raise UserError(
                f"{path}: trajectory {trajectory.id} has {trajectory.num_tokens} tokens, above "
                f"episode.max_context ({episode.max_context})"
            )


def load_chat_format(model: Path | str, episode: EpisodeConfig) -> ChatFormat:
    """The wire format of a checkpoint directory under these rules."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    return ChatFormat(tokenizer, PromptTemplate.load(episode.prompt), compat=episode.chat_format == "compat")
