"""Settings of a checkpoint's image processor that decide the size of frames."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.families.family import ModelFamily
from vz_ray.utils.errors import UserError
from vz_ray.video.image_grid import ImageGrid

_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class ImageProcessorSettings:
    """Grid and bounds on the area of frames that the image processor leaves as they are.

    Attributes:
        family: Name of the model family.
        grid: Sizes of patches and visual tokens.
        min_pixels: Minimum area; the processor enlarges smaller frames.
        max_pixels: Maximum area; the processor shrinks larger frames.
    """

    family: str
    grid: ImageGrid
    min_pixels: int
    max_pixels: int

    @classmethod
    def load(cls, directory: str | Path, family: ModelFamily) -> ImageProcessorSettings:
        """Read the settings of a checkpoint directory.

        Raises:
            UserError: The settings are missing or invalid, or differ from config.json.
        """
        file, values = read_image_processor(directory)
        if file is None:
            raise UserError(
                f"{family.name}: model {str(directory)!r} has no image processor in {' or '.join(_FILES)}. Frames are "
                "images, so a video processor is not enough; copy the files of the released checkpoint."
            )
        for field, value in values.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{family.name}: {field} in {file} is {value}; it must be a positive integer. "
                    "Copy the file of the released checkpoint."
                )
        vision = json.loads((Path(directory) / "config.json").read_text()).get("vision_config") or {}
        for field, key in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
            if vision.get(key, values[field]) != values[field]:
                raise UserError(
                    f"{family.name}: {field} in {file} is {values[field]}, and vision_config.{key} in config.json is "
                    f"{vision[key]}. Copy both files of the same checkpoint."
                )
        grid = ImageGrid(values["patch_size"], values["merge_size"])
        return cls(family.name, grid, values["min_pixels"], values["max_pixels"])

    def check_bounds(self, min_pixels: int, max_pixels: int) -> None:
        """Check `episode.min_pixels` and `episode.max_pixels`.

        Raises:
            UserError: No frame size of the grid is within the bounds, or the processor would resize frames again.
        """
        token_area = self.grid.side**2
        smallest, largest = _round_up(min_pixels, token_area), max_pixels // token_area * token_area
        if smallest > largest:
            problem = f"no area of {self.grid.side}x{self.grid.side} visual tokens is between them"
        elif smallest < self.min_pixels or largest > self.max_pixels:
            problem = (
                f"the checkpoint's image processor would resize frames below {self.min_pixels} or above "
                f"{self.max_pixels} pixels again"
            )
        else:
            return
        lower = _round_up(max(min_pixels, self.min_pixels), token_area)
        upper = max(lower, min(max_pixels, self.max_pixels) // token_area * token_area)
        raise UserError(
            f"{self.family}: episode.min_pixels is {min_pixels} and episode.max_pixels is {max_pixels}; {problem}. "
            f"Set episode.min_pixels={lower} and episode.max_pixels={upper}."
        )


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


def read_image_processor(directory: str | Path) -> tuple[Path | None, dict[str, Any]]:
    """Read patch_size, merge_size, min_pixels and max_pixels of a checkpoint's image processor, unchecked.

    The precedence of files and fields is that of HF's `AutoImageProcessor`.

    Returns:
        The file, None if there is none; and the values, None for each that the file lacks.

    Raises:
        UserError: A file is not valid JSON.
    """
    for name in _FILES:
        file = Path(directory) / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is not valid JSON: {error}. Copy it from the checkpoint again.") from error
        if name == "processor_config.json" and "image_processor" not in content:
            continue
        settings = content.get("image_processor", content)
        size = settings.get("size") or {}
        return file, {
            "patch_size": settings.get("patch_size"),
            "merge_size": settings.get("merge_size"),
            "min_pixels": settings.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": settings.get("max_pixels") or size.get("longest_edge"),
        }
    return None, {}
