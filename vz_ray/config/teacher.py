"""Config of the teacher of on-policy distillation, and the check that teacher and student share their tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.config.fields import InvalidValueError, number
from vz_ray.config.rollout import RolloutConfig

_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_GRID = ("patch_size", "spatial_merge_size", "temporal_patch_size")
_MISSING = "missing"


@dataclass
class OnPolicyTeacherConfig(RolloutConfig):
    """Workers with a teacher that scores the student's episodes: on-policy distillation."""

    model: str = ""
    """Checkpoint directory of the teacher, with the tokens and the image grid of `model`; empty: no teacher."""
    kl_coef: float = number(1.0, above=0)
    """Coefficient of the reverse KL to the teacher, which is subtracted from the advantage of each token."""
    kl_cap: float | None = number(None, above=0)
    """Maximum absolute KL estimate of a token, in nats; null disables the cap."""
    reward_weight: float = number(1.0, minimum=0)
    """Factor of the reward's advantage; 0 trains on the teacher alone."""

    @property
    def enabled(self) -> bool:
        return bool(self.model)

    @property
    def distills_only(self) -> bool:
        """Whether the rewards are not trained on."""
        return self.enabled and not self.reward_weight


def check_shared_tokens(student: str | Path, teacher: str | Path) -> None:
    """Check that a trajectory of the student means the same to the teacher: token ids and image grid.

    Compares the vocabulary of `tokenizer.json`, the ids of vision tokens, and the sizes of patches. The vocabulary
    size of `config.json` may differ: it is padded.

    Args:
        student: Checkpoint directory.
        teacher: Checkpoint directory.

    Raises:
        InvalidValueError: They differ; the message has both values.
    """
    configs = [_read_json(Path(directory) / "config.json") for directory in (student, teacher)]
    for key, (ours, theirs) in {
        **{key: tuple(config.get(key, _MISSING) for config in configs) for key in _TOKEN_IDS},
        **{
            f"vision_config.{key}": tuple((config.get("vision_config") or {}).get(key, _MISSING) for config in configs)
            for key in _GRID
        },
    }.items():
        if ours != theirs:
            raise _mismatch(student, teacher, f"{key} in config.json", ours, theirs)
    files = (Path(directory) / "tokenizer.json" for directory in (student, teacher))
    vocabularies = [_vocabulary(_read_json(file)) for file in files]
    for token in (token for vocabulary in vocabularies for token in vocabulary):
        ours, theirs = (vocabulary.get(token, _MISSING) for vocabulary in vocabularies)
        if ours != theirs:
            raise _mismatch(student, teacher, f"the id of token {token!r} in tokenizer.json", ours, theirs)


def _mismatch(student: str | Path, teacher: str | Path, what: str, ours: object, theirs: object) -> InvalidValueError:
    return InvalidValueError(
        "teacher.model",
        f"is {str(teacher)!r} and model is {str(student)!r}; {what} is {theirs} for the teacher and {ours} for the "
        "student. Use a teacher of the student's family with the same tokenizer.",
        "model",
    )


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValueError(
            "teacher.model", f"cannot be compared with model: cannot read {file}: {error}", "model"
        ) from error
    return content


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each token, added tokens included."""
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    return {**tokenizer["model"]["vocab"], **added}
