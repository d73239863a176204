"""Small networks without modules and autograd give what modules and autograd give."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from foveal.agents import A2C, DQN, PPO, load
from foveal.agents.dqn import q_loss
from foveal.agents.ppo import ppo_loss
from foveal.agents.small import FEW, LARGEST, OneConvolution, plain, without_modules
from foveal.vision import ENCODERS, MLP

VECTOR = ["mlp", "mlp-tanh"]


def agent_of(encoder: str, **settings: Any) -> PPO:
    return PPO("Pendulum-v1", PPO.Config(num_envs=2, **settings), encoder=encoder, device="cpu")


@pytest.mark.parametrize(
    ("env_id", "encoder"), [*(("Pendulum-v1", name) for name in VECTOR), ("MinAtar/Breakout-v1", "minatar")]
)
def test_an_agents_quick_logits_are_its_networks_and_see_new_weights(env_id, encoder):
    agent: Any = PPO(env_id, PPO.Config(num_envs=2), encoder=encoder, device="cpu")
    network, space = agent.network, agent.observation_space
    obs = torch.from_numpy(np.stack([space.sample() for _ in range(5)]))
    assert agent.logits_of is not None
    for _ in range(2):
        with torch.no_grad():
            expected = network.policy_head(network.encoder(obs))
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(agent.logits_of(obs), expected, rtol=1e-4, atol=1e-6)
            agent.weights.add_(0.1 * torch.randn_like(agent.weights))  # an optimizer's step is seen


@pytest.mark.parametrize(("shape", "high"), [((4, 10, 10), 1), ((3, 7, 12), 255)])
def test_one_convolution_gives_the_networks_logits_and_sees_new_weights(shape, high):
    space = spaces.Box(0, high, shape, np.uint8)
    encoder = ENCODERS["minatar"](space)
    head = torch.nn.Linear(encoder.features_dim, 3)
    quick = without_modules(encoder, head, space)
    assert isinstance(quick, OneConvolution)
    rng = np.random.default_rng(0)
    for count in (1, 8, FEW, FEW + 1):
        obs = torch.from_numpy(rng.integers(0, high, (count, *shape), np.uint8, endpoint=True))
        for images in (obs, obs.float(), obs.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            with torch.no_grad():
                for parameter in (*encoder.parameters(), *head.parameters()):
                    parameter.add_(0.02 * torch.randn_like(parameter))  # an optimizer's step is seen
                expected = head(encoder(images))
                assert expected.abs().max() > 0.02
                torch.testing.assert_close(quick(images), expected, rtol=1e-4, atol=1e-5)
    large = spaces.Box(0, high, (4, 84, 84), np.uint8)
    assert without_modules(ENCODERS["minatar"](large), head, large) is None
    assert without_modules(ENCODERS["minatar-norm"](space), head, space) is None


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "MinAtar/Breakout-v1"])
def test_a_copy_acts_with_weights_of_its_own(env_id):
    agent = PPO(env_id, PPO.Config(num_envs=2), device="cpu")
    other, obs = copy.deepcopy(agent), torch.ones(1, *(agent.observation_space.shape or ()))
    assert agent.logits_of is not None
    assert other.logits_of is not None
    with torch.no_grad():
        before = agent.logits_of(obs)
        other.network.policy_head.bias.add_(2)
        assert torch.equal(agent.logits_of(obs), before)
        expected = other.network.policy_head(other.network.encoder(obs))
        torch.testing.assert_close(other.logits_of(obs), expected)
        assert (expected - before).abs().max() > 1


def test_many_rows_go_through_torch():
    agent = agent_of("mlp-tanh")
    rows = LARGEST // 64**2 + 1
    assert agent.logits_of is not None
    with torch.no_grad():
        expected = agent.network.policy_head(agent.network.encoder(torch.ones(rows, 3)))
        assert torch.equal(agent.logits_of(torch.ones(rows, 3)), expected)


def test_what_is_not_plain_is_left_to_torch():
    space: Any = agent_of("mlp").observation_space
    for name in ("mlp-norm",):
        encoder = ENCODERS[name](space)
        assert without_modules(encoder, torch.nn.Linear(encoder.features_dim, 2), space) is None

    class Mine(MLP):
        def features(self, x):
            return 2 * super().features(x)

    assert plain(Mine(space), torch.nn.Linear(256, 2), space) is None
    assert agent_of("mlp-tanh").learner is not None
    assert agent_of("mlp-tanh", recurrent="gru").learner is None
    assert agent_of("mlp-tanh", share_encoder=True).learner is None
    assert agent_of("mlp-tanh", encoder_learning_rate=0.0).learner is None


@pytest.mark.parametrize("encoder", VECTOR)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_chain_rule_gives_autograds_gradient(encoder, normalize):
    """Of a loss of everything that the network gives, every parameter's; and the outputs themselves."""
    agent = agent_of(encoder, normalize_observations=normalize)
    network, learner = agent.network, agent.learner
    assert learner is not None
    torch.manual_seed(1)
    if network.normalizer is not None:
        network.normalizer.update(3 + torch.randn(4, 2, 3))
    obs, state, starts = torch.randn(4, 2, 3), torch.zeros(2, 0), torch.zeros(4, 2, dtype=torch.bool)
    targets = torch.randn(4, 2, 2), torch.randn(4, 2)
    expected_outputs = network(obs, state, starts)[:2]
    for steps in (4, 3):  # the last one, too, or not
        parts = [part[:steps] for part in expected_outputs]
        loss = (parts[0] - targets[0][:steps]).pow(3).mean() + (parts[1] * targets[1][:steps]).exp().mean()
        expected = torch.autograd.grad(loss, agent.parameters, retain_graph=True)
        agent.gradient.fill_(torch.nan)
        with torch.no_grad():
            for one, two in zip(learner.forward(obs), expected_outputs, strict=True):
                torch.testing.assert_close(one, two)
            learner.backward(*torch.autograd.grad(loss, parts, retain_graph=True))
        for view, gradient in zip(agent.gradients, expected, strict=True):
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(view, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("encoder", VECTOR)
def test_dqns_gradient_in_closed_form_is_its_losss(encoder):
    agent = DQN("CartPole-v1", encoder=encoder, device="cpu")
    torch.manual_seed(0)
    obs, actions = torch.randn(32, 4), torch.arange(32) % 2
    with torch.no_grad():
        q = agent.network(obs).gather(1, actions.unsqueeze(1)).squeeze(1)
        targets = q + torch.linspace(-3, 3, 32)  # within Huber's parabola and beyond
    loss = q_loss(agent.network, obs, actions, targets)
    expected = torch.autograd.grad(loss, agent.parameters)
    agent.gradient.fill_(torch.nan)
    assert agent.learner is not None
    torch.testing.assert_close(agent.take_gradient(obs, actions, targets), loss.detach())
    for view, gradient in zip(agent.gradients, expected, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(view, gradient, rtol=1e-4, atol=1e-7)
    frozen = DQN("CartPole-v1", DQN.Config(encoder_learning_rate=0.0), encoder=encoder, device="cpu")
    assert frozen.learner is None


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("value_clip", [None, 0.3])
@pytest.mark.parametrize("normalize", [False, True])
def test_ppos_gradient_in_closed_form_is_its_losss(env_id, value_clip, normalize):
    settings = {"value_clip": value_clip, "normalize_advantage": normalize, "value_coefficient": 0.7}
    config = PPO.Config(num_envs=2, num_steps=16, minibatch_size=32, entropy_coefficient=0.1, **settings)
    agent: Any = PPO(env_id, config, encoder="mlp-tanh", device="cpu")
    agent.start()
    with torch.no_grad():  # a new policy's gradients are next to nothing
        agent.weights.add_(0.1 * torch.randn_like(agent.weights))
    batch = agent.advantages(agent.collect(16))
    with torch.no_grad():  # other ratios than 1, some beyond the clip
        batch = batch._replace(
            log_probs=batch.log_probs + 0.3 * torch.randn(16, 2),
            values=batch.values + 0.5 * torch.randn(16, 2),
            advantages=torch.randn(16, 2),
            returns=batch.values + torch.randn(16, 2),
        )
    loss, losses = ppo_loss(agent.network, agent.distribution, batch, 0.2, config)
    expected = torch.autograd.grad(loss, agent.parameters)
    assert 0.2 < losses[4] < 0.8, "clipped and not"
    agent.gradient.fill_(torch.nan)
    torch.testing.assert_close(agent.take_gradient(batch, 0.2), losses)
    for view, gradient in zip(agent.gradients, expected, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(view, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("advantage", ["n-step", "gae"])
def test_a2cs_gradient_in_closed_form_is_its_losss(env_id, advantage):
    config = A2C.Config(
        num_envs=3, num_steps=6, entropy_coefficient=0.1, advantage=advantage, normalize_advantage=True
    )
    agent: Any = A2C(env_id, config, encoder="mlp-tanh", device="cpu")
    agent.start()
    with torch.no_grad():  # a new policy's gradients are next to nothing
        agent.weights.add_(0.1 * torch.randn_like(agent.weights))
    rollout = agent.collect(6)
    learner, agent.learner = agent.learner, None
    losses = agent.take_gradient(rollout)  # by autograd
    expected = [view.clone() for view in agent.gradients]
    agent.gradient.fill_(torch.nan)
    agent.learner = learner
    assert learner is not None
    torch.testing.assert_close(agent.take_gradient(rollout), losses)
    for view, gradient in zip(agent.gradients, expected, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(view, gradient, rtol=1e-3, atol=1e-6)


def test_agents_act_alike_with_and_without_modules():
    rng = np.random.default_rng(0)
    numbers = 3 * rng.normal(size=(20, 4)).astype(np.float32)
    images = rng.integers(0, 2, (20, 4, 10, 10), np.uint8)
    for kind, env_id, encoder, obs in (
        (A2C, "CartPole-v1", "auto", numbers),
        (DQN, "CartPole-v1", "auto", numbers),
        (A2C, "MinAtar/Breakout-v1", "minatar", images),
        (DQN, "MinAtar/Breakout-v1", "minatar", images),
    ):
        agent: Any = kind(env_id, encoder=encoder, seed=3, device="cpu")
        quick = agent.predict(obs, deterministic=True)[0]
        agent.logits_of, agent.acting = None, agent.network
        assert np.array_equal(quick, agent.predict(obs, deterministic=True)[0])
        assert len(set(quick.tolist())) > 1, "one action for all tells little"


def test_recipes_of_the_zoo_build_its_networks(tmp_path):
    """Two ReLU layers of 256 for policy and value each, PyTorch's own weights, small deviations at first."""
    agent = PPO("Pendulum-v1", PPO.recipe("HalfCheetah-v5"), seed=2, device="cpu")
    assert agent.encoder_name == "mlp"
    assert agent.network.value_encoder is not None
    assert torch.equal(agent.network.log_std.detach(), torch.tensor([-2.0]))  # type: ignore[union-attr]
    bound = 1 / 256**0.5
    head = agent.network.policy_head
    assert 0.8 * bound < head.weight.abs().max() <= bound
    assert head.bias.abs().max() > 0
    again = load(agent.save(tmp_path / "w.safetensors"), device="cpu")
    assert again.describe()["encoder"]["name"] == "mlp"
    obs = np.ones(3, np.float32)
    assert np.array_equal(
        again.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0]
    )
    assert PPO("Pendulum-v1", device="cpu").encoder_name == "mlp-tanh"
