"""Writer of the data set directory.

dataset/sft.json              SFT samples, see `vz_ray/data/sft_file.py`
dataset/images/ab/ab12...png  frames, without duplicates
dataset/episodes.jsonl        kept episodes with frame references
dataset/dropped.jsonl         dropped episodes and reasons
dataset/card.md, card.json    data card
"""

from __future__ import annotations

import json
from pathlib import Path

from vz_ray.data.episode_record import record_to_dict
from vz_ray.data.sft_file import trajectory_to_sample
from vz_ray.distill.curation import CurationResult
from vz_ray.distill.data_card import DataCard, to_markdown
from vz_ray.distill.filters import count_prefix_turns
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.protocols import FrameSource
from vz_ray.utils.atomic_files import atomic_directory
from vz_ray.utils.json_lines import to_json_line
from vz_ray.video.frame import FrameRef
from vz_ray.video.image_encoding import encode_image

SFT_FILE, EPISODES_FILE, DROPPED_FILE = "sft.json", "episodes.jsonl", "dropped.jsonl"


async def write_dataset(
    directory: Path,
    curated: CurationResult,
    card: DataCard,
    chat_format: ChatFormat,
    frames: FrameSource,
    image_format: str,
) -> None:
    """Write `directory` atomically, replacing an existing one.

    Raises:
        VideoError: A frame cannot be decoded again.
    """

    def image_path(ref: FrameRef) -> str:
        name = f"{ref.digest[:24]}-{ref.width}x{ref.height}"
        return f"images/{name[:2]}/{name}.{'jpg' if image_format == 'jpeg' else image_format}"

    with atomic_directory(directory) as partial:
        samples = []
        for record in curated.kept:
            trajectory = record.trajectory
            prefix_turns = count_prefix_turns(record)
            samples.append(trajectory_to_sample(trajectory, chat_format, image_path, num_context_turns=prefix_turns))
            refs = {image_path(ref): ref for ref in trajectory.frame_refs}
            missing = {path: ref for path, ref in refs.items() if not (partial / path).exists()}
            resolved = await frames.resolve(list(missing.values()))
            for path, frame in zip(missing, resolved, strict=True):
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(encode_image(frame.rgb, image_format))
        (partial / SFT_FILE).write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        lines = (to_json_line(record_to_dict(record)) for record in curated.kept)
        (partial / EPISODES_FILE).write_text("".join(lines), encoding="utf-8")
        reasons = (to_json_line({"episode": drop.episode_id, "reason": drop.reason}) for drop in curated.dropped)
        (partial / DROPPED_FILE).write_text("".join(reasons), encoding="utf-8")
        (partial / "card.md").write_text(to_markdown(card), encoding="utf-8")
        (partial / "card.json").write_text(json.dumps(card.to_dict(), indent=1) + "\n", encoding="utf-8")
