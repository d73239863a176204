"""DQN: its equations, its contract, and that it learns."""

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from foveal.agents import AGENTS, DQN, load
from foveal.agents.agent import to_tensors
from foveal.agents.dqn import (
    RECIPES,
    DQNConfig,
    QNetwork,
    act,
    epsilon_at,
    q_loss,
    recipe,
    td_target,
)
from foveal.envs import make_vec
from foveal.vision import MLP, make_encoder
from foveal.vision.optimization import (
    adam_state,
    adam_step,
    clip_norm,
    flatten_parameters,
    take_gradient,
    views_of,
)

SMALL = DQNConfig(learning_starts=50, train_every=10, gradient_steps=3, batch_size=16, buffer_size=1000)


def weights(agent):
    return {name: tensor.clone() for name, tensor in agent.network.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_td_target_by_hand():
    target = td_target(
        torch.tensor([1.0, 1.0, -2.0]),
        torch.tensor([False, True, False]),
        torch.tensor([10.0, 10.0, 0.5]),
        0.9,
    )
    torch.testing.assert_close(target, torch.tensor([10.0, 1.0, -1.55]))


def test_q_loss_is_huber_of_the_chosen_action():
    def network(obs):
        return torch.tensor([[0.0, 3.0], [0.5, -1.0]])

    # errors 3 - 0 and 0.5 - 0.1: Huber gives 3 - 1/2 and 0.4^2 / 2, and their mean
    loss = q_loss(network, None, torch.tensor([1, 0]), torch.tensor([0.0, 0.1]))
    assert loss.item() == pytest.approx((2.5 + 0.08) / 2)


def test_epsilon_is_linear_in_env_steps():
    config = DQNConfig(
        learning_starts=100, exploration_initial=1.0, exploration_final=0.1, exploration_fraction=0.5
    )
    assert epsilon_at(50, 2000, config) == 1.0
    assert epsilon_at(500, 2000, config) == pytest.approx(0.55)
    assert epsilon_at(1000, 2000, config) == pytest.approx(0.1)
    assert epsilon_at(1999, 2000, config) == pytest.approx(0.1)


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


def test_learning_rate_falls_linearly_where_asked():
    config = DQNConfig(
        learning_rate=0.1, learning_rate_final=0.02, learning_starts=100, train_every=100, batch_size=4
    )
    rates = rates_of(DQN("CartPole-v1", config, device="cpu"), 500)
    np.testing.assert_allclose(rates, [0.068, 0.052, 0.036, 0.02])
    constant = replace(config, learning_rate_final=None)
    assert rates_of(DQN("CartPole-v1", constant, device="cpu"), 300) == [0.1, 0.1]


def test_epsilon_is_drawn_for_each_environment():
    """At epsilon 1/2 rows of one batch differ in whether they explore; each does so half of the time."""

    def network(obs):
        return torch.nn.functional.one_hot(torch.full((len(obs),), 3), 4).float()

    rng = np.random.default_rng(0)
    actions = np.stack([act(network, torch.zeros(8, 1), 4, 0.5, rng) for _ in range(500)])  # (500, 8)
    mixed = (actions == 3).any(axis=1) & (actions != 3).any(axis=1)
    assert mixed.mean() > 0.95
    # greedy with probability 1/2, and once in four of the rest
    np.testing.assert_allclose((actions == 3).mean(axis=0), 0.625, atol=0.07)


@pytest.mark.parametrize(("name", "shape"), [("mlp", (3,)), ("impala", (2, 8, 8))])
def test_flat_parameters_are_the_module(name, shape):
    torch.manual_seed(0)
    network = QNetwork(make_encoder(name, spaces.Box(-1, 1, shape)), 2)
    obs, actions, targets = torch.randn(5, *shape), torch.tensor([0, 1, 1, 0, 1]), torch.randn(5)
    plain = copy.deepcopy(network)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=1e-4)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    flat = flatten_parameters(network)
    parameters = list(network.parameters())
    gradient = torch.empty(flat.shape)
    views = views_of(gradient, parameters)
    adam = adam_state(flat)
    for _ in range(3):
        optimizer.zero_grad()
        q_loss(plain, obs, actions, targets).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        take_gradient(q_loss(network, obs, actions, targets), parameters, views)
        adam_step(flat, clip_norm(gradient, 0.1), adam, 1e-2, eps=1e-4)
    for one, other in zip(plain.parameters(), network.parameters()):
        torch.testing.assert_close(one, other)


def test_adam_is_torchs_adam_and_stacks_over_seeds():
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(2, 7))
    optimizer = torch.optim.Adam([plain], lr=0.03, eps=1e-5)
    weights = plain.detach().clone()
    state = adam_state(weights)
    for _ in range(5):
        plain.grad = torch.randn(2, 7)
        adam_step(weights, plain.grad, state, 0.03, eps=1e-5)
        optimizer.step()
    torch.testing.assert_close(weights, plain.detach())


def test_update_stacks_over_seeds():
    """The loss touches only what it is given: vmap over stacked weights gives each seed's own gradient."""
    space = spaces.Box(-1, 1, (3,))
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(QNetwork(make_encoder("mlp", space, features_dim=8, hidden=(8,)), 2))
    obs, actions, targets = torch.randn(3, 5, 3), torch.randint(2, (3, 5)), torch.randn(3, 5)
    stacked, _ = torch.func.stack_module_state(networks)

    def loss(parameters, obs, actions, targets):
        def network(x):
            return torch.func.functional_call(networks[0], parameters, (x,))

        return q_loss(network, obs, actions, targets)

    gradients = torch.func.vmap(torch.func.grad(loss))(stacked, obs, actions, targets)
    for i, network in enumerate(networks):
        own = torch.autograd.grad(q_loss(network, obs[i], actions[i], targets[i]), list(network.parameters()))
        for gradient, (name, _) in zip(own, network.named_parameters()):
            torch.testing.assert_close(gradients[name][i], gradient)
    # and so does clipping, along the last axis
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    second = clip_norm(flat[1].clone(), 0.1)
    torch.testing.assert_close(clip_norm(flat, 0.1)[1], second)


@pytest.mark.parametrize("double", [False, True])
def test_update_is_the_plain_algorithm(double):
    """Many batches sampled and valued at once, flat weights: the numbers of a plain loop."""
    config = DQNConfig(
        learning_starts=0,
        train_every=1000,
        gradient_steps=5,
        batch_size=16,
        double=double,
        target_every=10_000,
    )
    agent = DQN("CartPole-v1", config, seed=1, device="cpu")
    for _ in agent.training(200):
        pass
    torch.manual_seed(0)
    agent.target_weights.data.add_(torch.randn_like(agent.target_weights) * 0.1)
    online, target = copy.deepcopy(agent.network), copy.deepcopy(agent.target)
    optimizer = torch.optim.Adam(online.parameters(), lr=config.learning_rate)
    assert agent.replay is not None
    batches = agent.replay.sample((5, 16), agent.sampling_rng.clone_state())
    loss_sum = agent.update(5, config.learning_rate)
    plain_sum = 0.0
    for i in range(5):
        batch = {key: value[i] for key, value in batches.items()}
        with torch.no_grad():
            values = target(batch["next_obs"])
            best = (online if double else target)(batch["next_obs"]).argmax(1, keepdim=True)
            y = batch["rewards"] + 0.99 * (1 - batch["terminated"].float()) * values.gather(1, best).squeeze(
                1
            )
        q = online(batch["obs"]).gather(1, batch["actions"].unsqueeze(1)).squeeze(1)
        loss = torch.nn.functional.huber_loss(q, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(online.parameters(), 10.0)
        optimizer.step()
        plain_sum += loss.item()
    assert loss_sum.item() == pytest.approx(plain_sum, rel=1e-5)
    for one, other in zip(online.parameters(), agent.network.parameters()):
        torch.testing.assert_close(one, other)


def test_target_network_follows_by_tau_on_env_steps():
    config = DQNConfig(learning_starts=10**6, target_every=40, tau=0.25)
    agent = DQN(make_vec("CartPole-v1", num_envs=4), config, device="cpu")
    agent.weights.data.fill_(1.0)
    agent.target_weights.data.zero_()
    for row in agent.training(120, log_every=40):
        expected = 1 - 0.75 ** (row["env_step"] // 40)
        torch.testing.assert_close(agent.target_weights.data, torch.full_like(agent.weights, expected))


class WithBuffer(MLP):
    """Counts its calls in a buffer, as batch statistics are."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=4, hidden=())
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))

    def features(self, x):
        self.calls += 1
        return super().features(x)


def test_target_network_takes_buffers_too():
    env = make_vec("CartPole-v1")
    agent: Any = DQN(env, SMALL, encoder=WithBuffer(env.single_observation_space), device="cpu")
    for _ in range(3):
        agent.predict(env.reset(), deterministic=True)
    assert agent.network.encoder.calls == 3
    assert agent.target.encoder.calls == 0
    agent.update_target()
    assert agent.target.encoder.calls == 3


def test_predict_explores_as_at_the_end_of_training():
    """Not at the epsilon of 1 that an agent starts with: a loaded agent would act at random."""
    config = DQNConfig(exploration_final=0.2)
    agent = DQN("CartPole-v1", config, seed=0, device="cpu")
    obs = np.tile(agent.env.reset(), (4000, 1))
    greedy = agent.predict(obs[0], deterministic=True)[0]
    actions = agent.predict(obs, deterministic=False)[0]
    assert (actions != greedy).mean() == pytest.approx(0.1, abs=0.02)


class AlwaysTruncated(gym.Env):
    """One state, reward 1, cut off after one step: its value is 1 / (1 - gamma)."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2, start=5)

    def __init__(self, terminates: bool = False):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert action in (5, 6)
        return np.ones(1, np.float32), 1.0, self.terminates, not self.terminates, {}


gym.register("test/AlwaysTruncated-v0", lambda **kwargs: AlwaysTruncated(**kwargs))


@pytest.mark.parametrize(("terminates", "value"), [(False, 2.0), (True, 1.0)])
def test_values_bootstrap_through_truncation_only(terminates, value):
    env = make_vec("test/AlwaysTruncated-v0", env_kwargs={"terminates": terminates})
    config = DQNConfig(
        gamma=0.5, learning_rate=1e-2, learning_starts=50, train_every=2, batch_size=32, target_every=10
    )
    agent = DQN(env, config, device="cpu").learn(1000, progress=False)
    with torch.no_grad():
        q = agent.network(torch.ones(1, 1))
    torch.testing.assert_close(q, torch.full((1, 2), value), rtol=0, atol=0.05)


def test_same_seed_same_weights_and_other_seed_other_weights():
    runs = [DQN("CartPole-v1", SMALL, seed=s, device="cpu").learn(300, progress=False) for s in (1, 1, 2)]
    assert_same_weights(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(runs[0].weights, runs[2].weights)


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = DQN("CartPole-v1", SMALL, seed=1, device="cpu").learn(200, progress=False)
    draw = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert draw == (torch.rand(1), np.random.rand())  # noqa: NPY002
    second = DQN("CartPole-v1", SMALL, seed=1, device="cpu").learn(200, progress=False)
    assert_same_weights(weights(first), weights(second))


def test_evaluating_in_between_changes_nothing():
    from foveal.runs.evaluation import evaluate

    plain = DQN("CartPole-v1", SMALL, seed=1, device="cpu").learn(300, progress=False, log_every=50)

    def evaluate_it(agent, row):
        evaluate(agent, 3)
        agent.predict(agent.obs, deterministic=False)

    watched = DQN("CartPole-v1", SMALL, seed=1, device="cpu")
    watched.learn(300, callback=evaluate_it, progress=False, log_every=50)
    assert_same_weights(weights(plain), weights(watched))


def test_rows_carry_their_axis_and_count_every_episode():
    agent = DQN(make_vec("CartPole-v1", num_envs=3, seed=5), SMALL, seed=5, device="cpu")
    rows = list(agent.training(900, log_every=300))
    assert [row["env_step"] for row in rows] == [300, 600, 900]
    assert rows[-1]["grad_step"] == agent.grad_step > 0
    # steps in finished episodes, and what the three running ones have so far
    finished = sum(row["train/episodes"] * row.get("train/length_mean", 0) for row in rows)
    running = agent.env.state()[0]["lengths"].sum()
    assert finished + running == pytest.approx(900)


@pytest.mark.parametrize("name", list(AGENTS))
def test_save_and_load(name, tmp_path):
    tables = ("value-iteration", "policy-iteration", "q-learning")
    env_id = "foveal/GridWorld-v0" if name in tables else "CartPole-v1"
    agent = AGENTS[name](env_id, seed=4).learn(64, progress=False)
    path = agent.save(tmp_path / "weights.safetensors")
    loaded = load(path)
    assert type(loaded) is AGENTS[name]
    assert_same_weights(weights(agent), weights(loaded))
    assert loaded.config == agent.config
    assert (loaded.env_step, loaded.grad_step) == (agent.env_step, agent.grad_step)
    obs = agent.env.reset()
    np.testing.assert_array_equal(
        agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
    )


def test_loading_says_what_is_wrong(tmp_path):
    agent = DQN("CartPole-v1")
    path = agent.save(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights file or run at"):
        load(tmp_path / "nowhere")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(path)
    other = DQN("CartPole-v1", encoder=make_encoder("mlp", agent.observation_space, features_dim=7))
    tensors = other.network.state_dict()
    with pytest.raises(ValueError, match=r"another architecture: .* is \(7,.*there and \(256,.*here"):
        agent.load_weights(tensors, tmp_path)


def test_predict_takes_one_observation_or_a_batch():
    agent = DQN("CartPole-v1", seed=0)
    one, state = agent.predict(np.zeros(4, np.float32), state="kept", deterministic=True)
    many, _ = agent.predict(np.zeros((3, 4), np.float32), deterministic=True)
    assert one.shape == ()
    assert many.shape == (3,)
    assert state == "kept"
    assert (many == one).all()
    with pytest.raises(ValueError, match=r"obs has shape \(5,\); one observation is \(4,\)"):
        agent.predict(np.zeros(5))


def test_stable_baselines3_evaluates_it():
    from stable_baselines3.common.evaluation import evaluate_policy

    agent = DQN("CartPole-v1", seed=0)
    returns, lengths = evaluate_policy(
        agent, gym.make("CartPole-v1"), n_eval_episodes=3, return_episode_rewards=True, warn=False
    )
    assert returns == lengths
    assert np.shape(returns) == (3,)


def test_learn_stops_when_the_callback_says_so_and_goes_on_from_there():
    seen = []
    agent = DQN("CartPole-v1", SMALL, seed=1, device="cpu")

    def stop(agent, row):
        seen.append(row["env_step"])
        return row["env_step"] < 200

    agent.learn(1000, callback=stop, progress=False, log_every=100)
    assert seen == [100, 200]
    assert agent.learn(100, progress=False).env_step == 300


def test_dict_keys_keep_their_order_through_a_file(tmp_path):
    agent = DQN("test/DictObs-v0", seed=2, device="cpu")
    assert list(agent.observation_space) == ["place", "picture.left"]  # type: ignore[call-overload]
    obs = agent.env.reset()
    path = agent.save(tmp_path / "weights.safetensors")
    tensors = to_tensors(obs, agent.observation_space, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(load(path).network(tensors), agent.network(tensors), rtol=0, atol=0)


def test_loaded_weights_reach_the_target_and_learning_waits_for_new_transitions(tmp_path):
    config = DQNConfig(**{**vars(SMALL), "target_every": 10**6})
    agent = DQN("CartPole-v1", config, seed=1, device="cpu").learn(100, progress=False)
    again = load(agent.save(tmp_path / "weights.safetensors"))
    assert isinstance(again, DQN)
    torch.testing.assert_close(again.target_weights, again.weights)
    torch.testing.assert_close(again.weights, agent.weights)
    steps = again.grad_step
    again.learn(50, progress=False)
    assert again.grad_step == steps, "no update before learning_starts new transitions"
    again.learn(50, progress=False)
    assert again.grad_step > steps


def test_encoder_with_unused_parameters_and_dropout():
    class Odd(MLP):
        def __init__(self, observation_space):
            super().__init__(observation_space, features_dim=8)
            self.unused = torch.nn.Parameter(torch.ones(3))
            self.dropout = torch.nn.Dropout(0.5)

        def features(self, x):
            return self.dropout(super().features(x))

    env = make_vec("CartPole-v1")
    agent = DQN(env, SMALL, encoder=Odd(env.single_observation_space), seed=1, device="cpu")
    agent.learn(100, progress=False)
    assert agent.grad_step > 0
    obs = np.ones((50, 4), np.float32)
    assert len(set(agent.predict(obs, deterministic=True)[0])) == 1, "dropout belongs to the loss alone"


def test_images_may_be_given_channels_last():
    agent = DQN("MinAtar/Breakout-v1", seed=0, device="cpu")
    obs = agent.env.reset()[0]  # (4, 10, 10)
    first, last = (agent.predict(o, deterministic=True)[0] for o in (obs, obs.transpose(1, 2, 0)))
    assert first == last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((gym.make("CartPole-v1"),), "env must be an environment id or what"),
        (("CartPole-v1", {"gamma": 0.9}), "config must be a DQNConfig, got dict"),
        (("CartPole-v1", None, MLP), "encoder must be a name or an encoder, got the class MLP"),
        (("CartPole-v1", None, torch.nn.Linear(4, 8)), "encoder must have a features_dim"),
        (("CartPole-v1", DQNConfig(buffer_device="nonsense")), "device must be auto, cpu or a device"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DQN(*arguments)


def test_replay_that_does_not_fit():
    agent = DQN("CartPole-v1", DQNConfig(buffer_size=10**15))
    with pytest.raises(ValueError, match="buffer_size 1,000,000,000,000,000 does not fit into memory"):
        agent.start()


def test_dict_observations_train():
    agent = DQN("test/DictObs-v0", SMALL, device="cpu").learn(120, progress=False)
    assert agent.grad_step > 0


class DictObs(gym.Env):
    observation_space = spaces.Dict(
        OrderedDict({"place": spaces.Discrete(4), "picture.left": spaces.Box(0, 255, (1, 8, 8), np.uint8)})
    )
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), float(action), bool(self.np_random.random() < 0.1), False, {}

    def observe(self):
        return {
            "picture.left": self.np_random.integers(0, 256, (1, 8, 8), dtype=np.uint8),
            "place": np.int64(self.np_random.integers(4)),
        }


gym.register("test/DictObs-v0", lambda **kwargs: DictObs(**kwargs))


@pytest.mark.slow  # compiling takes half a minute
def test_compiled_loss_is_the_eager_one():
    compiled = DQN("CartPole-v1", DQNConfig(**{**vars(SMALL), "compile": True}), seed=1, device="cpu")
    eager = DQN("CartPole-v1", SMALL, seed=1, device="cpu")
    rows = [list(agent.training(80, log_every=80))[-1] for agent in (compiled, eager)]
    assert rows[0]["train/q_loss"] == pytest.approx(rows[1]["train/q_loss"], rel=1e-4)


def test_training_goes_on_where_nothing_compiles(monkeypatch):
    def broken(function):
        def fail(*args):
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    agent = DQN("CartPole-v1", DQNConfig(**{**vars(SMALL), "compile": True}), seed=1, device="cpu")
    with pytest.warns(UserWarning, match="no C"):
        agent.learn(80, progress=False)
    assert agent.grad_step > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1, got 1.5"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0"),
        ({"tau": 0.0}, "tau must be greater than 0 and at most 1"),
        ({"num_envs": -2}, "num_envs must be 1 or more, got -2"),
        ({"learning_starts": -1}, "learning_starts must be 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DQNConfig(**settings)


def test_continuous_actions_are_refused_by_name():
    with pytest.raises(ValueError, match="dqn takes Discrete actions; Pendulum-v1 has Box"):
        DQN("Pendulum-v1")


@pytest.mark.parametrize("pattern", list(RECIPES))
def test_recipes_are_valid(pattern):
    assert recipe(pattern.replace("*", "1"), num_envs=2).num_envs == 2


@pytest.mark.slow
def test_learns_cartpole():
    """Of five seeds at 50k steps the chosen weights of most balance to the end."""
    from foveal.runs.benchmarks.cartpole import train_foveal

    chosen = [train_foveal("foveal", seed)["chosen"] for seed in range(5)]
    assert np.mean(chosen) >= 475, chosen
