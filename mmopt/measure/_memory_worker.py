"""The fresh process of `mmopt.measure.memory.peak_memory`: reads a call, answers its peaks."""

import os
import pickle
import sys

from mmopt.measure.memory import (
    PeakMemory,
    peak_resident_bytes,
    torch_peaks,
    watch_device_memory,
)


def main() -> None:
    """Run the call pickled on stdin and pickle its `PeakMemory` to stdout."""
    function, arguments = pickle.load(sys.stdin.buffer)
    # What the call itself prints must not mix with the answer.
    answer_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with watch_device_memory() as device_growth:
        before = peak_resident_bytes()
        function(*arguments)
    allocated, reserved = torch_peaks()
    peaks = PeakMemory(
        process_bytes=peak_resident_bytes(),
        process_before_bytes=before,
        torch_allocated_bytes=allocated,
        torch_reserved_bytes=reserved,
        device_bytes=device_growth(),
    )
    with answer_to:
        pickle.dump(peaks, answer_to)


if __name__ == "__main__":
    main()
