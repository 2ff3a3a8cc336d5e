"""Readers of released annotation files: JSON, JSON lines, TSV, parquet. Errors name file and record."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vz_ray.utils.errors import UserError

_MAX_REPR_CHARS = 60


@dataclass(frozen=True, slots=True)
class AnnotationSchema:
    """Expected fields of the records of one released file.

    Attributes:
        title: Name of the file and its benchmark, for error messages.
        fields: Required fields.
        other_version_fields: Fields that only another version of the file has, with its description.
        other_version_omits: Fields that another version of the file omits, with its description.
    """

    title: str
    fields: tuple[str, ...]
    other_version_fields: Mapping[str, str] = field(default_factory=dict)
    other_version_omits: Mapping[str, str] = field(default_factory=dict)

    def check(self, values: Any, location: str) -> AnnotationRecord:
        """Validate `values` and return them as a record.

        Raises:
            UserError: `values` is not an object, or a required field is missing. The message lists the
                present fields and the likely version of the file.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{location}: expected an object with {', '.join(self.fields)}, got {_describe(values)}")
        missing = [name for name in self.fields if name not in values]
        if missing:
            versions = [version for name, version in self.other_version_fields.items() if name in values]
            versions += [self.other_version_omits[name] for name in missing if name in self.other_version_omits]
            versions.append("another version of the file, or damaged")
            present = ", ".join(map(str, values)) or "no fields"
            raise UserError(
                f"{location}: field {missing[0]!r} is missing; {self.title} has {', '.join(self.fields)}. "
                f"This record has {present}: it is {versions[0]}"
            )
        return AnnotationRecord(values, location)


@dataclass(frozen=True, slots=True)
class AnnotationRecord:
    """A validated record with typed access to its fields; `location` is its file and number."""

    values: Mapping[str, Any]
    location: str

    def field_error(self, name: str, expected: str) -> UserError:
        """Return the error for a missing or malformed field."""
        if name not in self.values:
            return UserError(f"{self.location}: field {name!r} is missing; expected {expected}")
        return UserError(f"{self.location}: field {name!r} is {_describe(self.values[name])}; expected {expected}")

    def text(self, name: str, *, empty: bool = False) -> str:
        """Return a string field; blank strings raise unless `empty` is set."""
        value = self.values.get(name)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.field_error(name, "text")
        return value

    def label(self, name: str) -> str:
        """Return a string or integer field as a string."""
        value = self.values.get(name)
        return str(self.integer(name)) if isinstance(value, int | float) else self.text(name).strip()

    def integer(self, name: str) -> int:
        """Return an integer field; floats without a fraction are accepted."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.field_error(name, "an integer")
        return int(value)

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.field_error(name, "a number")
        return float(value)

    def items(self, name: str) -> list[Any]:
        """Return a non-empty list field."""
        value = self.values.get(name)
        if not isinstance(value, list) or not value:
            raise self.field_error(name, "a non-empty list")
        return value

    def options(self, name: str, max_options: int = 10) -> list[str]:
        """Return a list field of 2 to `max_options` strings or numbers as strings."""
        value = self.values.get(name)
        if not isinstance(value, list) or not 2 <= len(value) <= max_options:
            raise self.field_error(name, f"a list of 2 to {max_options} options")
        if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in value):
            raise self.field_error(name, "options that are strings or numbers")
        return [str(item).strip() for item in value]

    def option_letter(self, name: str, options: Mapping[str, str]) -> str:
        """Return a field that holds the letter of one of `options`."""
        value = self.label(name)
        if value not in options:
            raise self.field_error(name, f"a letter from A to {max(options)}")
        return value

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value = self.text(name).strip()
        if value not in allowed:
            raise self.field_error(name, f"one of {', '.join(allowed)}")
        return value


def _describe(value: Any) -> str:
    """Return value and type, such as `7 (int)`; long values are truncated."""
    text = repr(value)
    if len(text) > _MAX_REPR_CHARS:
        text = text[:_MAX_REPR_CHARS] + "..."
    return f"{text} ({type(value).__name__})"


def find_annotation_file(root: Path, *names: str) -> Path:
    """Return `root` if it is a file, else the first of `names` found in the folder or its subfolders.

    Raises:
        UserError: No file matches, or several files have the same name.
    """
    if root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"annotations path {root} is neither a file nor a folder")
    for name in names:
        matches = [root / name] if (root / name).is_file() else sorted(root.rglob(name))
        if len(matches) > 1:
            raise UserError(f"{root} has several {name}: {', '.join(map(str, matches[:3]))}; set the path of one file")
        if matches:
            return matches[0]
    raise UserError(f"{root} has no {' or '.join(names)}")


def find_annotation_files(root: Path, names: Iterable[str]) -> list[Path]:
    """Return `root` if it is a file, else all of `names` in the folder or its subfolders."""
    return [root] if root.is_file() else [find_annotation_file(root, name) for name in names]


def read_annotations(path: Path, schema: AnnotationSchema) -> list[AnnotationRecord]:
    """Read and validate all records of a `.json`, `.jsonl`, `.tsv` or `.parquet` file.

    Raises:
        UserError: The file cannot be read, has another format, is empty, or a record lacks a field.
    """
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path} has 0 records; expected the records of {schema.title}")
    return [schema.check(values, f"{path}, record {index}") for index, values in enumerate(rows)]


def read_first_record(path: Path) -> Mapping[str, Any]:
    """Return the first record without validation, for telling layouts apart; empty if it is not an object."""
    record: Any = next(iter(_rows(path)), {})
    return record if isinstance(record, Mapping) else {}


def read_annotation_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` if it cannot be read or parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _rows(path: Path) -> Iterator[Any]:
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".tsv": _tsv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} has the extension {path.suffix!r}; annotations are {', '.join(readers)} files")
    return reader(path)


def _json_rows(path: Path) -> Iterator[Any]:
    values = read_annotation_json(path)
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of records, got {type(values).__name__}")
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
                # csv stores extra columns under the key None and missing columns as the value None.
                if None in row or None in row.values():
                    raise UserError(f"{path}: a row has more or fewer columns than the header")
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
