"""Stable-Baselines3 in the lab: our environments as its VecEnv, its algorithms as our agents."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from foveal.agents import AGENTS, DQN, load, save_checkpoint
from foveal.agents.sb3 import SB3_AGENTS, SB3A2C, SB3DQN, SB3PPO
from foveal.agents.sb3_settings import A2CConfig, DQNConfig, PPOConfig
from foveal.envs import make_vec
from foveal.envs.sb3 import SB3VecEnv
from foveal.runs.cli import main
from foveal.runs.evaluation import evaluate
from foveal.vision import MLP, Impala, NatureCNN, make_encoder, read_weights

CONTRIB = ("sb3/recurrent_ppo", "sb3/qrdqn", "sb3/trpo")


class Counting(gym.Env):
    """Observes its step, terminates after `length` steps, pays the step; Dict observations if wanted."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, length: int = 3, dictionary: bool = False, render_mode: str | None = None) -> None:
        self.length, self.dictionary, self.render_mode = length, dictionary, render_mode
        vector = spaces.Box(-10, 10, (2,), np.float32)
        image = spaces.Box(0, 255, (3, 8, 8), np.uint8)
        self.observation_space = spaces.Dict({"v": vector, "i": image}) if dictionary else vector
        self.action_space = spaces.Discrete(2)
        self.secret = 7

    def observe(self) -> Any:
        vector = np.full(2, self.steps, np.float32)
        return {"v": vector, "i": np.full((3, 8, 8), self.steps, np.uint8)} if self.dictionary else vector

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.observe(), float(self.steps), self.steps == self.length, False, {}

    def render(self) -> Any:
        return np.full((4, 6, 3), self.steps, np.uint8)

    def times(self, factor: int) -> int:
        return factor * self.secret


class Spaces(gym.Env):
    """Never ends, pays nothing; has the spaces given by name."""

    SPACES: Any = {  # noqa: RUF012
        "vector": spaces.Box(-1, 1, (3,), np.float32),
        "image": spaces.Box(0, 255, (1, 12, 14), np.uint8),
        "from one": spaces.Discrete(3, start=1),
        "three": spaces.Discrete(3),
        "pairs": spaces.MultiDiscrete([3, 2]),
        "matrix": spaces.MultiDiscrete(np.array([[3, 2], [2, 2]])),
        "bits": spaces.MultiBinary(3),
        "bit matrix": spaces.MultiBinary([2, 2]),
        "box": spaces.Box(-2, 2, (2,), np.float32),
        "endless box": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        "dict": spaces.Dict({"a": spaces.Discrete(4), "b": spaces.Box(-1, 1, (2,), np.float64)}),
    }

    def __init__(self, see: str = "vector", act: str = "three") -> None:
        self.observation_space, self.action_space = self.SPACES[see], self.SPACES[act]
        self.observation_space.seed(0)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("SB3Counting-v0", lambda **kwargs: Counting(**kwargs))
gym.register("SB3Spaces-v0", lambda **kwargs: Spaces(**kwargs), max_episode_steps=5)


def spaces_of(see: str, act: str, num_envs: int = 2) -> Any:
    return make_vec("SB3Spaces-v0", num_envs, env_kwargs={"see": see, "act": act})


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return np.array_equal(one, other)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# The VecEnv.


@pytest.mark.parametrize(
    ("env_id", "arguments"),
    [
        ("CartPole-v1", {"num_envs": 5, "max_episode_steps": 12}),  # native; terminations and truncations
        ("CartPole-v1", {"num_envs": 2, "backend": "sync", "autoreset_mode": "SameStep"}),
        ("Pendulum-v1", {"num_envs": 2, "max_episode_steps": 7}),
        ("SB3Counting-v0", {"num_envs": 3, "env_kwargs": {"dictionary": True}}),
        (
            "SB3Counting-v0",
            {"num_envs": 2, "env_kwargs": {"length": 4}, "max_episode_steps": 4},
        ),  # both at once
    ],
)
def test_steps_are_those_of_the_vector_env(env_id: str, arguments: Any) -> None:
    ours, theirs = make_vec(env_id, seed=3, **arguments), SB3VecEnv(make_vec(env_id, seed=3, **arguments))
    assert equal(ours.reset(), theirs.reset())
    rng, endings = np.random.default_rng(0), {"terminated": 0, "truncated": 0}
    for _ in range(60):
        space = ours.single_action_space
        if isinstance(space, spaces.Discrete):
            actions: Any = rng.integers(space.n, size=ours.num_envs)
        else:
            actions = rng.uniform(-2, 2, (ours.num_envs, 1)).astype(np.float32)
        step = ours.step(actions)
        obs, rewards, dones, infos = theirs.step(actions)
        assert equal(obs, step.obs)
        assert (rewards == step.rewards).all()
        assert rewards.dtype == np.float32
        assert (dones == (step.terminated | step.truncated)).all()
        for i, info in enumerate(infos):
            assert info["TimeLimit.truncated"] is bool(step.truncated[i] and not step.terminated[i])
            assert ("terminal_observation" in info) == dones[i]
            if dones[i]:
                final = step.next_obs
                final = {key: part[i] for key, part in final.items()} if isinstance(final, dict) else final[i]
                assert equal(info["terminal_observation"], final)
        records = {
            i: (info["episode"]["r"], info["episode"]["l"])
            for i, info in enumerate(infos)
            if "episode" in info
        }
        assert records == {e.env: (e.episode_return, e.length) for e in step.episodes}
        endings["terminated"] += int(step.terminated.sum())
        endings["truncated"] += int(step.truncated.sum())
    assert sum(endings.values()) > 3


def test_a_lost_life_ends_learning_but_not_the_game() -> None:
    pytest.importorskip("ale_py")
    arguments: Any = {"num_envs": 2, "seed": 1, "max_episode_steps": 120}
    ours = make_vec("ALE/Breakout-v5", **arguments)
    theirs: Any = SB3VecEnv(make_vec("ALE/Breakout-v5", **arguments))
    ours.reset(), theirs.reset()
    rng, lost, over, clipped = np.random.default_rng(1), 0, 0, 0
    for _ in range(300):
        actions = rng.integers(4, size=2)
        step = ours.step(actions)
        obs, rewards, dones, infos = theirs.step(actions)
        assert (rewards == step.rewards).all()
        assert (dones == (step.terminated | step.truncated)).all()
        for i in np.flatnonzero(dones):
            assert equal(infos[i]["terminal_observation"], step.next_obs[i])
            assert infos[i]["TimeLimit.truncated"] is bool(step.truncated[i])
            assert ("episode" in infos[i]) is bool(step.reset[i])
            if not step.reset[i]:
                lost += 1
                assert equal(infos[i]["terminal_observation"], obs[i])
            else:
                over += 1
        assert sum("episode" in info for info in infos) == len(step.episodes)
        clipped += int((rewards > 0).sum())
    assert lost > 2
    assert over > 1
    assert clipped > 0


def monitored(**kwargs: bool) -> Monitor[Any, Any]:
    return Monitor(Counting(**kwargs))  # type: ignore[arg-type]


def test_it_is_what_their_dummy_vec_env_is() -> None:
    """On an environment without chance the two say the same, but for the record that Monitor adds to both."""
    for dictionary in (False, True):
        kwargs = {"dictionary": dictionary}
        ours: Any = SB3VecEnv(make_vec("SB3Counting-v0", 2, env_kwargs=kwargs))
        theirs: Any = DummyVecEnv([functools.partial(monitored, **kwargs)] * 2)
        assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
        assert equal(ours.reset(), theirs.reset())
        for _ in range(8):
            one, other = ours.step(np.zeros(2, np.int64)), theirs.step(np.zeros(2, np.int64))
            assert equal(one[0], other[0])
            assert (one[1] == other[1]).all()
            assert (one[2] == other[2]).all()
            assert [one[i].dtype for i in (1, 2)] == [other[i].dtype for i in (1, 2)]
            for mine, its in zip(one[3], other[3]):
                assert mine.keys() == its.keys()
                assert mine["TimeLimit.truncated"] == its["TimeLimit.truncated"]
                if "episode" in its:
                    assert (mine["episode"]["r"], mine["episode"]["l"]) == (
                        its["episode"]["r"],
                        its["episode"]["l"],
                    )
                    assert equal(mine["terminal_observation"], its["terminal_observation"])


def test_seed_starts_over_as_if_made_with_it() -> None:
    fresh = make_vec("CartPole-v1", 2, seed=9).reset()
    env = SB3VecEnv(make_vec("CartPole-v1", 2, seed=4))
    first, second = env.reset(), env.reset()
    assert not equal(first, second), "every episode has a seed of its own"
    env.seed(9)
    assert equal(env.reset(), fresh)
    assert not equal(env.reset(), fresh), "a seed counts once"
    env.step(np.zeros(2, np.int64))
    env.seed(4)
    assert equal(env.reset(), first)
    assert env.env.spec_dict()["seed"] == 4


def test_single_environments_are_reached_where_there_are_some() -> None:
    env = SB3VecEnv(make_vec("SB3Counting-v0", 3, render_mode="rgb_array"))
    env.reset()
    assert env.render_mode == "rgb_array"
    picture: Any = env.render()
    assert picture.shape == (4, 6, 3)
    assert env.get_attr("secret") == [7, 7, 7]
    assert env.get_attr("secret", indices=[1]) == [7]
    env.set_attr("secret", 8, indices=1)
    assert env.get_attr("secret") == [7, 8, 7]
    assert env.env_method("times", 2) == [14, 16, 14]
    with pytest.raises(ValueError, match="indices: times is called in all environments or none, got 0"):
        env.env_method("times", 2, indices=0)
    assert env.has_attr("secret")
    assert not env.has_attr("nothing")
    native = SB3VecEnv(make_vec("CartPole-v1", 4))
    assert native.render_mode is None
    assert not native.has_attr("state")
    with pytest.raises(AttributeError, match="CartPole-v1 is stepped as one: nothing single has 'state'"):
        native.get_attr("state")
    native.close()


def test_their_wrappers_take_it() -> None:
    env: Any = VecFrameStack(VecNormalize(SB3VecEnv(make_vec("CartPole-v1", 2))), 3)
    assert env.reset().shape == (2, 12)
    for _ in range(40):
        obs, _, dones, infos = env.step(np.ones(2, np.int64))
        assert obs.shape == (2, 12)
        for i in np.flatnonzero(dones):
            assert infos[i]["terminal_observation"].shape == (12,)


def test_evaluate_policy_counts_true_scores() -> None:
    """Whatever a wrapper makes of the rewards: the scores are those that our evaluation has."""
    agent = SB3PPO("CartPole-v1", seed=2).learn(512, progress=False)
    ours = evaluate(agent, 6, num_envs=2)["eval/returns"]
    spec = {**agent.env_spec(), "num_envs": 2, "training": False}
    env = VecNormalize(SB3VecEnv(make_vec(**spec)), norm_obs=False)
    theirs: Any = evaluate_policy(agent, env, 6, return_episode_rewards=True)
    assert sorted(theirs[0]) == sorted(ours)
    assert theirs[0] == theirs[1]


# The agents.


def train_plainly(kind: Any, policy: str, env: Any, total: int, **arguments: Any) -> Any:
    return kind(policy, env, device="cpu", seed=5, **arguments).learn(total)


DQN_SMALL: Any = {"learning_starts": 50, "buffer_size": 300, "target_update_interval": 40, "batch_size": 16}


def plain_dqn(env: Any) -> Any:
    more: Any = {"train_freq": 2, "gradient_steps": -1, "exploration_fraction": 0.5, **DQN_SMALL}
    return train_plainly(stable_baselines3.DQN, "MlpPolicy", env, 400, learning_rate=1e-3, **more)


def plain_a2c(env: Any) -> Any:
    rmsprop: Any = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
    normalized = VecNormalize(env, gamma=0.9)
    more: Any = {"gamma": 0.9, "ent_coef": 0.01, "policy_kwargs": {"net_arch": [32], **rmsprop}}
    return train_plainly(stable_baselines3.A2C, "MlpPolicy", normalized, 400, **more)


def plain_ppo(env: Any) -> Any:
    more: Any = {"n_steps": 32, "n_epochs": 3, "use_sde": True, "sde_sample_freq": 4, "target_kl": 0.01}
    net: Any = {"log_std_init": -1.0, "ortho_init": False, "activation_fn": torch.nn.ReLU}
    return train_plainly(
        stable_baselines3.PPO,
        "MlpPolicy",
        VecNormalize(env),
        400,
        learning_rate=lambda remaining: 3e-3 * max(0.0, remaining),
        clip_range=lambda remaining: 0.1 + 0.1 * max(0.0, remaining),
        policy_kwargs=net,
        **more,
    )


def plain_dqn_on_images(env: Any) -> Any:
    net: Any = {"features_extractor_class": Impala, "normalize_images": False, "net_arch": []}
    return train_plainly(
        stable_baselines3.DQN, "CnnPolicy", env, 80, policy_kwargs=net, **{**DQN_SMALL, "learning_starts": 40}
    )


def plain_ppo_on_images(env: Any) -> Any:
    net: Any = {"features_extractor_class": Impala, "normalize_images": False, "net_arch": []}
    return train_plainly(
        stable_baselines3.PPO, "CnnPolicy", env, 64, policy_kwargs=net, n_steps=16, batch_size=16, n_epochs=2
    )


SAME = {
    "dqn": (
        plain_dqn,
        SB3DQN,
        DQNConfig(learning_rate=1e-3, train_freq=2, gradient_steps=-1, exploration_fraction=0.5, **DQN_SMALL),
        ("CartPole-v1", 3, "auto", 400),
    ),
    "a2c": (
        plain_a2c,
        SB3A2C,
        A2CConfig(gamma=0.9, ent_coef=0.01, net_arch=(32,), rms_prop_tf=True, normalize=True),
        ("CartPole-v1", 4, "auto", 400),
    ),
    "ppo": (
        plain_ppo,
        SB3PPO,
        PPOConfig(
            n_steps=32,
            n_epochs=3,
            use_sde=True,
            sde_sample_freq=4,
            target_kl=0.01,
            learning_rate=3e-3,
            learning_rate_final=0.0,
            clip_range=0.2,
            clip_range_final=0.1,
            log_std_init=-1.0,
            ortho_init=False,
            activation="relu",
            normalize=True,
        ),
        ("Pendulum-v1", 2, "auto", 400),
    ),
    "dqn on images": (
        plain_dqn_on_images,
        SB3DQN,
        DQNConfig(**{**DQN_SMALL, "learning_starts": 40}),
        ("MinAtar/Breakout-v1", 2, "impala", 80),
    ),
    "ppo on images": (
        plain_ppo_on_images,
        SB3PPO,
        PPOConfig(n_steps=16, batch_size=16, n_epochs=2),
        ("MinAtar/Breakout-v1", 2, "impala", 64),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_weights_are_those_of_their_learn(case: str) -> None:
    """Bit for bit, whatever is done with the agent and with the global generators between rows."""
    plain, kind, config, (env_id, num_envs, encoder, total) = SAME[case]
    if env_id.startswith("MinAtar"):
        pytest.importorskip("minatar")
    model = plain(SB3VecEnv(make_vec(env_id, num_envs, seed=5, max_episode_steps=50)))
    env = make_vec(env_id, num_envs, seed=5, max_episode_steps=50)
    agent: Any = kind(env, config, encoder=encoder, seed=5, device="cpu")
    rows: list[dict[str, Any]] = []
    for row in agent.training(total, log_every=20):
        rows.append(row)
        if len(rows) == 2:
            evaluate(agent, 2, max_episode_steps=20)
            agent.predict(make_vec(env_id).reset())
            torch.rand(3), np.random.rand(3)  # noqa: NPY002
    assert_same_weights(weights_of(agent.model), weights_of(model))
    assert (agent.env_step, rows[-1]["env_step"]) == (model.num_timesteps, model.num_timesteps)
    assert agent.grad_step > 0


def test_global_generators_are_left_alone() -> None:
    def states() -> tuple[Any, Any, Any]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002

    before = states()
    agent: Any = SB3PPO("CartPole-v1", PPOConfig(num_envs=2, n_steps=16, batch_size=16), seed=1)
    assert states() == before
    for _ in agent.training(64, log_every=32):
        assert states() == before
        agent.predict(agent.env.reset())
        assert states() == before
    twin: Any = SB3PPO("CartPole-v1", agent.config, seed=1)
    obs = np.zeros((200, 4), np.float32)
    actions = twin.predict(obs)[0]
    assert 0 < actions.mean() < 1
    assert not equal(actions, twin.predict(obs)[0]), "drawn anew"


def test_actions_at_random_are_as_many_as_epsilon_says() -> None:
    agent = SB3DQN("CartPole-v1", DQNConfig(exploration_final_eps=0.5), seed=1)
    obs = np.zeros((4000, 4), np.float32)
    greedy = agent.predict(obs, deterministic=True)[0]
    assert (greedy == greedy[0]).all()
    assert (agent.predict(obs)[0] != greedy).mean() == pytest.approx(0.25, abs=0.03)
    assert agent.predict(obs[0])[0].shape == ()


def test_gradient_steps_are_counted_one_by_one() -> None:
    config = PPOConfig(num_envs=2, n_steps=32, batch_size=16, n_epochs=3)
    (row,) = SB3PPO("CartPole-v1", config).training(64)
    assert row["grad_step"] == 3 * 64 // 16
    off_policy = DQNConfig(learning_starts=20, train_freq=4, gradient_steps=2, buffer_size=100)
    *_, row = SB3DQN("CartPole-v1", off_policy).training(60, log_every=20)
    assert row["grad_step"] == 2 * (60 - 20) // 4


def test_rows_bear_our_names_and_true_scores() -> None:
    rows = list(SB3PPO("CartPole-v1", PPOConfig(num_envs=4, n_steps=32)).training(640, log_every=200))
    assert [row["env_step"] for row in rows] == [256, 512, 640]
    episodes = sum(row["train/episodes"] for row in rows)
    steps = sum(row["train/episodes"] * row["train/length_mean"] for row in rows)
    assert episodes > 10
    assert 640 - 4 * 100 < steps <= 640
    for row in rows:
        assert row["train/return_mean"] == row["train/length_mean"]
        losses = {
            "train/policy_loss",
            "train/value_loss",
            "train/entropy",
            "train/learning_rate",
            "train/clip",
        }
        assert losses <= row.keys()
        assert 0 < row["train/entropy"] <= np.log(2) + 1e-6
        assert all(np.isfinite(value) for value in row.values())
    config = DQNConfig(learning_starts=20, buffer_size=100)
    row = list(SB3DQN("CartPole-v1", config).training(100, log_every=100))[-1]
    assert {"train/q_loss", "train/epsilon"} <= row.keys()
    assert row["train/epsilon"] == 0.05


def test_learning_twice_goes_on() -> None:
    agent = SB3A2C("CartPole-v1", A2CConfig(num_envs=2), seed=1)
    agent.learn(100, progress=False).learn(100, progress=False)
    assert agent.env_step == 200
    assert agent.model.num_timesteps == 200
    assert agent.grad_step == 20


def test_a_schedule_ends_at_its_end() -> None:
    """The last rollout goes beyond the end, where the zoo's schedules turn negative."""
    config = PPOConfig(n_steps=64, learning_rate_final=0.0, clip_range_final=0.0)
    *_, row = SB3PPO("CartPole-v1", config).training(100, log_every=1)
    assert row["env_step"] == 128
    assert row["train/learning_rate"] == 0.0
    assert row["train/clip"] == 0.0


def test_a_loss_that_is_nan_stops_the_training() -> None:
    agent = SB3A2C("CartPole-v1", A2CConfig(num_envs=2, vf_coef=float("nan")))
    with pytest.raises((FloatingPointError, ValueError, RuntimeError)):
        agent.learn(200, progress=False)
    agent = SB3A2C("CartPole-v1", A2CConfig(num_envs=2))
    agent.model.policy.value_net.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"_loss is nan at grad_step 1 \(env_step 10\)"):
        agent.learn(200, progress=False)


@pytest.mark.parametrize(
    ("kind", "env", "encoder"),
    [
        (SB3DQN, ("CartPole-v1", {}), "auto"),
        (SB3PPO, ("Pendulum-v1", {"normalize": True, "use_sde": True}), "auto"),
        (SB3A2C, ("CartPole-v1", {"normalize": True}), "mlp-tanh"),
        (SB3DQN, (("dict", "three"), {"normalize": True}), "auto"),
        (SB3PPO, (("dict", "pairs"), {"normalize": True}), "auto"),
        (SB3PPO, (("image", "bits"), {}), "auto"),
        (SB3A2C, (("pairs", "box"), {}), "mlp"),
        (SB3A2C, (("three", "three"), {}), "mlp"),
        (SB3PPO, (("bits", "three"), {}), "auto"),
    ],
)
def test_saved_and_loaded_it_acts_the_same(kind: Any, env: Any, encoder: str, tmp_path: Path) -> None:
    of, changes = env
    small: Any = {"learning_starts": 10, "buffer_size": 200} if kind is SB3DQN else {"n_steps": 8}
    if kind is SB3PPO:
        small["batch_size"] = 8
    made = make_vec(of, 2) if isinstance(of, str) else spaces_of(*of)
    agent = kind(made, kind.Config(**small, **changes), encoder=encoder, seed=1).learn(64, progress=False)
    path = agent.save(tmp_path / "weights.safetensors")
    loaded: Any = load(path)
    assert type(loaded) is kind
    assert (loaded.env_step, loaded.grad_step) == (agent.env_step, agent.grad_step)
    assert_same_weights(weights_of(loaded.model), weights_of(agent.model))
    made.reset()
    obs = made.step(np.stack([made.single_action_space.sample()] * 2)).obs
    for deterministic in (True, False):
        one, other = (
            kind.load(path).predict(obs, deterministic=deterministic)[0],
            load(path).predict(obs, deterministic=deterministic)[0],
        )
        assert equal(one, other)
        assert one.dtype == made.single_action_space.dtype
        assert one.shape == (2, *(made.single_action_space.shape or ()))
    first = {key: part[0] for key, part in obs.items()} if isinstance(obs, dict) else obs[0]
    actions = agent.predict(obs, deterministic=True)[0]
    assert equal(actions, loaded.predict(obs, deterministic=True)[0])
    np.testing.assert_allclose(agent.predict(first, deterministic=True)[0], actions[0], rtol=1e-5, atol=1e-6)
    if agent.normalizer is not None:
        stored = {name: tensor for name, tensor in read_weights(path)[0].items() if "normalize." in name}
        assert all(tensor.dtype == torch.float64 for tensor in stored.values())
        assert stored["normalize.returns.count"] > 64
        agent.normalizer.ret_rms.mean += 1
        assert loaded.normalizer.ret_rms.mean != agent.normalizer.ret_rms.mean
        assert not agent.normalizer.training or agent.normalizer.norm_obs
    loaded.learn(32, progress=False)
    assert loaded.env_step >= agent.env_step + 32


def test_predict_takes_raw_observations_and_leaves_the_statistics() -> None:
    agent = SB3PPO("Pendulum-v1", PPOConfig(n_steps=32, batch_size=32, normalize=True)).learn(
        64, progress=False
    )
    raw = np.array([[0.5, -0.8, 3.0]], np.float32)
    before = agent.normalizer.obs_rms.mean.copy()
    tensor = torch.as_tensor(agent.normalizer.normalize_obs(raw))
    wanted = agent.model.policy.get_distribution(tensor).mode().detach().numpy()
    action = agent.predict(raw, deterministic=True)[0]
    np.testing.assert_allclose(action, np.clip(wanted, -2, 2), rtol=1e-5)
    assert equal(before, agent.normalizer.obs_rms.mean)
    assert not equal(agent.normalizer.normalize_obs(raw), raw)


def test_images_may_come_channels_last() -> None:
    agent = SB3PPO(spaces_of("image", "three"))
    image = np.random.default_rng(0).integers(256, size=(2, 12, 14, 1)).astype(np.uint8)
    last = agent.predict(image, deterministic=True)[0]
    assert equal(last, agent.predict(np.moveaxis(image, -1, 1), deterministic=True)[0])
    with pytest.raises(ValueError, match=r"obs has shape \(3,\); one observation is \(1, 12, 14\)"):
        agent.predict(np.zeros(3))


def test_each_tensor_is_stored_once_and_the_encoder_where_every_file_has_it(tmp_path: Path) -> None:
    agent = SB3PPO(spaces_of("image", "three"), encoder="impala", seed=3)
    assert isinstance(agent.network.encoder, Impala)
    tensors, description = read_weights(agent.save(tmp_path / "weights.safetensors"))
    assert description["encoder"]["name"] == "impala"
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(
        parameter.numel() for parameter in agent.model.policy.parameters()
    )
    encoder = {name for name in tensors if name.startswith("encoder.")}
    assert encoder == {f"encoder.{name}" for name in agent.network.encoder.state_dict()}
    # So that any agent here may begin with it.
    dqn = DQN(spaces_of("image", "three"), encoder=str(tmp_path / "weights.safetensors"))
    for name, tensor in dqn.network.encoder.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, tensors[f"encoder.{name}"])
    # A target network is kept, but is nothing that learns.
    value_based = SB3DQN(spaces_of("vector", "three"), DQNConfig(buffer_size=10))
    assert {name.split(".")[0] for name in value_based.network.state_dict()} == {"q_net", "q_net_target"}
    assert sum(p.numel() for p in value_based.network.parameters()) == 64 * 4 + 64 * 65 + 3 * 65


def test_a_trained_encoder_is_not_initialised_again(tmp_path: Path) -> None:
    source = DQN(spaces_of("image", "three"), encoder="impala", seed=9)
    path = source.save(tmp_path / "dqn.safetensors")
    wanted = source.network.encoder.state_dict()  # type: ignore[union-attr]
    object_of_mine = make_encoder("impala", source.observation_space)
    own = {name: tensor.clone() for name, tensor in object_of_mine.state_dict().items()}
    for kind in (SB3PPO, SB3A2C, SB3DQN):
        config = DQNConfig(buffer_size=10) if kind is SB3DQN else None
        agent: Any = kind(spaces_of("image", "three"), config, encoder=str(path), seed=1)
        assert_same_weights(agent.network.encoder.state_dict(), wanted)
        assert agent.describe()["encoder"]["name"] == "impala"
        agent = kind(spaces_of("image", "three"), config, encoder=object_of_mine, seed=1)
        assert agent.network.encoder is object_of_mine
        assert_same_weights(agent.network.encoder.state_dict(), own)
        if kind is SB3DQN:
            assert_same_weights(agent.model.q_net_target.features_extractor.state_dict(), own)
            assert agent.model.q_net_target.features_extractor is not object_of_mine
    fresh: Any = SB3PPO(spaces_of("image", "three"), encoder="impala", seed=1).network.encoder
    weight = fresh.state_dict()["head.1.weight"]
    gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
    np.testing.assert_allclose(gram, 2 * np.eye(len(gram)), atol=1e-4)  # theirs is orthogonal, gain sqrt(2)


def test_the_default_network_is_theirs_for_vectors_and_ours_for_images() -> None:
    vectors = SB3PPO("CartPole-v1")
    assert vectors.describe()["encoder"]["name"] == "sb3"
    assert type(vectors.network.encoder).__name__ == "FlattenExtractor"
    shapes = {name: tuple(t.shape) for name, t in vectors.network.state_dict().items()}
    assert shapes["mlp_extractor.policy_net.0.weight"] == (64, 4)
    ours = SB3PPO("CartPole-v1", encoder="mlp")
    assert isinstance(ours.network.encoder, MLP)
    assert {name.split(".")[0] for name in ours.network.state_dict()} == {
        "encoder",
        "action_net",
        "value_net",
    }
    pytest.importorskip("ale_py")
    env = make_vec("ALE/Pong-v5", 1)
    atari = SB3PPO(env, PPOConfig())
    assert isinstance(atari.network.encoder, NatureCNN)
    assert atari.model.env.observation_space == env.single_observation_space
    # uint8 and what Stable-Baselines3 makes of it, floats from 0 to 255, are one image.
    pixels = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    features = atari.model.policy.extract_features(pixels)
    assert torch.equal(features, atari.network.encoder(pixels))
    theirs = SB3DQN(env, DQNConfig(buffer_size=10), encoder="sb3")
    assert type(theirs.network.encoder).__name__ == "NatureCNN"


def test_settings_have_their_names_and_defaults() -> None:
    contrib = importlib.util.find_spec("sb3_contrib") is not None
    assert set(SB3_AGENTS) == {"sb3/dqn", "sb3/a2c", "sb3/ppo", *(CONTRIB if contrib else ())}
    for name, agent in SB3_AGENTS.items():
        package, _, algorithm = agent.algorithm.partition(":")  # type: ignore[attr-defined]
        theirs = getattr(importlib.import_module(package), algorithm)
        parameters = inspect.signature(theirs).parameters
        for field in dataclasses.fields(agent.Config):
            if field.name in parameters:
                assert field.default == parameters[field.name].default, (name, field.name)
            else:
                ours = {
                    "num_envs",
                    "learning_rate_final",
                    "clip_range_final",
                    "normalize",
                    "activation",
                    "rms_prop_tf",
                }
                ours |= {
                    "net_arch",
                    "log_std_init",
                    "ortho_init",
                    "lstm_hidden_size",
                    "enable_critic_lstm",
                    "n_quantiles",
                }
                assert field.name in ours
        with_defaults = agent.recipe("Unknown-v0")
        assert with_defaults == agent.Config()
        for env_id in (
            "CartPole-v1",
            "Acrobot-v1",
            "Pendulum-v1",
            "LunarLander-v3",
            "ALE/Pong-v5",
            "Hopper-v5",
        ):
            agent.recipe(env_id, gamma=0.5)


def test_ours_normalise_where_the_zoos_do() -> None:
    """Rewards too: without that A2C takes twenty times as long to its first success on Acrobot."""
    for agent, env_ids in {
        "a2c": ("CartPole-v1", "Acrobot-v1"),
        "ppo": (
            "CartPole-v1",
            "Acrobot-v1",
            "LunarLander-v3",
            "Pendulum-v1",
            "MountainCar-v0",
            "HalfCheetah-v5",
        ),
    }.items():
        for env_id in env_ids:
            ours, zoos = AGENTS[agent].recipe(env_id), AGENTS[f"sb3/{agent}"].recipe(env_id)
            assert ours.normalize_observations == ours.normalize_rewards == zoos.normalize, (agent, env_id)


def test_recipes_are_the_zoos() -> None:
    ppo, a2c, dqn = SB3PPO.recipe, SB3A2C.recipe, SB3DQN.recipe
    assert (ppo("CartPole-v1").num_envs, ppo("CartPole-v1").learning_rate_final) == (8, 0.0)
    assert (ppo("LunarLander-v3").gamma, ppo("LunarLander-v3").batch_size) == (0.999, 64)
    assert (ppo("HalfCheetah-v5").net_arch, ppo("HalfCheetah-v5").normalize) == ((256, 256), True)
    assert (ppo("ALE/Pong-v5").clip_range, ppo("ALE/Pong-v5").clip_range_final) == (0.1, 0.0)
    assert (a2c("ALE/Pong-v5").rms_prop_tf, a2c("Acrobot-v1").num_envs) == (True, 16)
    assert (dqn("CartPole-v1").train_freq, dqn("CartPole-v1").gradient_steps) == (256, 128)
    assert ppo("MountainCar-v0").normalize
    assert not ppo("MountainCarContinuous-v0").normalize, "has a recipe of its own there, and none here"


@pytest.mark.parametrize("name", CONTRIB)
def test_contrib_algorithms_where_installed(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sb3_contrib")
    kind: Any = AGENTS[name]
    small: dict[str, Any] = {
        "sb3/qrdqn": {"learning_starts": 20, "buffer_size": 100},
        "sb3/recurrent_ppo": {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "lstm_hidden_size": 8},
        "sb3/trpo": {"n_steps": 16, "batch_size": 16},
    }[name]
    agent = kind("CartPole-v1", kind.Config(num_envs=2, **small), encoder="mlp", seed=1).learn(
        80, progress=False
    )
    assert agent.grad_step > 0
    loaded: Any = load(agent.save(tmp_path / "weights.safetensors"))
    assert_same_weights(weights_of(loaded.model), weights_of(agent.model))
    obs = agent.env.reset()
    state: Any = None
    other: Any = None
    for start in (True, False):
        starts = np.full(2, start)
        actions, state = agent.predict(obs, state, starts, deterministic=True)
        again, other = loaded.predict(obs, other, starts, deterministic=True)
        assert equal(actions, again)
    if name == "sb3/recurrent_ppo":
        assert state[0].shape == (1, 2, 8)
        assert equal(state[0], other[0])
        assert np.abs(state[0]).sum() > 0


@pytest.mark.parametrize(
    ("kind", "env", "changes", "message"),
    [
        (SB3DQN, "Pendulum-v1", {}, r"sb3/dqn takes Discrete actions; Pendulum-v1 has Box"),
        (SB3DQN, ("vector", "bits"), {}, r"sb3/dqn takes Discrete actions; SB3Spaces-v0 has MultiBinary"),
        (SB3PPO, ("vector", "from one"), {}, r"sb3/ppo takes actions that .* has Discrete\(3, start=1\)"),
        (SB3DQN, ("vector", "from one"), {}, r"sb3/dqn takes actions that .* has Discrete\(3, start=1\)"),
        (SB3A2C, ("vector", "matrix"), {}, r"sb3/a2c takes actions that .* has MultiDiscrete"),
        (SB3A2C, ("vector", "bit matrix"), {}, r"sb3/a2c takes actions that .* has MultiBinary"),
        (SB3PPO, ("vector", "endless box"), {}, r"sb3/ppo takes actions that .* bounded boxes; .* has Box"),
        (SB3PPO, ("from one", "three"), {}, r"sb3/ppo takes observations that .* has Discrete\(3, start=1\)"),
        (SB3PPO, ("matrix", "three"), {}, r"sb3/ppo takes observations that .* has MultiDiscrete"),
        (SB3PPO, ("image", "three"), {"normalize": True}, r"normalize takes .*vectors of floats; .* has Box"),
        (
            SB3PPO,
            ("pairs", "three"),
            {"normalize": True},
            r"normalize takes .*vectors of floats; .* has Multi",
        ),
        (SB3A2C, "CartPole-v1", {"use_sde": True}, r"use_sde takes Box actions; CartPole-v1 has Discrete"),
        (SB3DQN, ("dict", "three"), {"n_steps": 3}, r"n_steps must be 1 for Dict observations, got 3"),
    ],
)
def test_what_they_do_not_take_is_named(kind: Any, env: Any, changes: Any, message: str) -> None:
    made = make_vec(env) if isinstance(env, str) else spaces_of(*env)
    with pytest.raises(ValueError, match=message) as caught:
        kind(made, kind.Config(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (PPOConfig, {"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        (PPOConfig, {"batch_size": 1}, "batch_size must be 2 or more, got 1"),
        (PPOConfig, {"n_steps": 1}, "n_steps must be 2 or more with num_envs 1"),
        (PPOConfig, {"clip_range": 0.0}, "clip_range must be greater than 0, got 0.0"),
        (PPOConfig, {"gamma": 1.1}, "gamma must be between 0 and 1, got 1.1"),
        (PPOConfig, {"net_arch": (64, 0)}, "net_arch must be widths of 1 or more, got"),
        (A2CConfig, {"learning_rate": float("nan")}, "learning_rate must be greater than 0, got nan"),
        (A2CConfig, {"learning_rate_final": -1.0}, "learning_rate_final must be 0 or more, got -1.0"),
        (DQNConfig, {"gradient_steps": -2}, "gradient_steps must be 1 or more, or -1, got -2"),
        (
            DQNConfig,
            {"exploration_fraction": 0.0},
            "exploration_fraction must be greater than 0 and at most 1",
        ),
        (DQNConfig, {"train_freq": 0}, "train_freq must be 1 or more, got 0"),
    ],
)
def test_wrong_settings_are_named(config: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_small_images_and_huge_replays_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="encoder 'sb3' cannot take SB3Spaces-v0's observations: "):
        SB3PPO(spaces_of("image", "three"), encoder="sb3")
    with pytest.raises(ValueError, match="unknown encoder 'natur'; nearest: nature"):
        SB3DQN("CartPole-v1", encoder="natur")
    agent = SB3DQN("CartPole-v1", DQNConfig(buffer_size=10**15))  # as long as it only acts it needs none
    agent.predict(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="buffer_size 1,000,000,000,000,000 does not fit into memory: "):
        agent.start()


def test_their_own_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.zip"
    stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).save(path)
    with pytest.raises(ValueError, match="theirs.zip is not a whole safetensors file"):
        SB3PPO.load(path)
    ours = SB3A2C("CartPole-v1").save(tmp_path / "a2c.safetensors")
    with pytest.raises(ValueError, match="holds a 'sb3/a2c' agent, not 'sb3/ppo'"):
        SB3PPO.load(ours)
    plain = SB3PPO("CartPole-v1", PPOConfig(net_arch=(8,))).save(tmp_path / "ppo.safetensors")
    with pytest.raises(ValueError, match="is of another architecture"):
        SB3PPO("CartPole-v1").load_weights(read_weights(plain)[0], plain)


def test_a_checkpoint_is_weights_alone(tmp_path: Path) -> None:
    agent = SB3A2C("CartPole-v1").learn(40, progress=False)
    folder = save_checkpoint(agent, tmp_path)
    assert [file.name for file in folder.iterdir()] == ["weights.safetensors"]


def test_nothing_of_theirs_is_imported_before_it_is_used(tmp_path: Path) -> None:
    code = (
        "import sys, foveal.agents, foveal.runs.cli; from foveal.agents import AGENTS; "
        "AGENTS['sb3/ppo'].recipe('CartPole-v1'); "
        "print([m for m in ('stable_baselines3', 'sb3_contrib', 'torch._dynamo') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# The command line.

QUICK = [
    *("--total-steps", "300", "--log-every", "100", "--eval-every", "100", "--eval-episodes", "2"),
    *("--final-episodes", "3", "--checkpoint-every", "100", "--track", "off", "--no-progress", "--no-video"),
]


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_empty_folder")
def test_train_evaluate_and_why_not_resume(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--num-envs", "2", "--n-steps", "16", "--batch-size", "16", "--normalize"]
    assert main(["train", "sb3/ppo", *QUICK, *small, "--learning-rate-final", "0"]) == 0
    out = capsys.readouterr().out
    (run,) = (path.parent for path in Path("results").rglob("config.json"))
    assert f"run folder: {run}\n" in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_step"] for row in rows] == [128, 224, 320]
    assert all({"train/policy_loss", "eval/return_mean", "grad_step"} <= row.keys() for row in rows)
    config = json.loads((run / "config.json").read_text())
    assert (config["agent"], config["encoder"], config["config"]["n_steps"]) == ("sb3/ppo", "sb3", 16)
    files = {path.name for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert files == {"weights.safetensors"}

    assert main(["evaluate", str(run), "--episodes", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["agent"], result["eval/episodes"]) == ("sb3/ppo", 3)

    before = sorted(path.name for path in run.rglob("*"))
    assert main(["resume", str(run), "--total-steps", "600"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    again = f"foveal train sb3/ppo --env-id CartPole-v1 --init-from {run}"
    assert "sb3/ppo runs cannot be resumed: " in err
    assert err.rstrip().endswith(again)
    assert before == sorted(path.name for path in run.rglob("*"))

    # Which starts from the weights, and the statistics, of the run.
    frozen = ["--eval-every", "0", "--learning-rate", "1e-12", "--learning-rate-final", "0", *small]
    assert main([*again.split()[1:], *QUICK, *frozen, "--name", "again"]) == 0
    (second,) = (path.parent for path in Path("results").rglob("again-*/config.json"))
    old, new = load(run), load(second)
    for one, other in zip(old.network.parameters(), new.network.parameters()):
        np.testing.assert_allclose(one.detach(), other.detach(), atol=1e-6)
    count = "normalize.obs.count"
    assert new.network.state_dict()[count] > old.network.state_dict()[count]


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sb3/dqn", "--env-id", "Pendulum-v1"], "sb3/dqn takes Discrete actions; Pendulum-v1 has Box"),
        (["sb3/pp0"], "unknown agent or model 'sb3/pp0'; nearest: sb3/ppo"),
        (["sb3/ppo", "--encoder", "natur"], "unknown encoder 'natur'; nearest: nature"),
        (["sb3/ppo", "--encoder", "nature"], "NatureCNN takes images"),
        (["sb3/dqn", "--buffer-size", "1000000000000000"], "does not fit into memory"),
        (["sb3/a2c", "--use-sde"], "use_sde takes Box actions; CartPole-v1 has Discrete(2)"),
        (["sb3/ppo", "--n-steps", "0"], "n_steps must be 1 or more, got 0"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code: object
    try:
        code = main(["train", *arguments])
    except SystemExit as error:  # the parser's own
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert list(Path().iterdir()) == []


@pytest.mark.usefixtures("in_empty_folder")
def test_list_and_help_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "agents"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for name in SB3_AGENTS:
        (text,) = (line[1] for line in lines if line[0] == name)
        assert "Stable-Baselines3" in text or "sb3-contrib" in text
    with pytest.raises(SystemExit):
        main(["train", "sb3/dqn", "--help"])
    out = capsys.readouterr().out
    for flag in ("--target-update-interval", "--exploration-final-eps", "--net-arch", "--train-freq"):
        assert flag in out
