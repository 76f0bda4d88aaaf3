"""Counter-based random numbers: a draw is a pure function of its key.

No generator has a state, so a draw does not depend on how samples are dealt to batches, ranks or threads, nor
on what was drawn before, and a resumed run draws what the uninterrupted one would have. The mixer is
splitmix64 (Steele, Lea and Flood 2014), whose stream, unlike a library's, is fixed by these lines.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_WORD = 2**64
_LARGEST_HALF_WORD = 1 << 20


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, a bijection of 64-bit words, in place; ``values`` is a uint64 array."""
    shifted = values >> np.uint64(30)
    values ^= shifted
    values *= _FIRST
    np.right_shift(values, np.uint64(27), out=shifted)
    values ^= shifted
    values *= _SECOND
    np.right_shift(values, np.uint64(31), out=shifted)
    values ^= shifted
    return values


def keyed(*parts: int | np.ndarray) -> np.ndarray:
    """One 64-bit word for each key; integer arrays among ``parts`` are broadcast, ints may be negative.

    Returns:
        uint64 array, at least 1-D. Keys that differ in one part give independent words.
    """
    word = np.zeros(1, np.uint64)
    for part in parts:
        bits = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(int(part) % _WORD)
        word = mix(mix((word + _GOLDEN) ^ bits) + word * _GOLDEN)  # negative ints: two's complement
    return word


def counted(words: np.ndarray, count: int) -> np.ndarray:
    """(n, count) uint64: ``count`` words from each of (n,) words, splitmix64 run as a sequence from each."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return mix(words[:, None] + steps)


def draws(words: np.ndarray, count: int, bound: int) -> np.ndarray:
    """``count`` integers in [0, bound) for each of (n,) uint64 words.

    Up to 2**20, where a 32-bit draw is fine enough (an integer's probability is off by at most bound / 2**32
    of itself, 2**-12 at worst), one word gives two draws; above, each takes a word and is off by at most
    bound / 2**64.

    Returns:
        (n, count) int64.
    """
    if bound > _LARGEST_HALF_WORD:
        return (counted(words, count) % np.uint64(bound)).view(np.int64)
    halves = counted(words, (count + 1) // 2).view(np.uint32)[:, :count].astype(np.uint64)
    halves *= np.uint64(bound)
    halves >>= np.uint64(32)
    return halves.view(np.int64)
