"""How a process on a CPU is told to keep the memory it frees (see :mod:`benchmarks.train.ml1m`)."""

# One arena, nothing mapped apart, nothing given back: freed memory is used again without a page fault.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
