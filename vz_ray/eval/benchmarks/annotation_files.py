"""Annotation files as released: JSON, JSON lines, TSV, parquet. Every fault names file and record."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vz_ray.utils.errors import UserError

_SHOWN = 60


@dataclass(frozen=True, slots=True)
class AnnotationSchema:
    """What the records of one released file look like.

    Attributes:
        title: The file and its benchmark, for messages.
        fields: What every record must have.
        other_version_fields: Fields that only another version has, and what that version is.
        other_version_omits: Fields that another version lacks, and what that version is.
    """

    title: str
    fields: tuple[str, ...]
    other_version_fields: Mapping[str, str] = field(default_factory=dict)
    other_version_omits: Mapping[str, str] = field(default_factory=dict)

    def check(self, values: Any, location: str) -> AnnotationRecord:
        """`values` as a record of this schema.

        Raises:
            UserError: It is no object, or lacks a field; names what was found, and the version it may be of.
        """
        if not isinstance(values, Mapping):
            raise UserError(
                f"{location}: expected an object with {', '.join(self.fields)}, found {_kind(values)}"
            )
        missing = [name for name in self.fields if name not in values]
        if missing:
            others = [what for name, what in self.other_version_fields.items() if name in values]
            others += [self.other_version_omits[name] for name in missing if name in self.other_version_omits]
            others.append("another version of the file, or damaged")
            found = ", ".join(map(str, values)) or "nothing"
            raise UserError(
                f"{location}: field {missing[0]!r} is missing; {self.title} has {', '.join(self.fields)}, this "
                f"record has {found}: it is {others[0]}"
            )
        return AnnotationRecord(values, location)


@dataclass(frozen=True, slots=True)
class AnnotationRecord:
    """One record, read field by field; `location` is its file and number."""

    values: Mapping[str, Any]
    location: str

    def field_error(self, name: str, expected: str) -> UserError:
        """What is wrong with a field."""
        if name not in self.values:
            return UserError(f"{self.location}: field {name!r} is missing; expected {expected}")
        return UserError(
            f"{self.location}: field {name!r} is {_kind(self.values[name])}; expected {expected}"
        )

    def text(self, name: str, *, empty: bool = False) -> str:
        """A text; with `empty`, there may be nothing in it."""
        value = self.values.get(name)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.field_error(name, "text")
        return value

    def label(self, name: str) -> str:
        """A text or a whole number, as text."""
        value = self.values.get(name)
        return str(self.integer(name)) if isinstance(value, int | float) else self.text(name).strip()

    def integer(self, name: str) -> int:
        """A whole number; a float without a fraction is one."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.field_error(name, "a whole number")
        return int(value)

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.field_error(name, "a number")
        return float(value)

    def items(self, name: str) -> list[Any]:
        """A list with something in it."""
        value = self.values.get(name)
        if not isinstance(value, list) or not value:
            raise self.field_error(name, "a list")
        return value

    def options(self, name: str, most: int = 10) -> list[str]:
        """Texts of two to `most` options; numbers are written out."""
        value = self.values.get(name)
        if not isinstance(value, list) or not 2 <= len(value) <= most:
            raise self.field_error(name, f"a list of 2 to {most} options")
        if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in value):
            raise self.field_error(name, "options that are texts")
        return [str(item).strip() for item in value]

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value = self.text(name).strip()
        if value not in allowed:
            raise self.field_error(name, f"one of {', '.join(allowed)}")
        return value


def _kind(value: Any) -> str:
    """`7 (int)`, cut where it is long."""
    shown = repr(value)
    return f"{shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'} ({type(value).__name__})"


def find_annotation_file(root: Path, *names: str) -> Path:
    """`root` itself if it is a file, else the first of `names` that lies in it or below it.

    Raises:
        UserError: There is none, or several of the same name.
    """
    if root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"no annotations at {root}: it is neither a file nor a folder")
    for name in names:
        found = [root / name] if (root / name).is_file() else sorted(root.rglob(name))
        if len(found) > 1:
            raise UserError(
                f"{root} has several {name}: {', '.join(map(str, found[:3]))}; name the file itself"
            )
        if found:
            return found[0]
    raise UserError(f"{root} has no {' or '.join(names)}")


def read_annotations(path: Path, schema: AnnotationSchema) -> list[AnnotationRecord]:
    """All records of a file, checked, by its ending: `.json`, `.jsonl`, `.tsv`, `.parquet`.

    Raises:
        UserError: It cannot be read, is of another format, is empty, or a record lacks a field.
    """
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path} has no records; expected those of {schema.title}")
    return [schema.check(values, f"{path}, record {index}") for index, values in enumerate(rows)]


def read_first_record(path: Path) -> Mapping[str, Any]:
    """The first record of a file, unchecked: what tells one layout from another. Empty if it is no object."""
    first: Any = next(iter(_rows(path)), {})
    return first if isinstance(first, Mapping) else {}


def read_annotation_json(path: Path) -> Any:
    """What a JSON file holds. Raises `UserError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _rows(path: Path) -> Iterator[Any]:
    kinds = {".json": _json_rows, ".jsonl": _jsonl_rows, ".tsv": _tsv_rows, ".parquet": _parquet_rows}
    read = kinds.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: annotations are {', '.join(kinds)} files")
    return read(path)


def _json_rows(path: Path) -> Iterator[Any]:
    values = read_annotation_json(path)
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of records, found {type(values).__name__}")
    yield from values


def _jsonl_rows(path: Path) -> Iterator[Any]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error


def _tsv_rows(path: Path) -> Iterator[Any]:
    csv.field_size_limit(2**24)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, dialect="excel-tab"):
                # A row of another length: what is left over stands under None, what is not there is None.
                if None in row or None in row.values():
                    raise UserError(f"{path}: a row has {len(row)} columns, not those of its head")
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
