"""Deep agents against the exact solution of a small world: the policies that they learn are optimal in it."""

from typing import Any

import numpy as np
import pytest

from foveal.agents import A2C, DQN, PPO, PQN, REINFORCE
from foveal.agents.tabular import expected_return, optimal_return
from foveal.envs import make_mdp, make_vec

WORLD = {"map": "4x3", "slip": 0.1}
GAMMA = 0.99
# Noise in the last updates is what keeps a policy from being optimal: step sizes fall.
AGENTS: list[tuple[Any, dict[str, Any], int]] = [
    (
        DQN,
        {
            "gamma": 0.95,
            "learning_rate": 2e-3,
            "learning_rate_final": 1e-4,
            "learning_starts": 400,
            "train_every": 8,
            "gradient_steps": 4,
            "batch_size": 64,
            "target_every": 100,
            "exploration_fraction": 1.0,
            "exploration_final": 0.4,  # it learns off-policy: that it wanders does not spoil the values
        },
        4000,
    ),
    (
        PQN,
        {
            "gamma": 0.95,
            "num_steps": 16,
            "epochs": 2,
            "minibatches": 4,
            "learning_rate": 5e-3,
            "exploration_fraction": 1.0,
            "exploration_final": 0.3,
        },
        5000,
    ),
    (REINFORCE, {"learning_rate": 0.01, "entropy_coefficient": 0.01}, 8000),
    (
        A2C,
        {
            "num_steps": 16,
            "learning_rate": 0.01,
            "learning_rate_final": 0.0,
            "optimizer": "adam",
            "entropy_coefficient": 0.02,
        },
        6000,
    ),
    (
        PPO,
        {
            "num_steps": 32,
            "minibatch_size": 64,
            "learning_rate": 0.01,
            "learning_rate_final": 0.0,
            "entropy_coefficient": 0.02,
        },
        6000,
    ),
]


@pytest.mark.parametrize(("agent_class", "settings", "steps"), AGENTS, ids=[a[0].name for a in AGENTS])
def test_greedy_policies_are_optimal(agent_class, settings, steps):
    """Their value is not measured but calculated; an even walk is worth less than nothing."""
    mdp = make_mdp("foveal/GridWorld-v0", WORLD)
    optimum = optimal_return(mdp, GAMMA)
    even = np.full((mdp.num_states, 4), 0.25)
    assert expected_return(mdp, even, GAMMA) < 0 < 0.7 < optimum
    env = make_vec("foveal/GridWorld-v0", 8, seed=3, env_kwargs=WORLD)
    encoder = "mlp-tanh" if agent_class is DQN else "auto"
    agent: Any = agent_class(env, agent_class.Config(num_envs=8, **settings), encoder, seed=3, device="cpu")
    agent.learn(steps, progress=False)
    greedy = np.eye(4)[agent.predict(np.arange(mdp.num_states), deterministic=True)[0]]
    assert expected_return(mdp, greedy, GAMMA, max_steps=1000) > optimum - 0.03
