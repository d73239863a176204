"""PQN: its targets, its update, its contract, and that it learns."""

import copy
import functools
import json
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from foveal.agents import PQN, load, load_checkpoint, newest_first, returns, save_checkpoint
from foveal.agents.dqn import QNetwork
from foveal.agents.pqn import RECIPES, PQNConfig, epsilon_at, q_loss, recipe
from foveal.envs import make_vec
from foveal.vision import ENCODERS, MLP, make_encoder
from foveal.vision.optimization import adam_state, radam_step

q_lambda: Any = returns.q_lambda
SMALL = PQNConfig(num_envs=4, num_steps=16, epochs=2, minibatches=4, learning_rate=1e-3)


def weights(agent):
    return {name: tensor.clone() for name, tensor in agent.network.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_radam_is_torchs_radam_and_stacks_over_seeds():
    """Through the five steps that are not rectified, and those that are."""
    plain = torch.nn.Parameter(torch.randn(2, 7))
    optimizer = torch.optim.RAdam([plain], lr=0.03, eps=1e-4)
    weights = plain.detach().clone()
    state = adam_state(weights)
    for step in range(1, 31):
        plain.grad = torch.randn(2, 7)
        radam_step(weights, plain.grad, state, 0.03, eps=1e-4)
        optimizer.step()
        torch.testing.assert_close(weights, plain.detach())
        assert state.steps == step
    torch.testing.assert_close(state.square, optimizer.state[plain]["exp_avg_sq"])


def test_q_loss_is_half_the_squared_error_of_the_chosen_action():
    def network(obs):
        return torch.tensor([[0.0, 3.0], [0.5, -1.0]])

    loss = q_loss(network, None, torch.tensor([1, 0]), torch.tensor([0.0, 0.1]))
    assert loss.item() == pytest.approx((3.0**2 / 2 + 0.4**2 / 2) / 2)


def test_epsilon_is_linear_in_env_steps():
    config = PQNConfig(
        exploration_initial=1.0,
        exploration_final=0.1,
        exploration_fraction=0.5,
    )
    steps = np.array([[0, 500], [1000, 1999]])
    np.testing.assert_allclose(epsilon_at(steps, 2000, config), [[1.0, 0.55], [0.1, 0.1]])


def test_learning_rate_falls_linearly_where_asked():
    config = PQNConfig(
        num_envs=2, num_steps=10, minibatches=1, epochs=1, learning_rate=0.1, learning_rate_final=0.02
    )
    np.testing.assert_allclose(
        rates_of(PQN("CartPole-v1", config, device="cpu"), 80), [0.1, 0.08, 0.06, 0.04]
    )
    constant = replace(config, learning_rate_final=None)
    assert rates_of(PQN("CartPole-v1", constant, device="cpu"), 40) == [0.1, 0.1]


def rates_of(agent, total_steps):
    """The step sizes that a training hands to its updates."""
    rates, update = [], agent.update

    def watched(*args):
        rates.append(args[-1])
        return update(*args)

    agent.update = watched
    for _ in agent.training(total_steps):
        pass
    return rates


class Walk(gym.Env):
    """Ends by chance, terminated or truncated or both; observations are never the same again."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(3, start=7)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.standard_normal(3, np.float32), {}

    def step(self, action):
        assert action in (7, 8, 9)
        obs = self.np_random.standard_normal(3, np.float32)
        terminated, truncated = self.np_random.random(2) < 0.15
        return obs, float(obs[0] + action), bool(terminated), bool(truncated), {}


gym.register("test/Walk-v0", lambda **kwargs: Walk(**kwargs))


def test_targets_of_a_rollout_are_those_of_a_naive_loop():
    """Every value from a call of its own, each environment and step by itself, under the acting weights."""
    agent = PQN(make_vec("test/Walk-v0", num_envs=3, seed=5), SMALL, seed=5, device="cpu")
    agent.start()
    observed = [agent.obs]
    actions, steps, step_once = [], [], agent.env.step

    def step(action):
        steps.append(step_once(action))
        actions.append(action - 7)
        observed.append(steps[-1].obs)
        return steps[-1]

    agent.env.step = step  # type: ignore[method-assign]
    rollout = agent.collect(np.full(40, 0.5))
    np.testing.assert_array_equal(rollout.obs, np.stack(observed[:-1]))
    np.testing.assert_array_equal(rollout.actions, np.stack(actions))
    assert agent.obs is observed[-1]
    assert len(agent.episodes) == sum(step.reset.sum() for step in steps)
    terminated, truncated = (np.stack([getattr(s, k) for s in steps]) for k in ("terminated", "truncated"))
    assert (terminated & truncated).any()
    assert (truncated & ~terminated).sum() > 3

    def value(obs):
        with torch.no_grad():
            return agent.network(torch.as_tensor(obs[None])).max().item()

    gamma, decay = 0.9, 0.7
    expected = np.zeros((40, 3))
    for n in range(3):
        following = 0.0
        for t in reversed(range(40)):
            reward, final = float(steps[t].rewards[n]), value(steps[t].next_obs[n])
            if terminated[t, n]:
                target = reward
            elif truncated[t, n] or t == 39:
                target = reward + gamma * final
            else:
                target = reward + gamma * ((1 - decay) * final + decay * following)
            expected[t, n] = following = target
    targets = q_lambda(*rollout[2:], gamma, decay)
    np.testing.assert_allclose(targets, expected, rtol=1e-4, atol=1e-4)


def test_epsilon_is_drawn_for_each_environment_and_step():
    agent = PQN(make_vec("test/Walk-v0", num_envs=8, seed=5), SMALL, seed=5, device="cpu")
    agent.start()
    with torch.no_grad():
        agent.network.head.weight.zero_()  # type: ignore[union-attr, operator]
        agent.network.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # type: ignore[union-attr, operator]
    actions = agent.collect(np.linspace(1, 0, 400)).actions
    explored = actions != 1  # two thirds of those that explore
    mixed = explored.any(1) & ~explored.all(1)
    assert mixed[:200].float().mean() > 0.8
    torch.testing.assert_close(explored[:100].float().mean(0), torch.full((8,), 0.58), rtol=0, atol=0.2)
    assert not explored[-1].any()
    assert explored[:100].float().mean() > explored[-100:].float().mean() + 0.3


def test_update_is_the_plain_algorithm():
    """Flat weights and a fused optimizer: the numbers of torch's own, on every minibatch once an epoch."""
    agent = PQN("test/Walk-v0", SMALL, seed=1, device="cpu")
    agent.start()
    rollout = agent.collect(np.ones(16))
    targets = torch.randn(16, 4) * 30  # large, so that gradients are clipped
    plain = copy.deepcopy(agent.network)
    optimizer = torch.optim.RAdam(plain.parameters(), lr=1e-2)
    shuffling = agent.shuffling_rng.clone_state()
    loss_sum = agent.update(rollout, targets, 1e-2)
    obs, actions, y = rollout.obs.reshape(64, 3), rollout.actions.reshape(64), targets.reshape(64)
    plain_sum, clipped = 0.0, 0
    for _ in range(2):
        for index in torch.randperm(64, generator=shuffling).reshape(4, 16):
            loss = q_loss(plain, obs[index], actions[index], y[index])
            optimizer.zero_grad()
            loss.backward()
            clipped += torch.nn.utils.clip_grad_norm_(plain.parameters(), 10.0).item() > 10.0
            optimizer.step()
            plain_sum += loss.item()
    assert clipped > 0
    assert agent.grad_step == 8
    assert loss_sum.item() == pytest.approx(plain_sum, rel=1e-4)
    for one, other in zip(plain.parameters(), agent.network.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "space"),
    [("mlp-norm", spaces.Box(-1, 1, (3,))), ("minatar-norm", spaces.Box(0, 1, (4, 10, 10), np.uint8))],
)
def test_update_stacks_over_seeds(name, space):
    """Targets and loss touch only what they are given: vmap over seeds gives each seed's own gradient."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(QNetwork(make_encoder(name, space, features_dim=8), 2))
    obs = torch.as_tensor(np.stack([[space.sample() for _ in range(6)] for _ in range(3)]))
    actions, rewards, values = torch.randint(2, (3, 6)), torch.randn(3, 6, 1), torch.randn(3, 6, 1)
    ends = torch.rand(2, 3, 6, 1) < 0.2
    stacked, _ = torch.func.stack_module_state(networks)

    def loss(parameters, obs, actions, *rollout):
        def network(x):
            return torch.func.functional_call(networks[0], parameters, (x,))

        return q_loss(network, obs, actions, q_lambda(*rollout, 0.9, 0.8).flatten())

    gradients = torch.func.vmap(torch.func.grad(loss))(stacked, obs, actions, rewards, values, *ends)
    for i, network in enumerate(networks):
        targets = q_lambda(rewards[i], values[i], ends[0, i], ends[1, i], 0.9, 0.8).flatten()
        own = torch.autograd.grad(q_loss(network, obs[i], actions[i], targets), list(network.parameters()))
        for gradient, (parameter, _) in zip(own, network.named_parameters()):
            torch.testing.assert_close(gradients[parameter][i], gradient)


class OneState(gym.Env):
    """One state; action 1 gives 1, action 0 nothing; an episode is a single step, cut off or terminated."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, terminates: bool = False):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), float(action), self.terminates, not self.terminates, {}


gym.register("test/OneState-v0", lambda **kwargs: OneState(**kwargs))


@pytest.mark.parametrize(("terminates", "value"), [(False, 2.0), (True, 1.0)])
def test_values_bootstrap_through_truncation_only(terminates, value):
    """At gamma 1/2 acting well for ever is worth 2; nothing follows a termination."""
    env = make_vec("test/OneState-v0", num_envs=4, env_kwargs={"terminates": terminates})
    config = PQNConfig(
        num_steps=8, epochs=2, minibatches=2, gamma=0.5, learning_rate=3e-2, exploration_final=1.0
    )
    encoder = MLP(env.single_observation_space, features_dim=8, hidden=())
    agent = PQN(env, config, encoder=encoder, device="cpu").learn(3000, progress=False)
    with torch.no_grad():
        q = agent.network(torch.ones(1, 1))
    torch.testing.assert_close(q, torch.tensor([[value - 1, value]]), rtol=0, atol=0.05)
    assert agent.predict(np.ones(1, np.float32), deterministic=True)[0] == 1


def test_a_lost_life_ends_values_but_not_the_game():
    """Where an episode terminates without a reset, the next row is not the successor's value."""
    agent: Any = PQN(make_vec("test/Walk-v0", num_envs=1, seed=5), SMALL, seed=5, device="cpu")
    agent.start()
    step_once = agent.env.step

    def step(action):
        step = step_once(action)
        return step._replace(terminated=np.ones(1, bool), truncated=np.zeros(1, bool))

    agent.env.step = step
    rollout = agent.collect(np.ones(20))
    torch.testing.assert_close(q_lambda(*rollout[2:], 0.9, 0.7), rollout.rewards)


@pytest.mark.parametrize(
    ("env_id", "num_envs"), [("CartPole-v1", 4), ("MinAtar/Breakout-v1", 4), ("test/Pair-v0", 2)]
)
def test_checkpoint_and_go_on_is_bit_for_bit(env_id, num_envs, tmp_path, monkeypatch):
    """Stopped twice, in the middle of episodes, in fresh agents each time."""
    # A small network, because what is tested is everything else.
    monkeypatch.setitem(ENCODERS, "tiny", functools.partial(MLP, features_dim=4, hidden=()))
    config = PQNConfig(num_envs=num_envs, num_steps=10, epochs=2, minibatches=4)

    def timeless(row):
        return {k: v for k, v in row.items() if not k.startswith("speed/")}

    def everything(agent):
        tensors, meta = agent.state()
        tensors = {"weights": agent.weights.detach(), **tensors}
        return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(meta))

    whole = PQN(env_id, config, encoder="tiny", seed=3, device="cpu")
    rows = [timeless(row) for row in whole.training(360, log_every=40)]
    agent: Any = PQN(env_id, config, encoder="tiny", seed=3, device="cpu")
    resumed = []
    for stop in (120, 240, 360):
        for row in agent.training(360, log_every=40):
            resumed.append(timeless(row))
            if row["env_step"] >= stop:
                break
        save_checkpoint(agent, tmp_path)
        agent = load(newest_first(tmp_path)[0])
        assert load_checkpoint(newest_first(tmp_path)[0], agent), "not replayed exactly"
    assert resumed == rows
    (tensors, meta), (expected, expected_meta) = everything(agent), everything(whole)
    assert meta == expected_meta
    assert_same_weights(tensors, expected)
    assert tensors["radam.steps"] == agent.grad_step > 0


class Pair(gym.Env):
    """A board and a vector."""

    observation_space = spaces.Dict(
        {"board": spaces.Box(0, 1, (2, 5, 5), np.uint8), "speed": spaces.Box(-np.inf, np.inf, (3,))}
    )
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), float(action), False, bool(self.np_random.random() < 0.2), {}

    def observe(self):
        board = self.np_random.integers(0, 2, (2, 5, 5), dtype=np.uint8)
        return {"board": board, "speed": self.np_random.standard_normal(3, np.float32)}


gym.register("test/Pair-v0", lambda **kwargs: Pair(**kwargs))


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("CartPole-v1", "mlp-norm"),
        ("MinAtar/Breakout-v1", "minatar-norm"),
        ("test/Pair-v0", "minatar-norm+mlp-norm"),
        ("test/Image-v0", "impala-norm"),
        ("ALE/Pong-v5", "nature-norm"),
    ],
)
def test_auto_is_an_encoder_with_layer_norm(env_id, name):
    agent = PQN(env_id, PQNConfig(num_envs=1), device="cpu")
    assert agent.describe()["encoder"]["name"] == name
    norms = [m for m in agent.network.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.GroupNorm)]
    assert len(norms) >= 2


class Image(Pair):
    observation_space = spaces.Box(0, 255, (3, 24, 24), np.uint8)  # type: ignore[assignment]


gym.register("test/Image-v0", lambda **kwargs: Image(**kwargs))


def test_encoder_may_be_chosen():
    agent = PQN("CartPole-v1", encoder="mlp-tanh", device="cpu")
    assert type(agent.network.encoder) is ENCODERS["mlp-tanh"]


def test_training_is_whole_rollouts():
    agent = PQN("CartPole-v1", SMALL, seed=5, device="cpu")
    rows = list(agent.training(300, log_every=100))
    assert [row["env_step"] for row in rows] == [128, 256, 320]
    assert [row["grad_step"] for row in rows] == [16, 32, 40]
    finished = sum(row["train/episodes"] * row.get("train/length_mean", 0) for row in rows)
    running = agent.env.state()[0]["lengths"].sum()
    assert finished + running == pytest.approx(320)
    assert rows[-1]["train/q_loss"] > 0


def test_same_seed_same_weights_and_other_seed_other_weights():
    runs = [PQN("CartPole-v1", SMALL, seed=s, device="cpu").learn(300, progress=False) for s in (1, 1, 2)]
    assert_same_weights(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(runs[0].weights, runs[2].weights)


def test_predicting_in_between_changes_nothing():
    plain = PQN("CartPole-v1", SMALL, seed=1, device="cpu").learn(300, progress=False, log_every=50)
    watched = PQN("CartPole-v1", SMALL, seed=1, device="cpu")
    watched.learn(300, lambda agent, row: agent.predict(agent.obs) is None, progress=False, log_every=50)
    assert watched.env_step < 300, "False stops it"
    watched = PQN("CartPole-v1", SMALL, seed=1, device="cpu")
    watched.learn(300, lambda agent, row: agent.predict(agent.obs) is not None, progress=False, log_every=50)
    assert_same_weights(weights(plain), weights(watched))


def test_loss_that_is_not_finite_stops_the_training():
    agent = PQN("CartPole-v1", SMALL, seed=1, device="cpu")
    with torch.no_grad():
        agent.weights[-1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"q_loss is nan at grad_step 8 \(env_step 64\)"):
        agent.learn(64, progress=False)


def test_dropout_belongs_to_the_loss_alone():
    class Dropping(MLP):
        def features(self, x):
            return torch.nn.functional.dropout(super().features(x), 0.5, self.training)

    env = make_vec("CartPole-v1", num_envs=4)
    agent = PQN(env, SMALL, encoder=Dropping(env.single_observation_space), seed=1, device="cpu")
    agent.learn(64, progress=False)
    obs = np.ones((50, 4), np.float32)
    assert len(set(agent.predict(obs, deterministic=True)[0])) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_envs": 4, "num_steps": 10, "minibatches": 3},
            r"^minibatches must divide num_envs \* num_steps = 4 \* 10 = 40, got 3$",
        ),
        ({"num_steps": 0}, "num_steps must be 1 or more, got 0"),
        ({"q_lambda": 1.5}, "q_lambda must be between 0 and 1, got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0"),
        ({"learning_rate_final": -1.0}, "learning_rate_final must be 0 or more"),
        ({"exploration_fraction": 0.0}, "exploration_fraction must be greater than 0 and at most 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        PQNConfig(**settings)


def test_environments_that_minibatches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"num_envs \* num_steps = 3 \* 16 = 48, got 32"):
        PQN(make_vec("CartPole-v1", num_envs=3), PQNConfig(num_envs=4, num_steps=16, minibatches=32))


def test_continuous_actions_are_refused_by_name():
    with pytest.raises(ValueError, match="pqn takes Discrete actions; Pendulum-v1 has Box"):
        PQN("Pendulum-v1")


@pytest.mark.parametrize("pattern", list(RECIPES))
def test_recipes_are_valid(pattern):
    assert recipe(pattern.replace("*", "1"), num_envs=8).num_envs == 8


@pytest.mark.slow  # compiling takes half a minute
def test_compiled_loss_is_the_eager_one():
    compiled = PQN("CartPole-v1", PQNConfig(**{**vars(SMALL), "compile": True}), seed=1, device="cpu")
    eager = PQN("CartPole-v1", SMALL, seed=1, device="cpu")
    rows = [list(agent.training(64, log_every=64))[-1] for agent in (compiled, eager)]
    assert rows[0]["train/q_loss"] == pytest.approx(rows[1]["train/q_loss"], rel=1e-4)


@pytest.mark.slow
def test_learns_cartpole():
    from foveal.runs.evaluation import evaluate

    scores = []
    for seed in range(3):
        agent = PQN("CartPole-v1", seed=seed, device="cpu").learn(300_000, progress=False)
        scores.append(evaluate(agent, 100)["eval/return_mean"])
    assert np.mean(scores) >= 475, scores
