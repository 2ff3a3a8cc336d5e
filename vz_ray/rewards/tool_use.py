"""Pay for using the tool."""

from __future__ import annotations


def earns_tool_reward(accuracy: float, zooms: int) -> bool:
    """Paid once, and only where the answer is fully right (paper: 0.5 [accuracy = 1 and a zoom]).

    Args:
        accuracy: In `[0, 1]`.
        zooms: Zooms carried out; in `compat` scoring, zooms attempted, which
            also pays for a malformed call, as the released code does.
    """
    return accuracy == 1 and zooms >= 1
