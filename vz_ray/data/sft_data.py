"""Training data of SFT: files in the SFT format, or episode files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.episode_record import read_records
from vz_ray.data.sft_file import SftFile
from vz_ray.env.protocols import FrameSource
from vz_ray.env.trajectory import Trajectory
from vz_ray.utils.errors import UserError


def read_sft_data(config: SftRunConfig) -> SftFile | list[Trajectory]:
    """Read `config.data`. The first record decides between the SFT format and episode files.

    Raises:
        UserError: The file has neither format, or a record is invalid; names the record.
    """
    path = Path(config.data)
    match _first_record(path):
        case [] | {"messages": _}:
            return SftFile.load(path)
        case {"trajectory": _}:
            return read_episodes(config)
    raise UserError(
        f"{path} contains neither SFT samples (a JSON list of objects with messages and images) nor "
        "episodes (JSON lines with a trajectory)"
    )


def _first_record(path: Path) -> Any:
    """Return `[]` for a JSON list, else the value of the first line; None if it is not JSON."""
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
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Trajectory]:
    """Encode the samples of an SFT file as trajectories in the model's tokens.

    Args:
        source: The SFT file.
        config: Model, prompt and limits.
        frames: Source of the images.
        on_progress: Called with the number of samples encoded since the last call.

    Raises:
        UserError: An image cannot be read, or a trajectory exceeds `episode.max_context`.
    """
    chat_format, episode = load_chat_format(config.model, config.episode), config.episode
    size = chat_format.grid.frame_size(episode.min_pixels, episode.max_pixels)
    trajectories = await source.load_trajectories(chat_format, size, frames, on_progress)
    check_lengths(source.path, trajectories, episode)
    return trajectories


def read_episodes(config: SftRunConfig) -> list[Trajectory]:
    """Read the episodes of `config.data`, and check their chat format and length.

    Raises:
        UserError: A trajectory has another chat format or exceeds `episode.max_context`; names it.
    """
    path = Path(config.data)
    try:
        trajectories = [record.trajectory for record in read_records(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid episode file: {error!r}") from error
    if not trajectories:
        raise UserError(f"{path} contains no trajectories")
    chat_format = load_chat_format(config.model, config.episode).name
    for trajectory in trajectories:
        if trajectory.chat_format != chat_format:
            raise UserError(
                f"{path}: trajectory {trajectory.id} has the chat format {trajectory.chat_format}, and "
                f"{config.model} with {config.episode.prompt} has {chat_format}; set model and "
                "episode.prompt to those of the trajectory"
            )
    check_lengths(path, trajectories, config.episode)
    return trajectories


def check_lengths(path: Path, trajectories: Sequence[Trajectory], episode: EpisodeConfig) -> None:
    """Raise `UserError` if a trajectory exceeds `episode.max_context`."""
    for trajectory in trajectories:
        if trajectory.num_tokens > episode.max_context:
            raise UserError(
                f"{path}: trajectory {trajectory.id} has {trajectory.num_tokens} tokens, above "
                f"episode.max_context ({episode.max_context})"
            )
