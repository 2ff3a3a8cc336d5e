"""Run one episode on a video with a trained checkpoint and print what the agent zooms into.

python examples/ask_video.py VIDEO QUESTION --model runs/quickstart/models/rl --config conf/laptop.yaml
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import vz_ray
from vz_ray.env.events import ZoomRequested
from vz_ray.utils.errors import UserError
from vz_ray.video.video_file import require_files


def print_zoom(event: object) -> None:
    if isinstance(event, ZoomRequested):
        zoom = event.zoom
        print(
            f"turn {event.turn_index + 1}: zoom {zoom.start_s:.2f} to {zoom.end_s:.2f} s at {zoom.fps:g} fps",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument(
        "--config", default="conf/laptop.yaml", help="config whose `episode` section the model was trained with"
    )
    arguments = parser.parse_args()
    require_files([arguments.video])  # before the engine starts
    config = vz_ray.load_config(arguments.config)
    engine = replace(config.rollout.engine, kv_cache_gib=0.25)
    with vz_ray.VideoAgent.from_checkpoint(arguments.model, config.episode, engine) as agent:
        trajectory = agent.run(arguments.video, arguments.question, on_event=print_zoom)
    print(f"answer: {trajectory.answer} ({trajectory.status}, {len(trajectory.frame_refs)} frames)")
    if trajectory.error:
        raise UserError(trajectory.error)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"ask_video: {error}")
