"""A training step's peers in processes of their own: what one breaks, others do not notice.

On a GPU a failed assertion ends CUDA for its process, and Liger and Unsloth change transformers for
theirs. Run as a program, this file is such a process: it measures the peers of one case.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_cases import (
    ALONE,
    CPU,
    GPU,
    GPU_PEERS,
    GPU_SLOW,
    Case,
    Found,
    Measured,
    disagreement,
    measure,
    tiny,
)

# Loss and gradients may differ from PEFT's by this much of them: 16-bit activations are rounded in
# other places, an 8-bit mantissa each time.
RELATIVE = {"bfloat16": 2e-2, "float32": 1e-3}
# What a case may take: three peers that compile for some minutes each.
TIMEOUT_SECONDS = 3600

CASES = {case.name: case for case in (*CPU, *GPU, *GPU_SLOW)}


def measured_apart(
    case: Case, peers: Sequence[str], *, device: str, rounds: int, small: bool = False
) -> Found:
    """Measure the peers of a case, those that keep to themselves against each other.

    Args:
        small: the case as `tiny` makes it.

    Returns:
        By peer, what was measured, or why it was not. Who computes something else than PEFT did
        not measure the case.
    """
    together = [peer for peer in peers if peer not in ALONE]
    found: Found = {}
    for group in (together, *([peer] for peer in peers if peer in ALONE)):
        waiting = list(group)
        while waiting:
            said = _run(case, waiting, device=device, rounds=rounds, small=small)
            found |= said
            # Whoever ended the process is left out, and the others try once more.
            waiting = [peer for peer in waiting if peer not in said]
    dtype = "float32" if small else str(case.dtype).removeprefix("torch.")
    wrong = {peer: disagreement(found, peer, relative=RELATIVE[dtype]) for peer in found}
    return found | {peer: reason for peer, reason in wrong.items() if reason is not None}


def _run(case: Case, peers: Sequence[str], *, device: str, rounds: int, small: bool) -> Found:
    """What one process found; of the peer alone that ended it, where one did."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        order = {
            "case": case.name, "peers": list(peers), "device": device, "rounds": rounds,
            "small": small, "log": str(log),
        }  # fmt: skip
        log.touch()
        try:
            ran = subprocess.run(
                [sys.executable, __file__, json.dumps(order)],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                timeout=TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
            ended = f"its process ended with status {ran.returncode}"
            last = [line for line in ran.stderr.splitlines() if line.strip()][-1:]
        except subprocess.TimeoutExpired:
            ended, last = f"it took more than {TIMEOUT_SECONDS} seconds", []
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    if lines and "found" in lines[-1]:
        return {
            peer: said if isinstance(said, str) else Measured.from_dict(said)
            for peer, said in lines[-1]["found"].items()
        }
    reason = f"failed: {': '.join([ended, *last])[:300]}"
    # Without a line the model could not be made. Timing may have ended it too, once the last peer
    # had begun: then the others are timed without that one.
    return dict.fromkeys([lines[-1]["starts"]] if lines else peers, reason)


def main(order: dict[str, Any]) -> None:
    """Measure what is ordered, and say so in the log, line by line."""
    log = Path(order["log"])

    def say(line: dict[str, Any]) -> None:
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    case = CASES[order["case"]]
    found = measure(
        tiny(case) if order["small"] else case,
        {peer: GPU_PEERS[peer] for peer in order["peers"]},
        device=order["device"],
        rounds=order["rounds"],
        starts=lambda peer: say({"starts": peer}),
    )
    said = {
        peer: result if isinstance(result, str) else result.to_dict()
        for peer, result in found.items()
    }
    say({"found": said})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
