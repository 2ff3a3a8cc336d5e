"""Child process of `math_answer`: prints `{"error": ""}` when ready, then one JSON reply per request line."""

from __future__ import annotations

import json
import sys
from typing import Any


def compare_expressions(answer: str, truth: str) -> dict[str, Any]:
    """Parse both texts with math-verify and compare the expressions."""
    from math_verify import parse, verify

    def parse_expression(text: str) -> list[object]:
        return list(parse(text) or parse(f"${text}$"))

    expected, actual = parse_expression(truth), parse_expression(answer)
    equal = bool(expected and actual and verify(expected, actual))
    return {"truth": bool(expected), "answer": bool(actual), "equal": equal}


def main() -> None:
    try:
        import math_verify  # noqa: F401  # imports sympy: slow
    except Exception as error:  # the parent reports it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"error": ""}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(compare_expressions(request["answer"], request["truth"])), flush=True)


if __name__ == "__main__":
    main()
