"""Print the last metrics, the accuracy per kind of question and the newest checkpoint of a run.

python examples/inspect_run.py runs/quickstart
"""

from __future__ import annotations

import sys
from collections import defaultdict

import vz_ray
from vz_ray.utils.errors import UserError


def main(run: str) -> None:
    rows = vz_ray.read_metrics(run)
    for row in rows[-3:]:
        print(f"step {row['step']:.0f}: reward {row['reward/total']:.3f}, accuracy {row['reward/accuracy']:.3f}")
    correct: dict[str, list[float]] = defaultdict(list)
    for episode in vz_ray.episode_rows(run):
        if episode["accuracy"] is not None:
            correct[episode["kind"]].append(episode["accuracy"])
    for kind, values in sorted(correct.items()):
        print(f"{kind or 'all'}: accuracy {sum(values) / len(values):.3f} over {len(values)} training episodes")
    try:
        checkpoint = vz_ray.load_checkpoint(run)
    except UserError as error:
        print(error)
        return
    name, shape = next(iter(checkpoint.shapes.items()))
    norm = checkpoint.tensor(name).norm().item()
    print(f"checkpoint of step {checkpoint.step}: {len(checkpoint.shapes)} tensors; {name} {shape} has norm {norm:.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    except UserError as error:
        sys.exit(f"inspect_run: {error}")
