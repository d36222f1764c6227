"""Counter-based random numbers: keyed by (seed, purpose), positioned by user.

Every purpose is its own stream, and every user owns a fixed stretch of it, so what is drawn for a user depends on
nothing but (seed, purpose, user): not on the chunk size, the number of workers, nor on what was drawn before. Only
uniforms are drawn; everything else comes from them through inverse CDFs, which consume exactly one uniform each
(rejection and ziggurat samplers consume a variable number and would move every later draw).

Philox-4x64-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import hashlib
import threading
from functools import lru_cache

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


def uniforms(
    seed: int,
    purpose: str,
    users: NDArray[np.int64],
    per_user: int,
    out: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Uniforms in the open interval (0, 1), the same for a user whatever the other users asked for with it.

    Args:
        seed: the seed of the world.
        purpose: what the numbers are for; each purpose is independent of every other.
        users: (n,) non-negative user ids, in any order, repeats allowed.
        per_user: how many numbers each user gets, at least 1.
        out: (n, per_user) float64, C-contiguous, where to put them; a new array otherwise.

    Returns:
        (n, per_user) float64.
    """
    users = np.asarray(users, dtype=np.int64)
    if out is None:
        out = np.empty((len(users), per_user))
    if len(users) == 0:
        return out
    breaks = np.flatnonzero(users[1:] - users[:-1] != 1) + 1 if len(users) > 1 else _NO_BREAKS
    if len(breaks) > 0:
        ids, back = np.unique(users, return_inverse=True)
        if len(ids) < len(users) or (ids != users).any():  # repeats and shuffles cost no more than their sorted selves
            return np.take(uniforms(seed, purpose, ids, per_user), back, axis=0, out=out)
    counts = -(-per_user // WORDS_PER_COUNT)
    whole = counts * WORDS_PER_COUNT == per_user
    stretches = out if whole else np.empty((len(users), counts * WORDS_PER_COUNT))
    start = 0
    for end in (*breaks.tolist(), len(users)):
        _stream(seed, purpose, int(users[start]) * counts).random(out=stretches[start:end])
        start = end
    np.add(stretches if whole else stretches[:, :per_user], HALF_STEP, out=out)
    if out.max() >= 1.0:  # 1 - 2^-54 is not a float64: it rounds to 1, whose inverse CDF may be infinite
        np.minimum(out, np.nextafter(1.0, 0.0), out=out)
    return out


_NO_BREAKS = np.empty(0, dtype=np.int64)
_scratch = threading.local()


def _stream(seed: int, purpose: str, counter: int) -> np.random.Generator:
    """What ``Generator(Philox(key=stream_key(seed, purpose), counter=counter))`` is, good until the next call in this
    thread. Making one takes as long as drawing 2,000 numbers, setting all of its state a tenth of that."""
    rng = getattr(_scratch, "generator", None)
    if rng is None:
        rng = _scratch.generator = np.random.Generator(np.random.Philox(key=0))
    words = tuple((counter >> shift) & 0xFFFFFFFFFFFFFFFF for shift in (0, 64, 128, 192))
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": words, "key": _key_words(seed, purpose)},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": WORDS_PER_COUNT,  # nothing left in the buffer
        "has_uint32": 0,
        "uinteger": 0,
    }
    return rng


@lru_cache(maxsize=256)
def _key_words(seed: int, purpose: str) -> tuple[int, ...]:
    return tuple(stream_key(seed, purpose).tolist())


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A sequential generator for what is not drawn user by user (titles, shuffles of a training run)."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, purpose)))


def derived_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for libraries that take one integer, independent across purposes."""
    return int(stream_key(seed, purpose)[0] >> np.uint64(1))
