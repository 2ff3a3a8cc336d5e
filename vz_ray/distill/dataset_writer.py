"""A directory that a data set is read from, by this project and by others.

dataset/sft.json              the SFT layout, see `vz_ray/data/sft_file.py`
dataset/images/ab/ab12...png  frames, each once
dataset/episodes.jsonl        the same episodes as played, with references to frames
dataset/dropped.jsonl         every other one, and why
dataset/card.md, card.json    counts and cost
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vz_ray.data.episode_record import EpisodeRecord, record_to_dict
from vz_ray.data.sft_file import trajectory_to_sample
from vz_ray.distill.data_card import DataCard, to_markdown
from vz_ray.distill.filters import DroppedEpisode, count_prefix_turns
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import FrameSource
from vz_ray.utils.atomic_files import atomic_directory
from vz_ray.utils.json_lines import to_json_line
from vz_ray.video.frame import FrameRef
from vz_ray.video.image_encoding import encode_image

SFT_FILE, EPISODES_FILE, DROPPED_FILE = "sft.json", "episodes.jsonl", "dropped.jsonl"


async def write_dataset(
    directory: Path,
    kept: Sequence[EpisodeRecord],
    dropped: Sequence[DroppedEpisode],
    card: DataCard,
    wire: ChatFormat,
    frames: FrameSource,
    image: str,
) -> None:
    """Writes `directory`, whole or not at all; one that was there is replaced.

    Raises:
        VideoError: A frame cannot be had again.
    """

    def path_of(ref: FrameRef) -> str:
        name = f"{ref.digest[:24]}-{ref.width}x{ref.height}"
        return f"images/{name[:2]}/{name}.{'jpg' if image == 'jpeg' else image}"

    with atomic_directory(directory) as partial:
        samples = []
        for record in kept:
            trajectory = record.trajectory
            given = count_prefix_turns(record)
            samples.append(trajectory_to_sample(trajectory, wire, path_of, num_context_turns=given))
            places = {path_of(ref): ref for ref in trajectory.frame_refs}
            missing = {path: ref for path, ref in places.items() if not (partial / path).exists()}
            found = await frames.resolve(list(missing.values()))
            for path, frame in zip(missing, found, strict=True):
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(encode_image(frame.rgb, image))
        (partial / SFT_FILE).write_text(
            json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        lines = (to_json_line(record_to_dict(record)) for record in kept)
        (partial / EPISODES_FILE).write_text("".join(lines), encoding="utf-8")
        reasons = (to_json_line({"episode": one.episode_id, "reason": one.reason}) for one in dropped)
        (partial / DROPPED_FILE).write_text("".join(reasons), encoding="utf-8")
        (partial / "card.md").write_text(to_markdown(card), encoding="utf-8")
        (partial / "card.json").write_text(json.dumps(card.as_dict, indent=1) + "\n", encoding="utf-8")
