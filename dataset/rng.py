"""Random numbers as pure functions of their keys: no worker, prefetch or restart changes them."""

from functools import lru_cache

import numpy as np

# What a random number is for; the second half of a generator's key, beside the seed.
ORDER_X, ORDER_U, VIEW_X, VIEW_WEAK, VIEW_STRONG, REPLACE_X, REPLACE_U = range(7)


def uniforms(
    rows: np.ndarray, num_uniforms: int, seed: int, stream_id: int, passes: np.ndarray
) -> np.ndarray:
    """[n, numbers] in [0, 1): line i depends on (seed, purpose, passes[i], rows[i]) alone.

    Philox is a counter-based generator: every image and pass has a range of counters of its own.
    """
    philox = np.random.Philox(0)
    generator, state = np.random.Generator(philox), philox.state
    state["state"]["key"][:] = seed, stream_id
    out = np.empty((len(rows), num_uniforms))
    for line, row, number in zip(out, rows.tolist(), passes.tolist()):
        state["state"]["counter"][:] = 0, row, number, 0
        philox.state = state  # cheaper than a new generator for each image
        generator.random(out=line)
    return out


@lru_cache(maxsize=8)
def permutation(n: int, seed: int, stream_id: int, number: int) -> np.ndarray:
    """[n]: the order of pass `number`; it is asked for with every step of the pass."""
    return shuffled(n, seed, stream_id, number)


def shuffled(n: int, *key: int) -> np.ndarray:
    """[n]: 0 … n − 1 in a random order that depends on the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(n)
