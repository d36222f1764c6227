"""Counter-based random numbers: keyed by (seed, purpose), positioned by user.

Every purpose is its own stream, and every user owns a fixed stretch of it, so what is drawn for a user depends on
nothing but (seed, purpose, user): not on the chunk size, the number of workers, nor on what was drawn before. Only
uniforms are drawn; everything else comes from them through inverse CDFs, which consume exactly one uniform each
(rejection and ziggurat samplers consume a variable number and would move every later draw).

Philox-4x64-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

WORDS_PER_COUNT = 4
"""A Philox-4x64 counter yields four 64-bit words; a user's stretch is a whole number of counters."""

HALF_STEP = 2.0**-54
"""NumPy's uniforms are multiples of 2^-53 in [0, 1); half a step more puts them in the open interval (0, 1),
so that no logarithm of one is ever infinite."""


def stream_key(seed: int, purpose: str) -> NDArray[np.uint64]:
    """The 128-bit Philox key of a purpose: (2,) uint64."""
    digest = hashlib.blake2b(f"{int(seed)}/{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64).copy()


def uniforms(seed: int, purpose: str, users: NDArray[np.int64], per_user: int) -> NDArray[np.float64]:
    """Uniforms in the open interval (0, 1), the same for a user whatever the other users asked for with it.

    Args:
        seed: the seed of the world.
        purpose: what the numbers are for; each purpose is independent of every other.
        users: (n,) non-negative user ids, in any order, repeats allowed.
        per_user: how many numbers each user gets, at least 1.

    Returns:
        (n, per_user) float64.
    """
    users = np.asarray(users, dtype=np.int64)
    counts = -(-per_user // WORDS_PER_COUNT)
    out = np.empty((len(users), per_user))
    if len(users) == 0:
        return out
    key = stream_key(seed, purpose)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(users) != 1) + 1])
    if len(starts) > 1:
        ids, back = np.unique(users, return_inverse=True)
        if len(ids) < len(users) or (ids != users).any():  # repeats and shuffles cost no more than their sorted selves
            return uniforms(seed, purpose, ids, per_user)[back]
    ends = np.append(starts[1:], len(users))
    for start, end in zip(starts, ends, strict=True):
        bits = np.random.Philox(key=key, counter=int(users[start]) * counts)
        block = np.random.Generator(bits).random((end - start, counts * WORDS_PER_COUNT))
        out[start:end] = block[:, :per_user]
    out += HALF_STEP
    # 1 - 2^-54 is not a float64: it rounds to 1, whose inverse CDF may be infinite
    return np.minimum(out, np.nextafter(1.0, 0.0), out=out)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A sequential generator for what is not drawn user by user (titles, shuffles of a training run)."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, purpose)))


def derived_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for libraries that take one integer, independent across purposes."""
    return int(stream_key(seed, purpose)[0] >> np.uint64(1))
