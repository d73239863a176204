"""CartPole without velocities: only an agent with memory keeps the pole up."""

import numpy as np
import pytest

from foveal.agents import PPO
from foveal.envs import make_vec
from foveal.runs.evaluation import evaluate


def test_shows_position_and_angle_of_the_same_game():
    masked, whole = (make_vec(name, 3, seed=4) for name in ("foveal/MaskedCartPole-v0", "CartPole-v1"))
    np.testing.assert_array_equal(masked.reset(), whole.reset()[:, [0, 2]])
    assert masked.single_observation_space.shape == (2,)
    actions = np.random.default_rng(0).integers(2, size=(60, 3))
    for action in actions:
        here, there = masked.step(action), whole.step(action)
        np.testing.assert_array_equal(here.next_obs, there.next_obs[:, [0, 2]])
        np.testing.assert_array_equal(here.terminated, there.terminated)
        np.testing.assert_array_equal(here.obs, there.obs[:, [0, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", ["gru", "lstm", None])
def test_is_solved_with_memory_only(recurrent):
    config = PPO.recipe("foveal/MaskedCartPole-v0", recurrent=recurrent)
    agent = PPO("foveal/MaskedCartPole-v0", config, seed=1, device="cpu").learn(100_000, progress=False)
    score = evaluate(agent, 100)["eval/return_mean"]
    assert score >= 475 if recurrent else score < 200
