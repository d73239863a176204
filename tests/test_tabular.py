"""Exact values against hand-computed chains, brute force and the environment; the agents that use them."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from matplotlib.text import Annotation

from foveal.agents import (
    AGENTS,
    PolicyIteration,
    QLearning,
    ValueIteration,
    load,
    load_checkpoint,
    newest_first,
    save_checkpoint,
)
from foveal.agents.tabular import (
    QLearningConfig,
    ValueIterationConfig,
    act,
    action_values,
    expected_return,
    greedy,
    improve,
    occupancy,
    optimal_return,
    optimality_backup,
    optimum_near,
    policy_gradient,
    policy_iteration,
    policy_values,
    q_learning_update,
    recurrent,
    reward_process_values,
    softmax,
    under_policy,
    value_iteration,
)
from foveal.envs import MDP, make_mdp, make_vec
from foveal.runs.cli import main
from foveal.runs.evaluation import evaluate
from foveal.runs.plots import draw_values_on_map

ENV_ID = "foveal/GridWorld-v0"


def random_walk() -> MDP:
    """Sutton and Barto, example 6.2: five states between two ends, 1 for leaving at the right."""
    P = np.zeros((7, 1, 7))
    for state in range(1, 6):
        P[state, 0, [state - 1, state + 1]] = 0.5
    P[0, 0, 0] = P[6, 0, 6] = 1
    rewards = np.zeros((7, 1))
    rewards[5] = 0.5
    return MDP(P, rewards, np.isin(np.arange(7), [0, 6]), np.eye(7)[3])


def random_mdp(seed: int, states: int = 6, actions: int = 3, terminal: int = 1) -> MDP:
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(states, 0.3), size=(states, actions))
    rewards = rng.normal(size=(states, actions))
    ends = np.arange(states) >= states - terminal
    P[ends], rewards[ends] = 0, 0
    P[ends, :, ends] = 1
    return MDP(P, rewards, ends, rng.dirichlet(np.ones(states)))


MDPS = [*(random_mdp(seed) for seed in range(3)), random_mdp(3, terminal=0), make_mdp(ENV_ID, {"map": "8x8"})]


# Values of a chain and of a policy.


def test_random_walk_has_the_books_values():
    mdp = random_walk()
    only = np.ones((7, 1))
    np.testing.assert_allclose(policy_values(mdp, only, 1.0), [0, *(np.arange(1, 6) / 6), 0], atol=1e-14)
    np.testing.assert_allclose(occupancy(mdp, only, 1.0), [0, 1, 2, 3, 2, 1, 0], atol=1e-14)
    assert expected_return(mdp, only) == pytest.approx(0.5)
    assert expected_return(mdp, only, max_steps=2) == 0
    assert expected_return(mdp, only, max_steps=3) == pytest.approx(1 / 8)
    assert expected_return(mdp, only, max_steps=5) == pytest.approx(1 / 8 + 3 / 32)
    assert expected_return(mdp, only, gamma=0.5, max_steps=3) == pytest.approx(1 / 8 / 4)


def test_chain_by_hand():
    """v0 = 1 + g (v0 + v1) / 2, v1 = 2 + g v0, at g = 1/2: v0 = 1 + v0/4 + 1/2 + v0/8."""
    P = np.array([[0.5, 0.5], [1.0, 0.0]])
    v = reward_process_values(P, np.array([1.0, 2.0]), 0.5)
    np.testing.assert_allclose(v, [2.4, 3.2], rtol=1e-14)


def test_undiscounted_chains():
    """0 -> 1 <-> 2 goes round for ever; 3 is left at once for 4, where it ends."""
    P = np.zeros((5, 5))
    P[0, 1] = P[1, 2] = P[2, 1] = P[3, 4] = P[4, 4] = 1
    np.testing.assert_array_equal(recurrent(P), [False, True, True, False, True])
    rewards = np.array([3.0, 0.0, 0.0, 2.0, 0.0])
    np.testing.assert_array_equal(reward_process_values(P, rewards, 1.0), rewards)
    rewards[2] = 1.0
    with pytest.raises(ValueError, match="gamma=1 takes a process that ends; state 2 gives rewards for ever"):
        reward_process_values(P, rewards, 1.0)
    mdp = MDP(P[:, None], rewards[:, None], np.arange(5) == 4, np.eye(5)[0])
    with pytest.raises(ValueError, match="gamma=1 takes a policy that ends; it may stay around state 1"):
        occupancy(mdp, np.ones((5, 1)), 1.0)
    with pytest.raises(ValueError, match="gamma must be between 0 and 1, got 1.5"):
        expected_return(mdp, np.ones((5, 1)), 1.5)


@pytest.mark.parametrize("mdp", MDPS)
def test_closed_form_occupancy_and_iteration_agree(mdp):
    policy = softmax(np.random.default_rng(0).normal(size=mdp.rewards.shape))
    P, rewards = under_policy(mdp, policy)
    v = policy_values(mdp, policy, 0.9)
    np.testing.assert_allclose(rewards + 0.9 * P @ v, v, atol=1e-12)
    assert occupancy(mdp, policy, 0.9) @ rewards == pytest.approx(mdp.start @ v)
    assert expected_return(mdp, policy, 0.9, max_steps=400) == pytest.approx(mdp.start @ v)


# The best policy.


@pytest.mark.parametrize("mdp", MDPS[:4])
def test_optimal_values_are_those_of_the_best_of_all_policies(mdp):
    """Every deterministic policy, valued by a sum of powers of its matrix."""
    best = np.full(mdp.num_states, -np.inf)
    for choice in itertools.product(range(mdp.num_actions), repeat=int((~mdp.terminal).sum())):
        actions = np.array([*choice, *[0] * int(mdp.terminal.sum())])
        P = mdp.P[np.arange(mdp.num_states), actions]
        v = mdp.rewards[np.arange(mdp.num_states), actions]
        for doubling in range(8):  # of the horizon, to 256 steps
            v, P = v + 0.8 ** (2**doubling) * P @ v, P @ P
        best = np.maximum(best, v)
    np.testing.assert_allclose(value_iteration(mdp, 0.8).max(axis=1), best, atol=1e-8)


@pytest.mark.parametrize("mdp", MDPS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_value_iteration_policy_iteration_and_bellman_agree(mdp, gamma):
    q = value_iteration(mdp, gamma)
    policy, values = policy_iteration(mdp, gamma)
    np.testing.assert_allclose(q, values, atol=1e-7)
    residual = mdp.rewards + gamma * mdp.P @ values.max(axis=1) - values
    assert np.abs(residual).max() < 1e-10
    np.testing.assert_allclose(policy_values(mdp, policy, gamma), values.max(axis=1), atol=1e-10)
    assert not values[mdp.terminal].any()
    assert not q[mdp.terminal].any()


@pytest.mark.parametrize("mdp", MDPS)
@pytest.mark.parametrize("max_error", [1.0, 1e-2, 1e-5])
def test_value_iteration_keeps_its_promise(mdp, max_error):
    exact = policy_iteration(mdp, 0.95)[1]
    assert np.abs(value_iteration(mdp, 0.95, max_error) - exact).max() <= max_error


@pytest.mark.parametrize("mdp", MDPS)
def test_bound_holds_at_every_sweep_and_is_no_wider_than_the_usual_one(mdp):
    exact, gamma = policy_iteration(mdp, 0.9)[1], 0.9
    q = np.random.default_rng(1).normal(size=mdp.rewards.shape) * 10  # terminal states too
    for sweep in range(60):
        previous, q = q, optimality_backup(mdp, q, gamma)
        estimate, error = optimum_near(mdp, q, previous, gamma)
        assert np.abs(estimate - exact).max() <= error + 1e-12
        if sweep:
            assert error <= gamma / (1 - gamma) * np.abs(q - previous).max() + 1e-12
    assert error < 0.1


def test_undiscounted_policy_iteration_does_not_stand_still():
    """With no cost of a step, standing still is as good as walking on, by its value alone."""
    mdp = make_mdp(ENV_ID, {"map": "8x8", "slip": 0.0, "step_reward": 0.0})
    policy, q = policy_iteration(mdp, 1.0)
    assert q.max(axis=1)[~mdp.terminal] == pytest.approx(1.0)
    assert expected_return(mdp, policy) == pytest.approx(1.0)
    assert optimal_return(mdp) == pytest.approx(1.0)


def test_optimal_return_by_hand():
    mdp = make_mdp(ENV_ID, {"map": "4x4", "slip": 0.0})
    assert optimal_return(mdp, max_steps=5) == pytest.approx(5 * -0.04), "the goal is six steps away"
    assert optimal_return(mdp, max_steps=6) == pytest.approx(1 - 6 * 0.04)
    assert optimal_return(mdp) == pytest.approx(1 - 6 * 0.04)
    assert optimal_return(mdp, 0.5) == pytest.approx(0.5**5 - 0.04 * (2 - 0.5**5))


def test_hurry_is_worth_something_when_steps_are_few():
    mdp = make_mdp(ENV_ID, {"map": "8x8"})
    policy, _ = policy_iteration(mdp, 1.0)
    few = [expected_return(mdp, policy, max_steps=n) for n in (16, 20, 100, 1000)]
    best = [optimal_return(mdp, max_steps=n) for n in (16, 20, 100, 1000)]
    assert best[0] > few[0] + 0.005
    assert best[-1] == pytest.approx(few[-1]) == pytest.approx(optimal_return(mdp))
    assert all(b >= f - 1e-12 for b, f in zip(best, few))


def test_greedy_takes_all_of_the_best_and_improve_keeps_ties():
    q = np.array([[1.0, 1.0, 0.5], [0.0, 2.0, 1.0]])
    np.testing.assert_array_equal(greedy(q), [[0.5, 0.5, 0], [0, 1, 0]])
    policy = np.array([[0.0, 1, 0], [1, 0, 0]])
    better, changed = improve(policy, q)
    np.testing.assert_array_equal(better, [[0, 1, 0], [0, 1, 0]])
    assert changed == 1


@pytest.mark.parametrize("gamma", [1.0, -0.1, float("nan")])
def test_value_iteration_needs_a_discount(gamma):
    with pytest.raises(ValueError, match=f"gamma must be at least 0 and less than 1, got {gamma}"):
        value_iteration(MDPS[0], gamma)


@pytest.mark.parametrize("map", ["4x3", "8x8", "cliff"])
def test_greedy_policy_earns_in_the_environment_what_the_arrays_say(map):
    env = make_vec(ENV_ID, num_envs=1, seed=3, env_kwargs={"map": map, "slip": 0.2})
    agent = PolicyIteration(env).learn(10_000, progress=False)
    assert agent.converged
    exact = expected_return(agent.mdp, np.eye(4)[agent.q.argmax(axis=1)], max_steps=100)
    returns = np.array(evaluate(agent, 1000, num_envs=50)["eval/returns"])
    error = returns.std() / np.sqrt(len(returns))
    assert abs(returns.mean() - exact) < 3.5 * error
    assert error < 0.06


# The policy gradient.


@pytest.mark.parametrize("mdp", [MDPS[0], MDPS[3], make_mdp(ENV_ID, {"map": "4x3"})])
@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_policy_gradient_is_the_slope_of_the_return(mdp, gamma):
    theta = np.random.default_rng(2).normal(size=mdp.rewards.shape)
    step, slope = 1e-5, np.zeros_like(theta)
    for index in np.ndindex(theta.shape):
        change = np.zeros_like(theta)
        change[index] = step
        up, down = (expected_return(mdp, softmax(theta + sign * change), gamma) for sign in (1, -1))
        slope[index] = (up - down) / (2 * step)
    np.testing.assert_allclose(policy_gradient(mdp, theta, gamma), slope, atol=1e-8)
    assert np.abs(slope).max() > 5e-4


def test_undiscounted_state_weights():
    """Against the sum over time steps that they stand for; at gamma 1 the two are one."""
    mdp = make_mdp(ENV_ID, {"map": "4x3"})
    theta = np.random.default_rng(2).normal(size=mdp.rewards.shape)
    policy, gamma = softmax(theta), 0.7
    v = policy_values(mdp, policy, gamma)
    terms = policy * (action_values(mdp, v, gamma) - v[:, None])
    P, _ = under_policy(mdp, policy)
    here, total = mdp.start, np.zeros_like(theta)
    for _ in range(2000):
        total += here[:, None] * terms
        here = here @ P
    practice = policy_gradient(mdp, theta, gamma, discount_states=False)
    np.testing.assert_allclose(practice, total, atol=1e-10)
    assert np.abs(practice - policy_gradient(mdp, theta, gamma)).max() > 0.01
    exact, practice = (policy_gradient(mdp, theta, 1.0, discount_states=flag) for flag in (True, False))
    np.testing.assert_array_equal(exact, practice)


# Q-learning.


def test_update_by_hand():
    q, visits = np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[0, 0], [3, 0]])
    config = QLearningConfig(gamma=0.5, learning_rate=0.8, learning_rate_power=0.5)
    transitions = [(0, 0, 1.0, False, 1), (0, 0, 1.0, True, 1), (1, 0, 0.0, False, 0)]
    total = q_learning_update(q, visits, iter(transitions), config)
    first = 1 + 0.8 * (1 + 0.5 * 3 - 1)  # 2.2
    second = first + 0.8 / 2**0.5 * (1 - first)  # a termination: only the reward
    third = 3 + 0.8 / 2 * (0.5 * 2 - 3)  # its fourth visit
    np.testing.assert_allclose(q, [[second, 2.0], [third, 0.0]])
    np.testing.assert_array_equal(visits, [[2, 0], [4, 0]])
    assert total == pytest.approx(1.5 + 1.2 + 2.0)


def test_acting_draws_ties_and_epsilon_for_each_row():
    q = np.tile([1.0, 0.0, 1.0, 0.5], (4000, 1))
    counts = np.bincount(act(q, 0.0, np.random.default_rng(0)), minlength=4)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert abs(counts[0] - 2000) < 4 * np.sqrt(1000)
    counts = np.bincount(act(q, 0.4, np.random.default_rng(0)), minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.4, 0.1, 0.4, 0.1], atol=4 * np.sqrt(0.24 / 4000))


@pytest.mark.parametrize("num_envs", [1, 16])
def test_q_learning_converges_to_the_optimum(num_envs):
    """Exploring at random: what it learns does not depend on what it does."""
    config = QLearningConfig(num_envs=num_envs, gamma=0.9, exploration_final=1.0, learning_rate_power=0.85)
    env = make_vec(ENV_ID, num_envs, seed=1, env_kwargs={"map": ["S.G", "..."], "slip": 0.2})
    agent = QLearning(env, config, seed=1)
    exact = value_iteration(make_mdp(ENV_ID, agent.env_spec()["env_kwargs"]), 0.9)
    agent.learn(8_000, progress=False)
    assert agent.visits.sum() == agent.env_step == 8_000
    assert agent.grad_step == 8_000 // num_envs
    assert np.abs(agent.q - exact).max() < 0.03
    np.testing.assert_array_equal(agent.q.argmax(axis=1)[:2], [1, 1])


def test_q_learning_bootstraps_through_truncation():
    """Every episode is cut off after one step; the value of the next state still comes through."""
    env = make_vec(ENV_ID, 4, env_kwargs={"map": "SSG", "slip": 0.0}, max_episode_steps=1)
    agent = QLearning(env, QLearningConfig(num_envs=4, gamma=0.9, learning_rate_power=0.0), seed=1)
    agent.learn(2_000, progress=False)
    assert agent.q[1, 1] == pytest.approx(0.96)
    assert agent.q[0, 1] == pytest.approx(-0.04 + 0.9 * 0.96)


@pytest.mark.parametrize(
    ("env_id", "steps", "best"), [("CliffWalking-v1", 15_000, -13.0), ("FrozenLake-v1", 25_000, 0.816)]
)
def test_q_learning_on_gymnasiums_tables(env_id, steps, best):
    agent = QLearning(env_id, QLearningConfig(num_envs=16), seed=1).learn(steps, progress=False)
    mdp = make_mdp(env_id)
    score = expected_return(mdp, np.eye(mdp.num_actions)[agent.q.argmax(axis=1)], max_steps=200)
    assert score == pytest.approx(best, abs=0.05)


# The agents.


def everything(agent: Any) -> Any:
    tensors, meta = agent.state()
    return {"q": agent.q.tolist(), **{k: t.tolist() for k, t in tensors.items()}}, json.loads(
        json.dumps(meta)
    )


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(("time/", "speed/"))}


@pytest.mark.parametrize("name", ["value-iteration", "policy-iteration", "q-learning"])
def test_checkpoint_and_go_on_is_bit_for_bit(name, tmp_path):
    log_every = 100 if name == "q-learning" else 1

    def make() -> Any:
        env = make_vec(ENV_ID, 2, seed=3, env_kwargs={"map": "8x8"})
        return AGENTS[name](env, seed=3)

    whole = make()
    rows = [timeless(row) for row in whole.training(3_000, log_every)]
    agent, resumed = make(), []
    for stop in (400, 700, 3_000):
        for row in agent.training(3_000, log_every):
            resumed.append(timeless(row))
            if row["env_step"] >= stop:
                break
        save_checkpoint(agent, tmp_path)
        agent = load(newest_first(tmp_path)[0])
        assert load_checkpoint(newest_first(tmp_path)[0], agent)
    assert resumed == rows
    assert len(rows) >= 5
    assert everything(agent) == everything(whole)
    assert agent.converged == whole.converged == (name == "policy-iteration")


@pytest.mark.parametrize("agent_class", [ValueIteration, PolicyIteration])
def test_planners_end_when_they_have_converged(agent_class):
    agent = agent_class(ENV_ID)
    rows = list(agent.training(1_000_000, log_every=1))
    assert agent.converged
    assert [row["env_step"] for row in rows] == [56 * n for n in range(1, len(rows) + 1)], (
        "14 states, 4 actions"
    )
    assert list(agent.training(1_000_000)) == []
    exact = policy_iteration(agent.mdp, 0.99)[1]
    np.testing.assert_allclose(agent.q, exact, atol=1e-9)
    assert rows[-1]["train/start_value"] == pytest.approx(optimal_return(agent.mdp, 0.99))
    if agent_class is ValueIteration:
        errors = [row["train/max_error"] for row in rows]
        assert errors[-1] <= 1e-9 < errors[-2]
    else:
        assert rows[-1]["train/changed_states"] == 0
        assert len(rows) < 10


def test_value_iteration_keeps_the_estimate_that_the_bound_is_of():
    agent = ValueIteration(ENV_ID, ValueIterationConfig(max_error=0.02)).learn(10_000, progress=False)
    np.testing.assert_array_equal(agent.q, value_iteration(agent.mdp, 0.99, 0.02))
    assert np.abs(agent.q - policy_iteration(agent.mdp, 0.99)[1]).max() <= 0.02


def test_predict_and_load(tmp_path):
    agent = PolicyIteration(ENV_ID, seed=5).learn(1_000, progress=False)
    again: Any = load(agent.save(tmp_path / "weights.safetensors"))
    assert type(again) is PolicyIteration
    np.testing.assert_array_equal(again.q, agent.q)
    assert again.network.q.dtype == torch.float64
    states = np.arange(14)
    actions, state = again.predict(states)
    np.testing.assert_array_equal(actions, agent.q.argmax(axis=1))
    assert state is None
    assert again.predict(np.int64(3))[0] == actions[3]
    again.q[3] = [0, 0, 0, 1]
    assert again.predict(3)[0] == 3, "the table is the network's memory"


def test_first_action_and_state_other_than_zero():
    class Shifted(gym.Env):
        observation_space = gym.spaces.Discrete(2, start=5)
        action_space = gym.spaces.Discrete(2, start=-1)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return 5, {}

        def step(self, action: Any) -> Any:
            assert action in (-1, 0)
            return 6, float(action), True, False, {}

    gym.register("Shifted-v0", lambda **_: Shifted())
    try:
        agent = QLearning("Shifted-v0", seed=1).learn(200, progress=False)
        np.testing.assert_allclose(agent.q, [[-1, 0], [0, 0]], atol=1e-12)
        assert agent.predict(np.array([5]), deterministic=True)[0].tolist() == [0]
    finally:
        gym.registry.pop("Shifted-v0")


class NoTable(gym.Env):
    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return 0, {}


@pytest.fixture
def no_table():
    gym.register("NoTable-v0", lambda **_: NoTable())
    yield
    gym.registry.pop("NoTable-v0")


# The command line.

QUICK = [
    *("--env-id", ENV_ID, "--track", "off", "--no-progress", "--final-episodes", "30"),
    *("--eval-episodes", "3", "--eval-every", "1000"),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_folder() -> Path:
    (path,) = (folder for folder in Path("results").glob("*/*") if folder.is_dir())
    return path


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["value-iteration", "policy-iteration", "q-learning"])
def test_from_the_command_line(name, capsys):
    steps = ["--total-steps", "10000", "--num-envs", "8"] if name == "q-learning" else []
    assert main(["train", name, *QUICK, *steps]) == 0
    out = capsys.readouterr().out
    run = run_folder()
    for part in ("plots/learning_curve.png", "plots/values.png", "videos/policy.mp4"):
        assert f"{run / part}\n" in out
        assert (run / part).stat().st_size > 2000
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished"
    mdp = make_mdp(ENV_ID)
    best = optimal_return(mdp, max_steps=100)
    agent: Any = load(run)
    assert expected_return(mdp, np.eye(4)[agent.q.argmax(axis=1)], max_steps=100) == pytest.approx(
        best, abs=1e-3
    )
    assert summary["eval/return_ci95"][0] - 0.1 < best < summary["eval/return_ci95"][1] + 0.1
    assert summary["baseline/random_policy"] < best - 1
    assert json.loads((run / "config.json").read_text())["encoder"] == "table"
    if name != "q-learning":
        assert agent.env_step == summary["eval/env_step"] == rows_of(run)[-1]["env_step"] < 10_000
        assert agent.grad_step == len(rows_of(run))
        assert "eval/return_mean" in rows_of(run)[-1], (
            "the end is evaluated though no total of steps is reached"
        )
        assert main(["resume", str(run)]) == 2
        assert f"is finished: it converged at {agent.env_step:,} steps" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--episodes", "3", "--no-deterministic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).get("epsilon") == (0.05 if name == "q-learning" else None)


def test_what_has_converged_is_chosen_whatever_its_luck(monkeypatch):
    """Twenty episodes of a slippery world may favour a policy on the way."""

    def unlucky(agent: Any, *arguments: Any, **options: Any) -> Any:
        result = evaluate(agent, *arguments, **options)
        return result | {"eval/return_mean": -float(agent.env_step)}

    monkeypatch.setattr("foveal.runs.train.evaluate", unlucky)
    assert main(["train", "policy-iteration", *QUICK, "--eval-every", "1", "--no-video"]) == 0
    assert json.loads((run_folder() / "summary.json").read_text())["eval/env_step"] == 168


@pytest.mark.parametrize("name", ["value-iteration", "policy-iteration", "q-learning"])
def test_killed_run_goes_on_to_the_same_end(name):
    """A run whose process is gone, with a checkpoint from the middle and rows beyond it."""
    flags = ["--no-video", "--env-kwargs", "map=8x8", "--final-episodes", "3", "--checkpoint-every"]
    flags += ["4000"] if name == "value-iteration" else ["400"]
    flags += (
        ["--total-steps", "1600", "--log-every", "200", "--num-envs", "4"] if name == "q-learning" else []
    )
    assert main(["train", name, *QUICK, *flags]) == 0
    whole, killed = run_folder(), Path("killed")
    shutil.copytree(whole, killed)
    newest, older = newest_first(killed / "checkpoints")
    shutil.rmtree(newest)
    lines = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    (killed / "summary.json").write_text(
        json.dumps({"state": "running", "process": {"host": "gone", "pid": 1}})
    )
    assert int(older.name.partition("-")[2]) < rows_of(whole)[-1]["env_step"]
    assert main(["resume", str(killed), "--no-progress"]) == 0
    assert rows_of(killed) == rows_of(whole)
    summary, expected = (json.loads((run / "summary.json").read_text()) for run in (killed, whole))
    assert "resume_mismatch" not in summary
    assert summary["eval/return_mean"] == expected["eval/return_mean"]
    ends = [newest_first(run / "checkpoints")[0] / "weights.safetensors" for run in (killed, whole)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["value-iteration", "--env-id", "CartPole-v1"],
            "value-iteration takes Discrete observations; CartPole",
        ),
        (
            ["value-iteration", "--env-id", "NoTable-v0"],
            "exposes its transitions, as `mdp` or as Gymnasium's",
        ),
        (["policy-iteration", "--env-id", "NoTable-v0"], "NoTable-v0 does not"),
        (["q-learning"], "q-learning takes Discrete observations; CartPole-v1 has Box"),
        (["q-learning", *QUICK, "--encoder", "mlp"], "encoder must be auto: q-learning looks states up"),
        (
            ["q-learning", *QUICK, "--device", "meta"],
            "device must be auto or cpu: q-learning has a table there",
        ),
        (
            ["q-learning", *QUICK, "--learning-rate", "2"],
            "learning_rate must be greater than 0 and at most 1",
        ),
        (
            ["q-learning", *QUICK, "--learning-rate-power", "-1"],
            "learning_rate_power must be between 0 and 1",
        ),
        (["q-learning", *QUICK, "--initial-value", "nan"], "initial_value must be finite, got nan"),
        (["q-learning", *QUICK, "--num-envs", "0"], "num_envs must be 1 or more, got 0"),
        (["value-iteration", *QUICK, "--gamma", "1"], "gamma must be at least 0 and less than 1, got 1.0"),
        (["value-iteration", *QUICK, "--max-error", "0"], "max_error must be greater than 0, got 0.0"),
        (["value-iteration", *QUICK, "--env-kwargs", "map=5x5"], "map '5x5' is unknown; nearest: "),
        (["value-iteration", *QUICK, "--env-kwargs", "slip=2"], "slip must be between 0 and 1, got 2"),
        (["value-iterator"], "unknown agent or model 'value-iterator'; nearest: value-iteration"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys, no_table):
    code: object
    try:
        code = main(["train", *arguments])
    except SystemExit as error:  # the parser's own
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    if err.startswith("foveal: "):
        assert err.count("\n") == 1
    assert not Path("results").exists()


def test_constructor_refuses_at_once(no_table):
    with pytest.raises(ValueError, match="NoTable-v0 does not"):
        ValueIteration("NoTable-v0")
    gym.register("BoxActions-v0", lambda **_: BoxActions())
    try:
        with pytest.raises(ValueError, match="q-learning takes Discrete actions; BoxActions-v0 has Box"):
            QLearning("BoxActions-v0")
    finally:
        gym.registry.pop("BoxActions-v0")
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        ValueIterationConfig(gamma=1.0)


class BoxActions(NoTable):
    action_space: Any = gym.spaces.Box(-1, 1, (1,))


# The picture.


def test_values_are_drawn_with_all_greedy_arrows():
    rows = ["S.#", ".PG", "..."]
    mdp = make_mdp(ENV_ID, {"map": rows, "slip": 0.0})
    q = value_iteration(mdp, 0.9)
    figure = draw_values_on_map(q, rows, title="a title")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "a title"
    arrows = [text for text in axes.texts if isinstance(text, Annotation)]
    drawn = sorted(
        (tuple(np.round(a.xyann)), tuple(np.sign(np.round(np.subtract(a.xy, a.xyann), 6)))) for a in arrows
    )
    up, right, down, left = (0, -1), (1, 0), (0, 1), (-1, 0)
    assert up not in [direction for _, direction in drawn[:-1]]
    assert drawn == sorted(
        [
            ((0, 0), down),
            ((1, 0), left),
            ((0, 1), down),
            ((0, 2), right),
            ((1, 2), right),
            ((2, 2), up),
        ]
    )
    words = {text.get_text() for text in axes.texts} - {""}
    assert words == {"pit", "goal", *(f"{v:.3f}" for v in q.max(axis=1)[~mdp.terminal])}


def test_ties_and_an_empty_table_are_drawn():
    rows = ["S.", ".G"]
    q = value_iteration(make_mdp(ENV_ID, {"map": rows, "slip": 0.0}), 0.9)
    for table, count in ((q, 2 + 1 + 1), (np.zeros((4, 4)), 3 * 4)):
        figure = draw_values_on_map(table, rows)
        figure.draw_without_rendering()
        assert sum(isinstance(text, Annotation) for text in figure.axes[0].texts) == count
