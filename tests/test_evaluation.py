"""Evaluation: which episodes count, what it reports, and what it leaves alone."""

import itertools
import random

import gymnasium as gym
import numpy as np
import pytest
import torch

from foveal.envs import Episode, Step, make_vec
from foveal.runs import evaluation
from foveal.runs.evaluation import evaluate, evaluation_row, random_policy_return, validation_seed
from foveal.runs.statistics import bootstrap_ci


class Scripted:
    """A vector environment whose episodes have given lengths. Observations are (environment, step in the
    episode); the score of episode e in environment i is 100 i + e."""

    lengths: tuple[tuple[int, ...], ...] = ()

    def __init__(self, num_envs, seed, **spec):
        self.num_envs, self.seed, self.spec = num_envs, seed, spec
        self.single_action_space = gym.spaces.Discrete(2)
        self.script = [itertools.cycle(lengths) for lengths in self.lengths[:num_envs]]
        self.length = [next(script) for script in self.script]
        self.at, self.episode, self.closed = [0] * num_envs, [0] * num_envs, False

    def obs(self):
        return np.array([[i, at] for i, at in enumerate(self.at)])

    def reset(self):
        return self.obs()

    def step(self, actions):
        over, episodes = np.zeros(self.num_envs, bool), []
        for i in range(self.num_envs):
            self.at[i] += 1
            if self.at[i] == self.length[i]:
                over[i] = True
                episodes.append(Episode(i, 100.0 * i + self.episode[i], self.length[i]))
                self.at[i], self.length[i] = 0, next(self.script[i])
                self.episode[i] += 1
        obs = self.obs()
        rewards = np.ones(self.num_envs, np.float32)
        return Step(obs, obs, rewards, over, np.zeros_like(over), over, episodes)

    def close(self):
        self.closed = True


class Agent:
    """Always action 0; keeps what it was asked."""

    def __init__(self, **spec):
        self.spec, self.calls = {"env_id": "CartPole-v1", "num_envs": 1, "seed": 5, **spec}, []

    def env_spec(self):
        return self.spec

    def predict(self, obs, state=None, episode_start=None, deterministic=False):
        self.calls.append((obs, state, episode_start, deterministic))
        return np.zeros(len(obs), np.int64), state


class Leaning(Agent):
    """Balances the pole a while: pushes where it leans."""

    def predict(self, obs, state=None, episode_start=None, deterministic=False):
        return (obs[:, 2] > 0).astype(np.int64), state


@pytest.fixture
def made(monkeypatch):
    """Puts scripted environments in place of real ones; the list of those made."""
    made = []

    def make(**spec):
        made.append(Scripted(**spec))
        return made[-1]

    monkeypatch.setattr(evaluation, "make_vec", make)
    return made


def test_every_environment_counts_its_first_episodes(made, monkeypatch):
    monkeypatch.setattr(Scripted, "lengths", ((1,), (10,), (3, 50)))  # 20 short ones end before two long ones
    result = evaluate(Agent(), episodes=7, num_envs=3)
    assert result["eval/returns"] == [0, 1, 2, 100, 101, 200, 201]
    assert result["eval/length_mean"] == pytest.approx((1 + 1 + 1 + 10 + 10 + 3 + 50) / 7)
    assert result["eval/episodes"] == 7
    assert made[0].closed


def test_long_episodes_are_not_missed(made, monkeypatch):
    """Scores that grow with length: the first to finish would give a mean of about 1."""
    monkeypatch.setattr(Scripted, "lengths", ((1, 99), (99, 1), (1, 99), (99, 1)))
    assert evaluate(Agent(), episodes=8, num_envs=4)["eval/length_mean"] == 50


def test_summary_numbers(made, monkeypatch):
    monkeypatch.setattr(Scripted, "lengths", ((2,), (2,)))
    result = evaluate(Agent(), episodes=4, num_envs=2)
    returns = [0.0, 1.0, 100.0, 101.0]
    assert result["eval/return_mean"] == 50.5
    assert result["eval/return_std"] == pytest.approx(np.sqrt(2500.25))  # ddof 0
    assert result["eval/return_ci95"] == list(bootstrap_ci(returns))
    low, high = result["eval/return_ci95"]
    assert 0 <= low < 50.5 < high <= 101


def test_row_is_flat(made, monkeypatch):
    monkeypatch.setattr(Scripted, "lengths", ((2,), (2,)))
    result = evaluate(Agent(), episodes=4, num_envs=2)
    row = evaluation_row(result)
    assert row.keys() == {
        "eval/return_mean", "eval/return_std", "eval/return_ci95_low", "eval/return_ci95_high",
        "eval/episodes", "eval/length_mean",
    }  # fmt: skip
    assert all(isinstance(value, float | int) for value in row.values())
    assert [row["eval/return_ci95_low"], row["eval/return_ci95_high"]] == result["eval/return_ci95"]


def test_recurrent_state_goes_round(made, monkeypatch):
    monkeypatch.setattr(Scripted, "lengths", ((2, 3), (4,)))

    class Counting(Agent):
        def predict(self, obs, state=None, episode_start=None, deterministic=False):
            assert deterministic
            count = np.zeros(len(obs)) if state is None else np.where(episode_start, 0, state)
            assert (count == obs[:, 1]).all()  # the step in the episode
            self.calls.append(episode_start.tolist())
            return np.zeros(len(obs), np.int64), count + 1

    agent = Counting()
    evaluate(agent, episodes=4, num_envs=2)
    assert agent.calls[:5] == [[True, True], [False, False], [True, False], [False, False], [False, True]]


def test_environments_are_the_agents_but_for_evaluation(made, monkeypatch):
    monkeypatch.setattr(Scripted, "lengths", ((1,),) * 20)
    agent = Agent(training=True, render_mode="rgb_array", max_episode_steps=9, env_kwargs={"a": 1, "b": 2})
    before = dict(agent.spec)
    evaluate(agent, episodes=20, deterministic=False, env_kwargs={"b": 3})
    evaluate(agent, episodes=3, seed=11, max_episode_steps=4)
    first, second = made
    assert (first.num_envs, first.seed) == (8, 5)
    assert first.spec["training"] is False
    assert first.spec["render_mode"] is None
    assert first.spec["max_episode_steps"] == 9
    assert first.spec["env_kwargs"] == {"a": 1, "b": 3}
    assert (second.num_envs, second.seed, second.spec["max_episode_steps"]) == (3, 11, 4)
    assert agent.spec == before
    assert [call[3] for call in agent.calls] == [False] * 3 + [True]


def test_environments_are_closed_when_the_agent_fails(made, monkeypatch):
    monkeypatch.setattr(Scripted, "lengths", ((1,),))
    agent = Agent()
    monkeypatch.setattr(agent, "predict", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(agent, episodes=1)
    assert made[0].closed


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"episodes": -3}, {"num_envs": 0}])
def test_bad_counts_are_refused_before_anything_is_made(made, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1"):
        evaluate(Agent(), **bad)
    with pytest.raises(ValueError, match="must be at least 1"):
        random_policy_return(Agent().spec, **bad)
    assert not made


def test_cartpole_repeats_and_depends_on_the_seed():
    agent = Leaning()
    result = evaluate(agent, episodes=10)
    assert 20 < result["eval/return_mean"] < 80
    assert result["eval/return_mean"] == result["eval/length_mean"]
    assert evaluate(agent, episodes=10) == result
    assert evaluate(agent, episodes=10, seed=6)["eval/returns"] != result["eval/returns"]
    assert max(evaluate(agent, episodes=10, max_episode_steps=7)["eval/returns"]) == 7


def test_no_generator_moves_and_the_training_goes_on():
    venv, other = make_vec("CartPole-v1", num_envs=2, seed=3), make_vec("CartPole-v1", num_envs=2, seed=3)
    agent = Leaning(**venv.spec_dict())
    venv.reset(), other.reset()

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    evaluate(agent, episodes=4)
    random_policy_return(venv.spec_dict(), 4)
    assert states() == before
    for _ in range(60):  # several episodes
        assert (venv.step(np.array([0, 1])).obs == other.step(np.array([0, 1])).obs).all()


def test_random_policy_of_cartpole():
    score = random_policy_return(Agent().spec, episodes=200)
    assert 18 < score < 27  # about 22
    assert random_policy_return(Agent().spec, episodes=200) == score
    assert random_policy_return(Agent().spec, episodes=200, seed=6) != score


def test_random_policy_takes_continuous_actions():
    spec = {"env_id": "Pendulum-v1", "seed": 0, "max_episode_steps": 5}
    assert -90 < random_policy_return(spec, episodes=3) < 0


def test_random_policy_keeps_to_the_action_space(made, monkeypatch):
    monkeypatch.setattr(Scripted, "lengths", ((200,), (200,)))
    taken = []

    def step(self, actions, original=Scripted.step):
        taken.extend(np.asarray(actions).tolist())
        return original(self, actions)

    def shifted(**spec):
        env = Scripted(**spec)
        env.single_action_space = gym.spaces.Discrete(3, start=-1)
        return env

    monkeypatch.setattr(Scripted, "step", step)
    monkeypatch.setattr(evaluation, "make_vec", shifted)
    random_policy_return(Agent().spec, episodes=2)
    assert len(taken) == 400
    assert {action: taken.count(action) > 90 for action in taken} == {-1: True, 0: True, 1: True}


def test_validation_seed_is_another_and_fits():
    seeds = [validation_seed(seed) for seed in range(100)]
    assert len({*seeds, *range(100)}) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert validation_seed(7) == seeds[7]
