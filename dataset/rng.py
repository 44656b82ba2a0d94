"""Random numbers as pure functions of a key: workers, prefetching and restarts do not change them."""

from functools import lru_cache

import numpy as np

# Stream ids: a generator's key is the seed and the id of what its numbers are used for.
ORDER_X, ORDER_U, VIEW_X, VIEW_WEAK, VIEW_STRONG, REPLACE_X, REPLACE_U = range(7)
FURTHER_STRONG = 7  # the second strong view; those after it follow


def strong_stream_id(view: int) -> int:
    """Return the stream id of a strong view, counted from 0."""
    return FURTHER_STRONG + view - 1 if view else VIEW_STRONG


def uniforms(
    rows: np.ndarray, num_uniforms: int, seed: int, stream_id: int, passes: np.ndarray
) -> np.ndarray:
    """Draw uniform numbers [n, num_uniforms] in [0, 1): row i depends on seed, stream_id, passes[i], rows[i].

    rows, passes [n] int64. Philox is a counter-based generator: each image and pass has its own counters.
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
def permutation(n: int, *key: int) -> np.ndarray:
    """Return the order [n] of the images in a pass, cached because all steps of the pass need it."""
    return shuffled(n, *key)


def shuffled(n: int, *key: int) -> np.ndarray:
    """Return a random permutation [n] of 0 … n − 1 that depends on the key only."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(n)
