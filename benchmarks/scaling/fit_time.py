"""``python -m benchmarks.scaling.fit_time``: how long the default fit takes, 4,500 starts screened and 24 refined.

245 runs of a planted law with log-noise 0.02, as many as the largest published table that the method was checked on.
One process, threads as the environment says; the median of five, each timed by the clock and in processor seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import time

import numpy as np

from benchmarks.written import RESULTS, append_row
from gr.scaling.law import REFINED, Law, _Problem, fit_law
from gr.training.environment import commit_label, describe

PLANTED = Law(1.8, (480.0, 2100.0), (0.34, 0.28), 0.0)
RUNS, NOISE, REPEATS = 245, 0.02, 5


def main() -> None:
    """Prints a row and appends it to the results."""
    draw = np.random.default_rng(0)
    axes = np.exp(draw.uniform(np.log([[1e6], [1e8]]), np.log([[1e10], [1e12]]), (2, RUNS)))
    loss = PLANTED(*axes) * np.exp(NOISE * draw.standard_normal(RUNS))
    clock, cpu = [], []
    for _ in range(REPEATS):
        begin = time.perf_counter(), time.process_time()
        law = fit_law(axes, loss)
        clock.append(time.perf_counter() - begin[0])
        cpu.append(time.process_time() - begin[1])
    about = describe(["benchmarks.scaling.fit_time"])
    row = {
        "what": "default fit",
        "runs": RUNS,
        "starts": len(_Problem(axes, loss).starts()),
        "refined": REFINED,
        "seconds": round(statistics.median(clock), 3),
        "seconds_all": [round(x, 3) for x in clock],
        "cpu_seconds": round(statistics.median(cpu), 3),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "exponents": [round(x, 4) for x in law.exponents],
        "converged": law.converged,
        "commit": commit_label(about),
        "cpu": about.get("cpu"),
    }
    print(json.dumps(row))
    append_row(RESULTS / "scaling_fit_time.jsonl", row)


if __name__ == "__main__":
    main()
