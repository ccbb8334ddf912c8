"""The regression gate: two revisions of one suite, side by side, and a verdict that holds.

`gate()` checks both revisions out (`revisions`), starts fresh pairs of workers on one core (`pair`,
`_worker`), alternates short slices between them, and adds pairs until the answer is clear or the
budget is spent (`decision`). `selftest` measures how often that answer is wrong on this machine.
"""
