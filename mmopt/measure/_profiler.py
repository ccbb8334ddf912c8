"""torch's profiler, quiet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile

# Kineto writes its stages to stderr, which belongs to progress and errors; levels end at 5.
_QUIET = "99"


@contextmanager
def quiet_profile(activity: ProfilerActivity, *, memory: bool = False) -> Iterator[profile]:
    """Profile the block; read the profile once it is left.

    Args:
        activity: what to record.
        memory: also record each allocation.
    """
    # Kineto reads its level when the first profile of a process begins.
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or _QUIET
    try:
        with profile(activities=[activity], profile_memory=memory) as seen:
            yield seen
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
