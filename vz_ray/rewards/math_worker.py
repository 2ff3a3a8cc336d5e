"""Child process of `math_answer`: `{"error": ""}` when it is ready, then one JSON line in, one out."""

from __future__ import annotations

import json
import sys
from typing import Any


def compare_expressions(answer: str, truth: str) -> dict[str, Any]:
    """Whether math-verify reads an expression in each, and finds both equal."""
    from math_verify import parse, verify

    def read(text: str) -> list[object]:
        return list(parse(text) or parse(f"${text}$"))

    expected, found = read(truth), read(answer)
    equal = bool(expected and found and verify(expected, found))
    return {"truth": bool(expected), "answer": bool(found), "equal": equal}


def main() -> None:
    try:
        import math_verify  # noqa: F401  # loads sympy, which takes a while
    except Exception as error:  # whatever is missing, the parent says it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"error": ""}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(compare_expressions(request["answer"], request["truth"])), flush=True)


if __name__ == "__main__":
    main()
