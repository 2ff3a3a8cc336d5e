"""Weight publish benchmark: against a plain copy of the same bytes and the engine's own reload.

    make bench-publish
    make bench-publish ARGS="--publishes 5 --layers 24"

The real engine runs two models: the tiny one, and one with half a billion random float32 parameters. A publish
goes through shared memory from pause to resume, with hash checks and cache resets, without the parity probe.
The baselines run in the engine's process with the same tensors in memory:

- copy: allocate memory and copy, tensor by tensor;
- floor: vLLM's layerwise reload, which also packs weights on CPU, without hashes, files or pauses.

The last line is one JSON object; `ratio_vs_floor` and `ratio_vs_copy` are publish / baseline for the larger
model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vz_ray.config.rollout import EngineConfig
from vz_ray.learner.policy_model import load_pretrained
from vz_ray.rollout.vllm_engine import VllmEngine
from vz_ray.weight_sync import ModuleSource, ShmTransport, WeightPublisher, WeightStore

TINY = Path("assets/tiny-base")


def build_larger_model(out: Path, layers: int) -> Path:
    """Save a checkpoint of half a billion random parameters with the tiny model's tokenizer."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config = AutoConfig.from_pretrained(TINY)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 896, 4864, layers
    text.num_attention_heads, text.num_key_value_heads = 14, 2
    text.layer_types = ["full_attention"] * layers
    text.vocab_size = 151_936
    vision.out_hidden_size = 896
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(out)
    for file in TINY.iterdir():
        if not (out / file.name).exists():
            shutil.copy(file, out / file.name)
    return out


def time_in_engine(worker: Any, directory: str, repeats: int) -> dict[str, list[float]]:
    """Return seconds of plain copies and of vLLM's reloads; runs in the engine's process."""
    from vz_ray.weight_sync.vllm_reload import WeightReload
    from vz_ray.weight_sync.weight_store import read_manifest, read_tensors

    tensors = [(name, tensor.clone()) for name, tensor in read_tensors(directory, read_manifest(directory))]
    runner = worker.model_runner
    seconds: dict[str, list[float]] = {"copy": [], "floor": []}
    for _ in range(repeats):
        started = time.perf_counter()
        copies = [torch.empty_like(tensor).copy_(tensor) for _, tensor in tensors]
        seconds["copy"].append(time.perf_counter() - started)
        del copies
        started = time.perf_counter()
        reload = WeightReload(runner.model, runner.model_config)
        reload.load(iter(tensors))
        reload.finish()
        seconds["floor"].append(time.perf_counter() - started)
    return seconds


async def measure_publishes(model: Path, publishes: int) -> dict[str, float]:
    """Measure publishes of one model and their baselines."""
    config = EngineConfig(max_model_len=512, max_num_seqs=2, images_per_prompt=4, kv_cache_gib=0.25, num_threads=2)
    with tempfile.TemporaryDirectory(prefix="vz_ray_", dir="/dev/shm") as folder:
        engine = await VllmEngine.start(model, config, name="engine", log_file=Path(folder) / "engine.log")
        try:
            module = load_pretrained(model, torch.float32)
            transport = ShmTransport(WeightStore(Path(folder) / "weights"), ModuleSource(module))
            publisher = WeightPublisher(timeout_s=300)
            reports = []
            for version in range(1, publishes + 2):
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.mul_(1.001)
                reports.append(await publisher.publish(version, transport, [engine]))
            directory = str(transport._store.path(publishes + 1))
            [floors] = await engine._process.llm.collective_rpc(time_in_engine, args=(directory, publishes))
        finally:
            await engine.shutdown()
    timed = reports[1:]  # the first publish warms up
    sync = statistics.median(report.sync_s for report in timed)
    floor, copy = (statistics.median(floors[name]) for name in ("floor", "copy"))
    return {
        "bytes": timed[0].nbytes,
        "sync_seconds_median": round(sync, 4),
        "sync_seconds_max": round(max(report.sync_s for report in timed), 4),
        "prepare_seconds_median": round(statistics.median(report.prepare_s for report in timed), 4),
        "floor_seconds": round(floor, 4),
        "copy_seconds": round(copy, 4),
        "ratio_vs_floor": round(sync / floor, 2),
        "ratio_vs_copy": round(sync / copy, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishes", type=int, default=9, help="publishes of each model after the warm-up")
    parser.add_argument("--layers", type=int, default=24, help="layers of the larger model")
    args = parser.parse_args()
    # collective_rpc pickles a function of this module.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    torch.manual_seed(0)
    models = {"tiny": asyncio.run(measure_publishes(TINY, args.publishes))}
    print(f"tiny: {json.dumps(models['tiny'])}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vz_ray_") as folder:
        model = build_larger_model(Path(folder) / "model", args.layers)
        models["half_billion"] = asyncio.run(measure_publishes(model, args.publishes))
    print(f"half_billion: {json.dumps(models['half_billion'])}", flush=True)
    print(json.dumps({**models["half_billion"], "models": models, "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
