"""The names of the timers. Needs no torch: the command line and stored results use them too.

Times of different timers answer different questions and are never compared.
"""

TIMERS: dict[str, tuple[str, ...]] = {
    "cpu": ("wall", "wall-cold-cache"),
    "cuda": ("host-inclusive", "cuda-graph-cold-l2", "kernel-only"),
}
"""By device; the first is the default."""

TIMER_MEANING: dict[str, str] = {
    "wall": "the wall clock around calls on the CPU; the data of the call before is still in the "
    "caches, as in a server that runs one model",
    "wall-cold-cache": "the wall clock around single calls, each after the CPU's caches were "
    "filled with other data, so that code, weights and inputs come from memory",
    "host-inclusive": "the wall clock around calls on a GPU that is idle at both ends, so that "
    "Python, the launches and the kernels are in it",
    "cuda-graph-cold-l2": "the GPU's clock around a replay of the call as a CUDA graph, after its "
    "L2 cache was filled with other data; no host is in it",
    "kernel-only": "the durations of the kernels that a call runs, added up; no gaps between them, "
    "no copies and no memory sets",
}
"""What a figure of each timer is, to be put beside it."""
