"""Length mixes for jagged batches: quantiles of a law, so that every batch holds the same lengths.

Drawn lengths would make one batch twice as dear as the next; the quantiles at (i + 1/2) / B have the law's shape and
the same number of pairs every time. Only their order in the batch is random.
"""

from __future__ import annotations

import numpy as np

# Lengths of MovieLens-1M's training sequences in the paper's protocol, min(ratings of a user - 1, 200), at the
# quantiles (k + 1/2) / 64. Computed from ratings.dat of GroupLens' ml-1m.zip: 6,040 users, 1,000,209 ratings, 656,566
# training tokens, mean length 108.70 (these 64: 108.67), 8,313 causal pairs a user (8,311), 26 % of the users at 200.
ML1M = (
    19, 20, 21, 22, 24, 25, 26, 28, 29, 31, 33, 35, 36, 38, 40, 42, 44, 46, 49, 51, 53, 56, 59, 62, 65, 68, 71, 75, 79,
    83, 87, 92, 97, 101, 104, 110, 116, 121, 125, 132, 139, 147, 154, 161, 170, 178, 191, 200, 200, 200, 200, 200, 200,
    200, 200, 200, 200, 200, 200, 200, 200, 200, 200, 200,
)  # fmt: skip
ZIPF_ALPHA = 1.2
ZETA = 5.591582441177751  # Riemann's zeta(1.2)


def lengths(law: str, rows: int, longest: int) -> np.ndarray:
    """``(rows,)`` int64 rising lengths in 1..longest.

    Args:
        law: "full", all of them the longest; "uniform" in 1..longest; "zipf", P(n) proportional to n^-1.2 for all
            n >= 1 and cut to the longest, as NVIDIA's recsys-examples draws them; "ml1m", scaled from 200 to longest.
        rows: B.
        longest: N.
    """
    at = (np.arange(rows) + 0.5) / rows
    if law == "full":
        found = np.full(rows, longest)
    elif law == "uniform":
        found = np.ceil(at * longest)
    elif law == "zipf":
        mass = np.cumsum(np.arange(1, longest) ** -ZIPF_ALPHA) / ZETA  # P(length <= n), n below the longest
        found = np.searchsorted(mass, at) + 1
    elif law == "ml1m":
        mix = np.asarray(ML1M)[(at * len(ML1M)).astype(int)]
        found = np.ceil(mix * longest / max(ML1M))
    else:
        raise AssertionError(f"no law {law!r}")
    return found.astype(np.int64).clip(1, longest)
