"""When warm-up is over: judged by the times seen, not guessed."""

import statistics
from collections.abc import Sequence

# Steady: the medians of the last two windows differ by less than this share, or by less than the
# samples of either window scatter among themselves (a noisy machine never gets within a fixed
# share, and more warm-up would not help).
STEADY_SHARE = 0.05


def is_steady(seen: Sequence[float], window: int) -> bool:
    """Whether the last `window` times agree with the `window` before them.

    Args:
        seen: times in the order taken, in any unit; fewer than two windows are never steady.
        window: times in a window, 3 or more.
    """
    if len(seen) < 2 * window:
        return False
    before = sorted(seen[-2 * window : -window])
    last = sorted(seen[-window:])
    # The second lowest to the second highest: one outlier does not count as scatter.
    scatter = max(before[-2] - before[1], last[-2] - last[1])
    middle = statistics.median(last)
    return abs(statistics.median(before) - middle) < max(STEADY_SHARE * middle, scatter)
