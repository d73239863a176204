"""Seeds of episodes: NumPy's SeedSequence for thousands of environments at once.

One SeedSequence takes 10 microseconds, most of what a step of a native environment with short episodes takes.
Its hash is written here anew, on arrays; NumPy promises that it stays the same for ever.
"""

import functools

import numpy as np

INIT_A, MULT_A = 0x43B0D7E5, 0x931E8875
INIT_B, MULT_B = 0x8B51F9DD, 0x58F38DED
MIX_L, MIX_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
POOL = 4
WORD = 0xFFFFFFFF


def episode_seeds(seed: int, stream: int, envs: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """The first words of SeedSequence(seed, spawn_key=(stream, env, episode)), for each env and its episode
    (N,), halved: int64 (N,) from 0 to 2^31 - 1. `seed` is 0 or more, the others are from 0 to 2^32 - 1."""
    pool, constant = entropy_pool(seed, stream)
    words = list(pool)
    for values in (envs, episodes):
        values = values.astype(np.uint32)
        for i in range(POOL):
            hashed, constant = hash_word(values, constant, MULT_A)
            words[i] = mix(words[i], hashed)
    return (hash_word(words[0], INIT_B, MULT_B)[0] >> np.uint32(1)).astype(np.int64)


@functools.lru_cache(maxsize=16)
def entropy_pool(seed: int, stream: int) -> tuple[list[np.ndarray], int]:
    """What all environments have in common: four words (1,) uint32, and the constant that comes next."""
    words = [seed >> shift & WORD for shift in range(0, max(seed.bit_length(), 1), 32)]
    words += [0] * (POOL - len(words))
    entropy = [np.array([word], np.uint32) for word in [*words, stream]]
    pool, constant = [], INIT_A
    for i in range(POOL):
        hashed, constant = hash_word(entropy[i], constant, MULT_A)
        pool.append(hashed)
    for source in range(POOL):
        for i in range(POOL):
            if i != source:
                hashed, constant = hash_word(pool[source], constant, MULT_A)
                pool[i] = mix(pool[i], hashed)
    for word in entropy[POOL:]:
        for i in range(POOL):
            hashed, constant = hash_word(word, constant, MULT_A)
            pool[i] = mix(pool[i], hashed)
    return pool, constant


def hash_word(values: np.ndarray, constant: int, multiplier: int) -> tuple[np.ndarray, int]:
    """SeedSequence's hash of words (N,) uint32, and its constant after that."""
    after = constant * multiplier & WORD
    values = (values ^ np.uint32(constant)) * np.uint32(after)
    return values ^ (values >> np.uint32(16)), after


def mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = MIX_L * x - MIX_R * y
    return mixed ^ (mixed >> np.uint32(16))
