"""Running statistics of observations and rewards: exact, frozen where they must be, saved."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import toys  # noqa: F401 - registers environments
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from foveal.agents import A2C, PPO, REINFORCE, load
from foveal.agents.actor_critic import A2CConfig
from foveal.agents.normalization import CLIP, Moments, ObservationNormalizer, RewardScaler
from foveal.envs import make_vec


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_moments_are_those_of_all_rows_together(sizes, middle, spread):
    rng = np.random.default_rng(0)
    batches = [middle + spread * rng.normal(size=(size, 2, 3)) for size in sizes]
    moments = Moments((2, 3))
    for batch in batches:
        moments.update(torch.tensor(batch))
    rows = np.concatenate(batches)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-9, atol=1e-9 * spread)
    np.testing.assert_allclose(moments.var, rows.var(0), rtol=1e-6, atol=1e-9 * spread**2)
    assert moments.count == len(rows)
    assert moments.mean.dtype == moments.var.dtype == torch.float64


def test_moments_keep_their_precision_far_from_zero():
    """float32 sums of squares would lose all of the variance here."""
    moments, rows = Moments(()), 1e6 + np.random.default_rng(0).normal(size=(100, 1000))
    for batch in rows:
        moments.update(torch.tensor(batch))
    assert moments.var.item() == pytest.approx(rows.var(), rel=1e-6)


def test_observations_get_mean_0_and_variance_1_and_are_cut():
    space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    normalizer = ObservationNormalizer(space)
    obs = torch.randn(50, 4, 3) * torch.tensor([1.0, 20.0, 0.01]) + torch.tensor([0.0, -7.0, 100.0])
    torch.testing.assert_close(normalizer(obs[0]), obs[0].clamp(-CLIP, CLIP), msg="before the first update")
    normalizer.update(obs)
    out = normalizer(obs.flatten(0, 1))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(3), rtol=0, atol=1e-3)
    far = normalizer(torch.tensor([[1e6, -1e6, 100.0]]))
    assert far[0, :2].tolist() == [CLIP, -CLIP]


def test_images_and_integers_of_a_dict_are_left_alone():
    space = spaces.Dict(
        {
            "vector": spaces.Box(-1, 1, (2,), np.float32),
            "image": spaces.Box(0, 255, (1, 4, 4), np.uint8),
            "place": spaces.Discrete(5),
            "counts": spaces.Box(0, 9, (2,), np.int64),
            "speed": spaces.Box(-np.inf, np.inf, (), np.float64),
        }
    )
    normalizer = ObservationNormalizer(space)
    assert sorted(normalizer.keys) == ["speed", "vector"]
    obs = {
        "vector": torch.rand(6, 2, 2),
        "image": torch.randint(256, (6, 2, 1, 4, 4), dtype=torch.uint8),
        "place": torch.randint(5, (6, 2)),
        "counts": torch.randint(10, (6, 2, 2)),
        "speed": 1000 * torch.rand(6, 2, dtype=torch.float64),
    }
    normalizer.update(obs)
    flat = {key: part.flatten(0, 1) for key, part in obs.items()}
    before = {key: part.clone() for key, part in flat.items()}
    out = normalizer(flat)
    assert list(out) == list(flat)
    for key in ("image", "place", "counts"):
        assert torch.equal(out[key], before[key])
        assert out[key].dtype == before[key].dtype
    for key in ("vector", "speed"):
        torch.testing.assert_close(out[key].mean(0), torch.zeros_like(out[key][0]), rtol=0, atol=1e-5)
        assert torch.equal(flat[key], before[key]), "what was given is not changed"


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(0, 255, (1, 4, 4), np.uint8)])
def test_nothing_to_normalize_is_refused(space):
    with pytest.raises(ValueError, match="normalize_observations is for vectors of floats, got"):
        ObservationNormalizer(space)


def naive_scaled(rewards, done, gamma):
    """All running returns so far, and rewards over their standard deviation; T steps in one call."""
    running, returns = np.zeros(rewards.shape[1]), []
    for t in range(len(rewards)):
        for i in range(rewards.shape[1]):
            running[i] = gamma * running[i] + rewards[t, i]
            returns.append(running[i])
            if done[t, i]:
                running[i] = 0
    return np.clip(rewards / np.sqrt(np.var(returns) + 1e-8), -CLIP, CLIP)


def test_rewards_are_over_the_deviation_of_the_running_return():
    rng = np.random.default_rng(0)
    rewards, done = rng.normal(3, 2, (40, 3)).astype(np.float32), rng.random((40, 3)) < 0.15
    scaler = RewardScaler(3, 0.9)
    parts = [(0, 10), (10, 11), (11, 40)]
    for first, last in parts:
        scaled = scaler(torch.tensor(rewards[first:last]), torch.tensor(done[first:last]))
        assert scaled.dtype == torch.float32
        expected = naive_scaled(rewards[:last], done[:last], 0.9)[first:]
        np.testing.assert_allclose(scaled, expected, rtol=1e-5)


def test_rewards_are_scaled_as_gymnasium_does():
    """Within an episode Gymnasium's wrapper gives nearly the same: its statistics begin with a made-up row of
    weight 1e-4. (At an ending it drops the return one step too early.)"""
    ours = RewardScaler(1, 0.95)
    plain, theirs = gym.make("Pendulum-v1"), gym.wrappers.NormalizeReward(gym.make("Pendulum-v1"), 0.95)
    for env in (plain, theirs):
        env.reset(seed=0)
    for step in range(150):
        action = np.array([np.sin(step)], np.float32)
        reward, scaled = plain.step(action)[1], theirs.step(action)[1]
        mine = ours(torch.tensor([[reward]], dtype=torch.float32), torch.zeros(1, 1, dtype=torch.bool))
        if step > 5:
            assert mine.item() == pytest.approx(float(scaled), rel=1e-3)


def test_reward_scaler_goes_on_from_its_state():
    rng = torch.Generator().manual_seed(0)
    rewards, done = torch.randn(20, 2, generator=rng), torch.rand(20, 2, generator=rng) < 0.2
    whole, first = RewardScaler(2, 0.9), RewardScaler(2, 0.9)
    expected = [whole(rewards[:10], done[:10]), whole(rewards[10:], done[10:])]
    first(rewards[:10], done[:10])
    second = RewardScaler(2, 0.9)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    assert torch.equal(second(rewards[10:], done[10:]), expected[1])


def statistics(agent: Any) -> list[torch.Tensor]:
    return [tensor.clone() for name, tensor in agent.network.state_dict().items() if "moments" in name]


def test_statistics_stand_still_in_predict_and_travel_with_the_weights(tmp_path):
    config = A2CConfig(num_envs=2, num_steps=5, normalize_observations=True, normalize_rewards=True)
    agent = A2C("toys/Signs-v0", config, seed=1, device="cpu").learn(100, progress=False)
    before = statistics(agent)
    assert len(before) == 3
    assert before[-1] == 100, "every observation acted on counts once"
    agent.predict(np.full((50, 2), 1e3, np.float32))
    from foveal.runs.evaluation import evaluate

    evaluate(agent, 3)
    again: Any = load(agent.save(tmp_path / "weights.safetensors"))
    for other in (agent, again):
        assert all(torch.equal(one, two) for one, two in zip(before, statistics(other), strict=True))
    obs = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    np.testing.assert_array_equal(
        agent.predict(obs, deterministic=True)[0], again.predict(obs, deterministic=True)[0]
    )


@pytest.mark.parametrize(
    ("agent_class", "settings"),
    [(A2C, {"num_steps": 4}), (PPO, {"num_steps": 4, "minibatch_size": 12}), (REINFORCE, {})],
)
def test_statistics_are_those_of_what_was_acted_on(agent_class, settings):
    """The first rollout primes them, and each rollout is learned from before it counts."""
    config = agent_class.Config(num_envs=3, normalize_observations=True, **settings)
    agent: Any = agent_class(make_vec("toys/Signs-v0", num_envs=3, seed=5), config, seed=1, device="cpu")
    seen: list[Any] = []
    collect, update = agent.collect, agent.update
    at_update = []

    def collecting(steps):
        rollout = collect(steps)
        seen.append(rollout.obs[:-1].flatten(0, 1).double())
        return rollout

    def updating(*arguments):
        at_update.append(statistics(agent))
        return update(*arguments)

    agent.collect, agent.update = collecting, updating
    agent.learn(100, progress=False)
    at_update.append(statistics(agent))
    assert len(seen) == len(at_update) > 3
    for i, (mean, var, count) in enumerate(at_update):
        rows = torch.cat(seen[: i + 1])
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(var, rows.var(0, correction=0))
        assert count == len(rows)


def test_a_training_shorter_than_its_priming_still_learns():
    config = A2CConfig(num_envs=2, num_steps=50, normalize_observations=True)
    agent = A2C("toys/Signs-v0", config, seed=1, device="cpu")
    rows = list(agent.training(60))
    assert agent.grad_step == 1
    assert [row["env_step"] for row in rows] == [200]
