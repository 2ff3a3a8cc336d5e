"""The import-linter contract behind `make lint`: rooms import only along the arrows."""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class ArrowsContract(Contract):
    """Direct imports between the packages under `root` must be among `arrows`.

    A room that does not exist yet is no error; one that is not listed is. An
    arrow may point at one module: `data.task`.

    Example:
        arrows = ["video ->", "episode -> video"] allows vz_ray.env.x to
        import vz_ray.video.y, and nothing in the other direction.
    """

    type_name = "arrows"

    root = fields.StringField()
    common = fields.ListField(subfield=fields.StringField())
    top = fields.ListField(subfield=fields.StringField())
    arrows = fields.ListField(subfield=fields.StringField())
    never = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        wrong = []
        for source in sorted(graph.modules):
            for target in sorted(graph.find_modules_directly_imported_by(source)):
                if fault := self.fault(source, target):
                    found = graph.get_import_details(importer=source, imported=target)
                    lines = ", ".join(str(detail["line_number"]) for detail in found)
                    wrong.append(f"{source} -> {target} (line {lines}): {fault}")
        return ContractCheck(kept=not wrong, metadata={"wrong": wrong})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["wrong"]:
            output.print_error(line)

    def fault(self, source: str, target: str) -> str:
        """Why this import is not allowed; empty if it is."""
        root, room = source.split(".")[0], self.room(source)
        if root != self.root or not room or room in self.top:
            return ""
        allowed = self.split(self.arrows, "->") | {name: set() for name in self.common}
        if room not in allowed:
            return f"{room} is not a room of the layout"
        if target.split(".")[0] != self.root:
            forbidden = self.split(self.never, ":").get(room, set())
            package = target.split(".")[0]
            return f"{room} must not import {package}" if package in forbidden else ""
        other = self.room(target)
        if other in ("", room) or other in allowed[room]:
            return ""
        if any(f"{target}.".startswith(f"{root}.{module}.") for module in allowed[room]):
            return ""
        if other in self.common and (room not in self.common or other == "observe"):
            return ""
        return f"{room} may import only {', '.join(sorted(allowed[room])) or 'no other room'}"

    def room(self, module: str) -> str:
        """`vz_ray.video.frame` -> `video`; empty for `vz_ray` itself."""
        return [*module.split("."), ""][1]

    def split(self, rules: list[str], sign: str) -> dict[str, set[str]]:
        """`"data -> video, episode"` -> `{"data": {"video", "episode"}}`."""
        pairs = (rule.split(sign) for rule in rules)
        return {left.strip(): set(right.replace(",", " ").split()) for left, right in pairs}
