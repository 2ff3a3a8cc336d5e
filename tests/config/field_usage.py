"""Which dataclass fields a package reads, told apart by class: `x.seed` counts for what x is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from mypy import build
from mypy.find_sources import create_source_list
from mypy.options import Options
from mypy.traverser import NameAndMemberCollector
from mypy.types import Instance, Type, UnionType, get_proper_type

LARGE = (
    "torch", "transformers", "vllm", "deepspeed", "ray", "numpy", "av", "rich", "psutil", "tokenizers",
    "openai",
)  # fmt: skip
"""Packages that say nothing about our own classes, and take a minute to read."""

Field = tuple[str, str]
"""(full name of a class, name of one of its attributes)"""

Place = tuple[int, int, int | None, int | None]
"""First line and column, last line and column."""


def fields_read(package: Path) -> set[Field]:
    """Every attribute read anywhere in `package`; assignments and checks in `__post_init__` do not count."""
    options = Options()
    options.export_types = options.preserve_asts = True
    options.incremental = False
    options.ignore_missing_imports = True
    options.follow_imports = "silent"
    options.python_executable = sys.executable
    options.per_module_options = {
        pattern: {"follow_imports": "skip"} for name in LARGE for pattern in (name, f"{name}.*")
    }
    result = build.build(create_source_list([str(package)], options), options)
    found: set[Field] = set()
    for name, state in result.graph.items():
        if name.split(".")[0] == package.name and state.tree and state.path:
            loads = set(_loads(ast.parse(Path(state.path).read_text())))
            collector = NameAndMemberCollector()
            state.tree.accept(collector)
            for node in collector.member_exprs:
                if (node.line, node.column, node.end_line, node.end_column) in loads:
                    found |= {(owner, node.name) for owner in _owners(result.types.get(node.expr))}
    return found


def _loads(node: ast.AST) -> Iterator[Place]:
    """Places of the attributes that are read, not written."""
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
    for child in ast.iter_child_nodes(node):
        yield from _loads(child)


def _owners(kind: Type | None) -> set[str]:
    """Full names of the classes that an object of this type is an instance of."""
    proper = get_proper_type(kind)
    if isinstance(proper, UnionType):
        return {owner for item in proper.items for owner in _owners(item)}
    return {base.fullname for base in proper.type.mro} if isinstance(proper, Instance) else set()
