"""Chat format of a checkpoint: its tokenizer, frame grid and chat template, with the prompts of an episode."""

from __future__ import annotations

from pathlib import Path

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.prompt_template import PromptTemplate
from vz_ray.families import ImageProcessorSettings, ModelFamily, load_family
from vz_ray.utils.errors import UserError


def check_episode_format(model: Path | str, episode: EpisodeConfig) -> None:
    """Check that chat format and frame size suit a checkpoint directory; loads no tokenizer.

    Raises:
        UserError: The family does not support the chat format, or the bounds on the frame area do not suit its
            frame grid or image processor.
    """
    _checked_settings(model, episode)


def _checked_settings(model: Path | str, episode: EpisodeConfig) -> tuple[ModelFamily, ImageProcessorSettings]:
    """Return family and image processor of a checkpoint; see `check_episode_format`."""
    family = load_family(model)
    if episode.chat_format not in family.chat_formats:
        raise UserError(
            f"{family.name}: episode.chat_format is {episode.chat_format}; supported: "
            f"{', '.join(family.chat_formats)}. compat is the format of weights released for another family."
        )
    settings = ImageProcessorSettings.load(model, family)
    settings.check_bounds(episode.min_pixels, episode.max_pixels)
    return family, settings


def load_chat_format(model: Path | str, episode: EpisodeConfig) -> ChatFormat:
    """Load the chat format for a checkpoint directory and the episode settings.

    Raises:
        UserError: See `check_episode_format`; or the checkpoint has no chat template, or the template has not
            the mode `episode.thinking`.
    """
    from transformers import AutoTokenizer

    family, settings = _checked_settings(model, episode)
    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    if not tokenizer.chat_template:
        raise UserError(f"{family.name}: the tokenizer of model {str(model)!r} has no chat_template. Copy it again.")
    chat_format = ChatFormat(
        tokenizer,
        PromptTemplate.load(episode.prompt),
        grid=settings.grid,
        frame_text=family.frame_text,
        compat=episode.chat_format == "compat",
        thinking=episode.thinking,
    )
    if episode.thinking != "auto" and chat_format.opens_reasoning != (episode.thinking == "on"):
        behavior, other = ("always opens", "on") if chat_format.opens_reasoning else ("never opens", "off")
        raise UserError(
            f"{family.name}: episode.thinking is {episode.thinking}, and the chat template of {str(model)!r} "
            f"{behavior} <think>; supported: auto, {other}"
        )
    return chat_format
