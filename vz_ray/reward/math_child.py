"""Child process of `math_answer`: one JSON line in, one out."""

from __future__ import annotations

import json
import sys


def equal(answer: str, truth: str) -> bool | None:
    """Whether math-verify finds both equal; None if it reads no expression in the answer."""
    from math_verify import parse, verify

    def read(text: str) -> list[object]:
        return list(parse(text) or parse(f"${text}$"))

    expected, found = read(truth), read(answer)
    return bool(verify(expected, found)) if expected and found else None


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(equal(request["answer"], request["truth"])), flush=True)


if __name__ == "__main__":
    main()
