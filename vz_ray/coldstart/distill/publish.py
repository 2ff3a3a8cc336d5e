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

from vz_ray.coldstart.distill.card import Card, markdown
from vz_ray.coldstart.distill.select import Dropped, given_turns
from vz_ray.data.record import EpisodeRecord, record_to_dict, to_line
from vz_ray.data.sft_file import sample_of
from vz_ray.episode.protocols import FrameSource
from vz_ray.episode.wire import WireFormat
from vz_ray.observe.run_dir import whole_directory
from vz_ray.video.frame import FrameRef
from vz_ray.video.image import encode_image

SFT, EPISODES, DROPPED = "sft.json", "episodes.jsonl", "dropped.jsonl"


async def publish(
    directory: Path,
    kept: Sequence[EpisodeRecord],
    dropped: Sequence[Dropped],
    card: Card,
    wire: WireFormat,
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

    with whole_directory(directory) as partial:
        samples = []
        for record in kept:
            trajectory = record.trajectory
            given = given_turns(record)
            samples.append(sample_of(trajectory, wire, path_of, given=given))
            places = {path_of(ref): ref for ref in trajectory.refs}
            missing = {path: ref for path, ref in places.items() if not (partial / path).exists()}
            found = await frames.resolve(list(missing.values()))
            for path, frame in zip(missing, found, strict=True):
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(encode_image(frame.rgb, image))
        (partial / SFT).write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        lines = (to_line(record_to_dict(record)) for record in kept)
        (partial / EPISODES).write_text("".join(lines), encoding="utf-8")
        reasons = (to_line({"episode": one.name, "reason": one.reason}) for one in dropped)
        (partial / DROPPED).write_text("".join(reasons), encoding="utf-8")
        (partial / "card.md").write_text(markdown(card), encoding="utf-8")
        (partial / "card.json").write_text(json.dumps(card.json, indent=1) + "\n", encoding="utf-8")
