"""Run one episode with a model behind an OpenAI-compatible endpoint, for example a vLLM server.

python examples/ask_endpoint.py VIDEO QUESTION --model NAME --base-url http://127.0.0.1:8000/v1 --tokenizer DIR
"""

from __future__ import annotations

import argparse
import sys

import vz_ray
from vz_ray.config.distill import TeacherConfig
from vz_ray.utils.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="name of the model at the endpoint")
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--api-key-env", default="", help="environment variable with the API key")
    parser.add_argument("--tokenizer", required=True, help="checkpoint directory with a Qwen2.5-VL tokenizer")
    parser.add_argument("--config", default=None, help="config with an `episode` section; default: the paper's values")
    arguments = parser.parse_args()
    episode = vz_ray.load_config(arguments.config).episode
    endpoint = TeacherConfig(model=arguments.model, base_url=arguments.base_url, api_key_env=arguments.api_key_env)
    with vz_ray.VideoAgent.from_endpoint(endpoint, arguments.tokenizer, episode) as agent:
        trajectory = agent.run(arguments.video, arguments.question)
    for turn in trajectory.turns:
        print(turn.action.text)
    print(f"answer: {trajectory.answer} ({trajectory.status})")
    if trajectory.error:
        raise UserError(trajectory.error)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"ask_endpoint: {error}")
