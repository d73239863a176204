"""What the policy gradient agents share: rollouts, values at truncations, memory, checkpoints, bad input."""

import copy
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import foveal
from gymnasium import spaces
from toys import Scripted, Signs
from vector_runs import seed_of

from foveal.agents import A2C, DQN, PPO, PQN, REINFORCE, load, load_checkpoint, newest_first, save_checkpoint
from foveal.agents.actor_critic import A2CConfig
from foveal.agents.agent import map_tensors, to_tensors
from foveal.agents.dqn import DQNConfig
from foveal.agents.ppo import PPOConfig
from foveal.agents.pqn import PQNConfig
from foveal.agents.reinforce import REINFORCEConfig
from foveal.agents.returns import discounted_returns
from foveal.envs import VectorEnv, make_vec
from foveal.runs.cli import main
from foveal.runs.evaluation import evaluate
from foveal.vision import MLP
from foveal.vision.weights import read_weights

MEMORIES: list[dict[str, Any]] = [
    {},
    {"recurrent": "gru", "recurrent_size": 5},
    {"recurrent": "lstm", "recurrent_size": 4, "share_encoder": True},
    {"recurrent": "lstm", "recurrent_size": 4, "normalize_observations": True},
]
# Short settings for each agent; `gamma` 0, because the toy's next observation does not depend on the action.
QUICK: dict[str, tuple[Any, Any]] = {
    "a2c": (A2C, A2CConfig(num_steps=8, gamma=0.0, learning_rate=0.01, optimizer="adam")),
    "ppo": (PPO, PPOConfig(num_steps=16, minibatch_size=64, gamma=0.0, learning_rate=3e-3)),
    "reinforce": (REINFORCE, REINFORCEConfig(gamma=0.0, learning_rate=5e-3)),
}


def toy(num_envs: int = 3, seed: int = 5, **kwargs: Any) -> VectorEnv:
    return make_vec("toys/Signs-v0", num_envs=num_envs, seed=seed, env_kwargs=kwargs)


def a2c(env: VectorEnv, **settings: Any) -> Any:
    agent = A2C(env, A2CConfig(**settings), seed=1, device="cpu")
    with torch.no_grad():  # a policy that depends on what it sees and remembers, and values that differ
        agent.weights.add_(0.3 * torch.randn(agent.weights.shape, generator=torch.Generator().manual_seed(0)))
    return agent


def scripted(script: list[str]) -> VectorEnv:
    spec = {"env_id": "scripted", "num_envs": len(script[0]), "seed": 0, "training": True}
    return VectorEnv(Scripted(script), spec, frame_stack=1, clip_rewards=False)


def one(tree: Any, t: int, i: int) -> Any:
    """Step t of environment i, as a batch of one."""
    return map_tensors(lambda x: x[t, i : i + 1], tree)


# Collection.


@pytest.mark.parametrize("settings", MEMORIES)
@pytest.mark.parametrize("images", [False, True])
def test_rollouts_are_those_of_single_environments(settings, images):
    """Two rollouts in a row, against environments played one by one with the same weights and noise."""
    kwargs = {"lengths": [1, 3, 5], "truncate": 0.7, "images": images}
    env = toy(**kwargs)
    agent = a2c(env, **settings)
    noise_rng = agent.rng.clone_state()
    agent.start()
    rollouts = [agent.collect(9), agent.collect(6)]
    assert agent.env_step == 3 * 15
    noise = torch.cat([agent.distribution.noise((steps, 3), noise_rng) for steps in (9, 6)])
    for i in range(3):
        episode, alone = 0, Signs(**kwargs)
        obs = alone.reset(seed=seed_of(5, True, i, 0))[0]
        state, start = torch.zeros(1, agent.network.state_size), True
        finals = [[], []]  # type: ignore[var-annotated]
        for t in range(15):
            part, s = (0, t) if t < 9 else (1, t - 9)
            rollout = rollouts[part]
            x = to_tensors(obs, env.single_observation_space, agent.device, add_batch=True)
            torch.testing.assert_close(one(rollout.obs, s, i), x, rtol=0, atol=0)
            assert rollout.starts[s, i] == start
            if s == 0:
                torch.testing.assert_close(rollout.state[i : i + 1] * (not start), state * (not start))
            params, state = agent.network.act(x, state, torch.tensor([start]))
            action = agent.distribution.sample(params, noise[t, i : i + 1])
            assert rollout.actions[s, i] == action
            obs, reward, terminated, truncated, _ = alone.step(int(action) + 3)
            assert rollout.rewards[s, i] == reward
            assert rollout.terminated[s, i] == terminated
            assert rollout.truncated[s, i] == truncated
            start = terminated or truncated
            if truncated:
                final = to_tensors(obs, env.single_observation_space, agent.device, add_batch=True)
                finals[part].append((s, final))
            if start:
                episode, alone = episode + 1, Signs(**kwargs)
                obs = alone.reset(seed=seed_of(5, True, i, episode))[0]
            if s == len(rollout.actions) - 1:
                x = to_tensors(obs, env.single_observation_space, agent.device, add_batch=True)
                torch.testing.assert_close(one(rollout.obs, s + 1, i), x, rtol=0, atol=0)
                assert rollout.starts[s + 1, i] == start
        for rollout, expected in zip(rollouts, finals):
            if rollout.final is None:
                assert not expected
                continue
            steps, envs, final_obs = rollout.final
            mine = torch.nonzero(envs == i).flatten().tolist()
            assert [int(steps[k]) for k in mine] == [s for s, _ in expected]
            for k, (_, final) in zip(mine, expected):
                torch.testing.assert_close(one(map_tensors(lambda x: x[None], final_obs), 0, k), final)
    assert all(rollout.final is not None and rollout.terminated.any() for rollout in rollouts)
    dtypes = [tensor.dtype for tensor in rollouts[0][2:7]]
    assert dtypes == [torch.bool, torch.int64, torch.float32, torch.bool, torch.bool]


SCRIPT = ["...", "LC.", ".T.", "B.L", "..C", "C.L", ".L.", "..T", "LC.", "..."]


def test_every_kind_of_ending():
    """A lost life terminates but is no start; a truncation keeps its final observation."""
    agent = a2c(scripted(SCRIPT))
    agent.start()
    rollout = agent.collect(10)
    kinds = np.array([list(row) for row in SCRIPT])
    np.testing.assert_array_equal(rollout.terminated, np.isin(kinds, ["L", "T", "B"]))
    np.testing.assert_array_equal(rollout.truncated, np.isin(kinds, ["C", "B"]))
    over = np.isin(kinds, ["T", "B", "C"])
    np.testing.assert_array_equal(rollout.starts, np.concatenate([np.ones((1, 3), bool), over]))
    for i in range(3):
        episode = step = 0
        for t in range(10):
            assert rollout.obs[t, i].tolist() == [i, episode, step]
            step += 1
            reward = 100 * i + 10 * episode + step + rollout.actions[t, i] / 2
            assert rollout.rewards[t, i] == reward
            if rollout.truncated[t, i]:
                (k,) = torch.nonzero((rollout.final[0] == t) & (rollout.final[1] == i)).flatten()
                assert rollout.final[2][k].tolist() == [i, episode, step]
            if over[t, i]:
                episode, step = episode + 1, 0
        assert rollout.obs[10, i].tolist() == [i, episode, step]
    assert len(rollout.final[0]) == np.isin(kinds, ["C", "B"]).sum()
    # Episodes, on the other hand, are whole games.
    assert [e.length for e in agent.episodes] == [2, 1, 4, 5, 2, 3, 6]


@pytest.mark.parametrize("settings", MEMORIES)
def test_values_of_true_successors(settings):
    """At truncations V(final observation) from the state it was met in, whatever began next; at a lost life
    the return stops and the memory does not; after the last row the value of what would be acted on."""
    agent = a2c(scripted(SCRIPT), **settings)
    agent.start()
    if agent.network.normalizer is not None:
        agent.network.normalizer.update(50 * torch.randn(5, 4, 3) + 50)
    rollout = agent.collect(10)
    with torch.no_grad():
        _, values, states = agent.network(rollout.obs, rollout.state, rollout.starts)
        following = agent.next_values(rollout, values, states)

        def value(obs, state):
            return agent.network(obs[None, None], state, torch.zeros(1, 1, dtype=torch.bool))[1].item()

        for i in range(3):
            state = torch.zeros(1, agent.network.state_size)
            for t in range(10):
                if rollout.starts[t, i]:
                    state = torch.zeros_like(state)
                obs = rollout.obs[t, i]
                assert values[t, i].item() == pytest.approx(value(obs, state), abs=1e-5)
                _, state = agent.network.act(obs[None], state, torch.tensor([False]))
                torch.testing.assert_close(states[t, i : i + 1], state)
                if rollout.terminated[t, i]:
                    continue  # nothing may use it
                if rollout.truncated[t, i]:
                    true = obs.clone()
                    true[2] += 1
                    expected = value(true, state)
                    fresh = value(rollout.obs[t + 1, i], torch.zeros_like(state))
                    assert abs(expected - fresh) > 1e-3, "the test could not tell them apart"
                else:
                    expected = value(rollout.obs[t + 1, i], state)
                assert following[t, i].item() == pytest.approx(expected, abs=1e-5)
    # Returns, by a loop over each environment backwards.
    returns = discounted_returns(rollout.rewards, following, rollout.terminated, rollout.truncated, 0.9)
    for i in range(3):
        after = following[-1, i].item()
        for t in reversed(range(10)):
            if rollout.terminated[t, i]:
                after = 0.0
            elif rollout.truncated[t, i]:
                after = following[t, i].item()
            after = rollout.rewards[t, i].item() + 0.9 * after
            assert returns[t, i].item() == pytest.approx(after, rel=1e-5)


# Memory.


@pytest.mark.parametrize("settings", MEMORIES)
def test_predict_acts_as_training_did(settings):
    """With the state handed on and episode starts told, a rollout's actions and states come out again."""
    env = toy(lengths=[2, 5])
    agent = a2c(env, **settings)
    agent.learn(60, progress=False)
    rollout = agent.collect(20)
    params, _, states = agent.network(rollout.obs, rollout.state, rollout.starts)
    modes = agent.distribution.to_env(agent.distribution.mode(params))
    state: Any = rollout.state.numpy()
    for t in range(20):
        starts = rollout.starts[t].numpy()
        actions, state = agent.predict(rollout.obs[t].numpy(), state, starts, deterministic=True)
        np.testing.assert_array_equal(actions, modes[t])
        np.testing.assert_allclose(state, states[t].detach(), atol=1e-5)
    if agent.network.state_size == 0:
        assert agent.predict(env.reset(), state="kept")[1] == "kept"
        assert agent.predict(env.reset())[1] is None
        return
    # without a state, and at a start whatever the state, memory is empty
    obs = rollout.obs[0].numpy()
    fresh = agent.predict(obs, deterministic=True)[1]
    again = agent.predict(obs, state, np.ones(3, bool), deterministic=True)[1]
    np.testing.assert_array_equal(fresh, again)
    action, single = agent.predict(obs[0], fresh[:1], np.array([False]), deterministic=True)
    assert action.shape == ()
    assert single.shape == fresh[:1].shape


def test_stable_baselines3_evaluates_a_recurrent_agent():
    import gymnasium as gym
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import DummyVecEnv

    agent = a2c(make_vec("CartPole-v1", num_envs=2), recurrent="gru", recurrent_size=5)
    env = DummyVecEnv([lambda: gym.make("CartPole-v1") for _ in range(2)])
    returns, lengths = evaluate_policy(agent, env, n_eval_episodes=3, return_episode_rewards=True, warn=False)
    assert returns == lengths


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a2c", {"num_steps": 16}),
        ("ppo", {"num_steps": 16, "minibatch_size": 64}),
        ("reinforce", {}),
    ],
)
@pytest.mark.parametrize("memory", ["gru", "lstm", None])
def test_memory_solves_what_needs_it(name, settings, memory):
    """A cue at the first step is asked for three steps later: certain with memory, a coin toss without."""
    if memory == "lstm" and name != "a2c":
        pytest.skip("the same code")
    agent_class, config = QUICK[name]
    env = make_vec("toys/Recall-v0", num_envs=8, seed=1)
    config = replace(config, **settings, gamma=0.9, recurrent=memory, recurrent_size=8)
    agent = agent_class(env, config, seed=1, device="cpu").learn(4096 if memory else 512, progress=False)
    result = evaluate(agent, 60, seed=1)
    if memory:
        assert result["eval/return_mean"] == 1.0
    else:
        assert 0.2 < result["eval/return_mean"] < 0.8


# Learning in all kinds of spaces.


def score(agent: Any) -> float:
    """Mean reward of a step, acting greedily."""
    result = evaluate(agent, 40, seed=1)
    return result["eval/return_mean"] / result["eval/length_mean"]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize(
    ("actions", "settings", "wanted"),
    [
        ("discrete", {}, 0.9),
        ("discrete", {"share_encoder": True, "images": True}, 0.9),
        ("discrete", {"share_encoder": False, "images": True}, 0.9),
        ("multi-discrete", {"share_encoder": True}, 0.8),
        ("multi-binary", {"normalize_observations": True, "normalize_rewards": True}, 0.8),
        ("box", {}, -0.4),
        ("box", {"squash": True}, -0.8),
    ],
)
def test_every_kind_of_space_is_learned_in(name, actions, settings, wanted):
    agent_class, config = QUICK[name]
    settings = dict(settings)
    env = toy(8, 1, actions=actions, images=settings.pop("images", False))
    encoder = "minatar+mlp-tanh" if isinstance(env.single_observation_space, spaces.Dict) else "auto"
    config = replace(config, log_std_init=-0.5, **settings)
    agent = agent_class(env, config, encoder=encoder, seed=1, device="cpu")
    shared = agent.network.value_encoder is None
    assert shared == settings.get("share_encoder", False)
    before = score(agent)
    agent.learn(2048 if name == "reinforce" else 1024, progress=False)
    assert score(agent) > max(wanted, before + 0.1)


@pytest.mark.parametrize("name", QUICK)
def test_policy_and_value_begin_with_different_features(name):
    """Copies of one encoder, which learn alike, made A2C lose CartPole. What is given trained is kept."""
    agent_class, config = QUICK[name]
    network = agent_class(toy(8), config, seed=1, device="cpu").network
    pairs = list(zip(network.encoder.parameters(), network.value_encoder.parameters()))
    weights = [(ours, its) for ours, its in pairs if ours.ndim == 2]
    assert weights
    for ours, its in weights:
        assert (ours @ its.T).abs().max() < 0.9 * (ours @ ours.T).abs().max()  # rows of others than ours
        torch.testing.assert_close(ours.norm(), its.norm(), rtol=1e-4, atol=0)  # of one initialisation
    given = MLP(toy(8).single_observation_space, features_dim=8, hidden=())
    network = agent_class(toy(8), config, encoder=given, seed=1, device="cpu").network
    for ours, its in zip(network.encoder.parameters(), network.value_encoder.parameters()):
        assert torch.equal(ours, its)
        assert ours is not its


@pytest.mark.parametrize("name", QUICK)
def test_same_seed_same_weights_and_global_state_untouched(name):
    agent_class, config = QUICK[name]
    config = replace(config, recurrent="gru", recurrent_size=4)
    torch.manual_seed(0)
    draws, weights = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        agent = agent_class(toy(8, seed), config, seed=seed, device="cpu").learn(128, progress=False)
        draws.append(torch.rand(1).item())
        weights.append(agent.weights.detach().clone())
    torch.manual_seed(0)
    assert draws == [torch.rand(1).item()] * 3
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", QUICK)
def test_rows_count_every_step_and_episode(name):
    agent_class, config = QUICK[name]
    agent = agent_class(toy(8), config, seed=5, device="cpu")
    rows = list(agent.training(1000, log_every=250))
    steps = [row["env_step"] for row in rows]
    assert steps[-1] == agent.env_step >= 1000
    assert [before // 250 < now // 250 for before, now in zip([0, *steps], steps)] == [True] * len(steps)
    assert rows[-1]["grad_step"] == agent.grad_step > 0
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    if name != "reinforce":  # which leaves episodes that others waited for
        finished = sum(row["train/episodes"] * row.get("train/length_mean", 0) for row in rows)
        assert finished + agent.env.state()[0]["lengths"].sum() == pytest.approx(agent.env_step)


# Checkpoints.


def everything(agent: Any) -> dict[str, Any]:
    tensors, meta = agent.state()
    tensors = {**tensors, **agent.network.state_dict()}
    return {name: tensor.clone() for name, tensor in tensors.items()} | {"meta": json.dumps(meta)}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))}


ALL_ON: dict[str, Any] = {
    "num_envs": 4,
    "recurrent": "gru",
    "recurrent_size": 4,
    "normalize_observations": True,
    "normalize_rewards": True,
    "learning_rate_final": 0.0,
    "entropy_coefficient": 0.01,
}


@pytest.mark.parametrize(
    ("agent_class", "config"),
    [
        (A2C, A2CConfig(**ALL_ON, num_steps=5)),
        (A2C, A2CConfig(**ALL_ON, num_steps=5, optimizer="adam")),
        (PPO, PPOConfig(**ALL_ON, num_steps=5, minibatch_size=10, clip_final=0.0, target_kl=0.01)),
        (PPO, PPOConfig(**{**ALL_ON, "recurrent": None}, num_steps=5, minibatch_size=10)),
        (REINFORCE, REINFORCEConfig(**ALL_ON, baseline="average")),
        (REINFORCE, REINFORCEConfig(**ALL_ON, baseline="value")),
    ],
)
def test_checkpoint_and_go_on_is_bit_for_bit(agent_class, config, tmp_path):
    """Stopped twice in the middle of episodes, in fresh agents each time."""

    def make():
        return agent_class(toy(4, 3), config, seed=3, device="cpu")

    obs = np.zeros(2, np.float32)
    whole, rows, agent, resumed = make(), [], make(), []
    for row in whole.training(240, log_every=40):
        rows.append(timeless(row) | {"drawn": [int(whole.predict(obs)[0]) for _ in range(20)]})
    save_checkpoint(agent, tmp_path)
    for stop in (0, 80, 160, 1000):
        agent = load(newest_first(tmp_path)[0])
        assert load_checkpoint(newest_first(tmp_path)[0], agent), "not replayed exactly"
        for row in agent.training(240, log_every=40):
            resumed.append(timeless(row) | {"drawn": [int(agent.predict(obs)[0]) for _ in range(20)]})
            if row["env_step"] >= stop:
                break
        save_checkpoint(agent, tmp_path)
    assert resumed == rows
    first, second = everything(whole), everything(agent)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value == second[name] if name == "meta" else torch.equal(value, second[name]), name


FLAGS = [
    *(
        "train",
        "ppo",
        "--total-steps",
        "640",
        "--log-every",
        "32",
        "--eval-every",
        "320",
        "--eval-episodes",
        "2",
    ),
    *("--eval-episodes", "2", "--final-episodes", "2", "--checkpoint-every", "64"),
    *("--num-envs", "2", "--num-steps", "16"),
    *("--minibatch-size", "16", "--epochs", "2", "--recurrent", "gru", "--recurrent-size", "4"),
    *("--normalize-observations", "--normalize-rewards", "--no-video", "--no-progress", "--track", "off"),
]


def test_kill_9_by_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert main(FLAGS) == 0
    killed = foveal(*FLAGS, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None:
        files = list(tmp_path.glob("results/*/*/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= 7:
            break
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    (run,), (whole,) = tmp_path.glob("results/*/*"), tmp_path.glob("whole/results/*/*")
    assert newest_first(run / "checkpoints")[0].name < "step-000000000640", "killed too late to tell anything"
    assert main(["resume", str(run), "--no-progress"]) == 0
    rows, expected = (
        [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, whole)
    )
    assert [row["env_step"] for row in rows] == list(range(64, 672, 32))  # the first rollout only primes
    assert rows == expected
    first, second = (
        read_weights(newest_first(folder / "checkpoints")[0] / "weights.safetensors")[0]
        for folder in (run, whole)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "resume_mismatch" not in json.loads((run / "summary.json").read_text())


# Bad input.


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize(
    ("actions", "settings", "message"),
    [
        ("text", {}, "its actions are Text\\(1, 3, .*\\); foveal takes arrays"),
        ("int-box", {}, "{} takes Discrete, .* Box actions \\(of floats\\), got Box\\(0, 5, .*int32\\)"),
        ("discrete", {"squash": True}, "squash is for Box actions, got Discrete\\(2, start=3\\)"),
        ("unbounded", {"squash": True}, "squash needs actions with bounds, got Box\\(-inf, inf"),
    ],
)
def test_action_spaces_that_are_not_taken(name, actions, settings, message):
    agent_class, config = QUICK[name]
    with pytest.raises(ValueError, match=message.format(name)) as refused:
        agent_class(toy(8, actions=actions), replace(config, **settings), device="cpu")
    assert "\n" not in str(refused.value)
    assert "toys/Signs-v0" in str(refused.value)


@pytest.mark.parametrize("config_class", [A2CConfig, PPOConfig, REINFORCEConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recurrent": "rnn"}, "recurrent must be lstm, gru or None, got 'rnn'"),
        ({"recurrent_size": 0}, "recurrent_size must be 1 or more, got 0"),
        ({"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        ({"gamma": 1.01}, "gamma must be between 0 and 1, got 1.01"),
        ({"gamma": float("nan")}, "gamma must be between 0 and 1, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0, got nan"),
        ({"learning_rate_final": -1e-4}, "learning_rate_final must be 0 or more, got -0.0001"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be greater than 0, got 0.0"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient must be 0 or more, got -0.1"),
        ({"value_coefficient": float("nan")}, "value_coefficient must be 0 or more, got nan"),
    ],
)
def test_settings_that_are_not_taken(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


def test_observations_with_nothing_to_normalize_are_refused():
    with pytest.raises(ValueError, match="normalize_observations is for vectors of floats, got Discrete"):
        A2C("foveal/GridWorld-v0", A2CConfig(normalize_observations=True))


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(("what", "at"), [("reward", 20), ("observation", 20), ("observation", 0)])
def test_what_is_not_finite_stops_the_training(name, what, at, value):
    agent_class, config = QUICK[name]
    kwargs = {"what": what, "value": value, "at": at}
    env = make_vec("toys/Broken-v0", num_envs=8, seed=1, env_kwargs=kwargs)
    agent = agent_class(env, config, device="cpu")
    before = agent.weights.detach().clone()
    message = f"toys/Broken-v0 gave the {what} {value} in environment 0"
    with pytest.raises(FloatingPointError, match=message) as stopped:
        agent.learn(10_000, progress=False)
    assert "\n" not in str(stopped.value)
    assert torch.isfinite(agent.weights).all()
    assert name == "reinforce" or at == 0 or not torch.equal(before, agent.weights), "it did learn until then"


def stopped_by(capsys: Any, *arguments: str) -> tuple[str, Path]:
    flags = ["--track", "off", "--no-progress", "--no-video", "--eval-every", "0"]
    assert main(["train", *arguments, *flags]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (run,) = Path("results").glob("*/*")
    assert json.loads((run / "summary.json").read_text())["state"] == "failed"
    checkpoint = newest_first(run / "checkpoints")[0]
    assert f"saved up to {checkpoint.name}; to go on: foveal resume {run}" in err
    for file in checkpoint.iterdir():
        assert all(torch.isfinite(t).all() for t in read_weights(file)[0].values()), file
    return err.strip().splitlines()[-1], checkpoint


def test_command_line_names_the_reward_and_keeps_the_last_good_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--env-id", "toys/Broken-v0", "--num-envs", "2", "--num-steps", "16", "--minibatch-size", "32"]
    flags += ["--log-every", "32", "--checkpoint-every", "32"]
    line, checkpoint = stopped_by(capsys, "ppo", *flags)
    assert line == "foveal: toys/Broken-v0 gave the reward nan in environment 0"
    assert checkpoint.name == "step-000000000096"  # the fourth rollout has step 50 in it


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ppo", ["1e37", "--minibatch-size", "32"], "loss is (nan|inf) at grad_step \\d+ \\(env_step 32\\)"),
        ("a2c", ["1e30", "--optimizer", "adam"], "loss is (nan|inf) at grad_step 2 \\(env_step 64\\)"),
        (
            "a2c",
            ["1e39", "--optimizer", "adam"],
            "sum of weights is (nan|-?inf) at grad_step 1 ",
        ),
    ],
)
def test_command_line_names_the_loss_and_the_step(name, flags, message, capsys, tmp_path, monkeypatch):
    """A step size this large makes weights whose losses, or which themselves, are not finite: not saved."""
    monkeypatch.chdir(tmp_path)
    flags = ["--learning-rate", *flags, "--num-envs", "2", "--num-steps", "16"]
    line, _ = stopped_by(capsys, name, *flags, "--log-every", "32", "--checkpoint-every", "32")
    assert re.search(message, line), line


@pytest.mark.parametrize("name", [*QUICK, "dqn", "pqn"])
def test_gradient_that_is_nan_is_not_yielded(name, monkeypatch):
    """The loss may still look fine when the weights are lost."""
    of_values = {
        "dqn": (DQN, DQNConfig(num_envs=2, learning_starts=4, batch_size=4)),
        "pqn": (PQN, PQNConfig(num_envs=2, num_steps=4, minibatches=1, epochs=1)),
    }
    agent_class, config = (QUICK | of_values)[name]
    agent = agent_class(toy(8), config, device="cpu")
    module = {"a2c": "actor_critic"}.get(name, name)

    def poison(gradient, max_norm):
        if agent.grad_step >= 2:
            gradient[3] = float("nan")
        return gradient

    monkeypatch.setattr(f"foveal.agents.{module}.clip_norm", poison)

    def train():
        for _ in agent.training(10_000, log_every=8):
            assert torch.isfinite(agent.weights).all()

    with pytest.raises(FloatingPointError, match="is nan at grad_step"):
        train()


@pytest.mark.parametrize("kind", [DQN, PQN, A2C, PPO, REINFORCE])
def test_a_copied_agent_learns_as_the_original_does(kind: Any) -> None:
    """Whose network's weights are views of one tensor; PyTorch's copies are views of nothing."""
    small: dict[Any, Any] = {DQN: {"learning_starts": 64, "train_every": 16, "target_every": 64}}
    agent = kind("CartPole-v1", kind.Config(num_envs=2, **small.get(kind, {})), seed=1, device="cpu")
    agent.learn(300, progress=False)
    copied, before = copy.deepcopy(agent), agent.weights.detach().clone()
    for one_of_them in (copied, agent):
        one_of_them.learn(900, progress=False)
    assert not torch.equal(copied.weights, before)
    for name, tensor in agent.network.state_dict().items():
        assert torch.equal(copied.network.state_dict()[name], tensor), name
