"""Find the dataclass fields that a package reads, by class, with mypy's types."""

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
"""External packages that mypy skips for speed."""

Field = tuple[str, str]
"""(full class name, attribute name)"""

Span = tuple[int, int, int | None, int | None]
"""First line and column, last line and column of an expression."""


def fields_read(package: Path) -> set[Field]:
    """Return every attribute that `package` reads; assignments and `__post_init__` do not count."""
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
    read: set[Field] = set()
    for name, state in result.graph.items():
        if name.split(".")[0] == package.name and state.tree and state.path:
            loads = set(_loads(ast.parse(Path(state.path).read_text())))
            collector = NameAndMemberCollector()
            state.tree.accept(collector)
            for node in collector.member_exprs:
                if (node.line, node.column, node.end_line, node.end_column) in loads:
                    read |= {(owner, node.name) for owner in _owners(result.types.get(node.expr))}
    return read


def _loads(node: ast.AST) -> Iterator[Span]:
    """Yield the spans of attribute reads."""
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
    for child in ast.iter_child_nodes(node):
        yield from _loads(child)


def _owners(mypy_type: Type | None) -> set[str]:
    """Return the full names of the classes of this type, including base classes."""
    proper = get_proper_type(mypy_type)
    if isinstance(proper, UnionType):
        return {owner for item in proper.items for owner in _owners(item)}
    return {base.fullname for base in proper.type.mro} if isinstance(proper, Instance) else set()
