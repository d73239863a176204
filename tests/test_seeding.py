"""Episodes' seeds, made for all environments at once, are those of NumPy's SeedSequence."""

import numpy as np
import pytest
from vector_runs import seed_of

from foveal.envs.seeding import episode_seeds


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**32 + 5, 2**70 + 3, 2**128 - 1, 2**140 + 7])
def test_seeds_are_numpys(seed):
    envs, episodes = np.array([0, 1, 5, 4095, 4095]), np.array([0, 3, 2**32 - 1, 7, 8])
    for training in (True, False):
        expected = [seed_of(seed, training, int(e), int(n)) for e, n in zip(envs, episodes, strict=True)]
        got = episode_seeds(seed, 0 if training else 1, envs, episodes)
        assert got.dtype == np.int64
        assert got.tolist() == expected
        assert len(set(expected)) == 5
