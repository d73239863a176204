"""A2C: its update by hand, with either kind of advantage and either optimizer."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from toys import Signs

from foveal.agents import A2C
from foveal.agents.actor_critic import LOSSES, A2CConfig, a2c_loss
from foveal.agents.distributions import make_distribution
from foveal.agents.policy import ActorCritic
from foveal.envs import make_vec
from foveal.vision import make_encoder


def make(actions: str = "discrete", **settings: Any) -> Any:
    env = make_vec("toys/Signs-v0", num_envs=3, seed=2, env_kwargs={"actions": actions})
    agent: Any = A2C(env, A2CConfig(num_steps=6, gamma=0.9, **settings), seed=3, device="cpu")
    agent.start()
    return agent


def naive_targets(agent: Any, rollout: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (T, N), one environment and one step at a time."""
    config = agent.config
    with torch.no_grad():
        _, values, states = agent.network(rollout.obs, rollout.state, rollout.starts)
        following = agent.next_values(rollout, values, states)
    steps, num_envs = rollout.rewards.shape
    advantages, returns = torch.zeros(steps, num_envs), torch.zeros(steps, num_envs)
    for n in range(num_envs):
        for t in range(steps):
            total, weight = 0.0, 1.0
            for k in range(t, steps):
                terminated, truncated = rollout.terminated[k, n].item(), rollout.truncated[k, n].item()
                last = terminated or truncated or k == steps - 1
                bootstrap = 0.0 if terminated else following[k, n].item()
                if kind == "gae":  # a sum of errors
                    error = rollout.rewards[k, n].item() + config.gamma * bootstrap - values[k, n].item()
                    total += weight * error
                    weight *= config.gamma * config.gae_lambda
                else:  # a sum of rewards
                    total += weight * rollout.rewards[k, n].item()
                    weight *= config.gamma
                    total += weight * bootstrap * last
                if last:
                    break
            value = values[t, n].item()
            advantages[t, n], returns[t, n] = (
                (total, total + value) if kind == "gae" else (total - value, total)
            )
    return advantages, returns


@pytest.mark.parametrize("optimizer", ["rmsprop", "rmsprop-tf", "adam"])
@pytest.mark.parametrize(
    ("kind", "actions", "settings"),
    [
        ("n-step", "discrete", {}),
        ("n-step", "box", {"entropy_coefficient": 0.1, "share_encoder": True}),
        ("n-step", "discrete", {"recurrent": "gru", "recurrent_size": 4, "normalize_advantage": True}),
        ("gae", "multi-discrete", {"gae_lambda": 0.8, "value_coefficient": 0.3}),
        ("gae", "multi-binary", {"recurrent": "lstm", "recurrent_size": 4, "max_grad_norm": 1e-2}),
    ],
)
def test_updates_are_the_plain_algorithm(kind, actions, settings, optimizer):
    """Three updates, against autograd through torch.distributions and optimizers by the book."""
    eps, rate = 1e-3, 0.01
    agent = make(actions, advantage=kind, optimizer=optimizer, optimizer_eps=eps, **settings)
    config, plain = agent.config, copy.deepcopy(agent.network)
    parameters = list(plain.parameters())
    kind_of = torch.optim.Adam if optimizer == "adam" else torch.optim.RMSprop
    stepper = kind_of(parameters, lr=rate, eps=eps)
    squares = [torch.ones_like(p) for p in parameters]
    ended = 0
    for _ in range(3):
        rollout = agent.collect(6)
        ended += int(rollout.truncated.sum()) * int(rollout.terminated.sum())
        advantages, returns = naive_targets(agent, rollout, kind)
        losses = agent.update(rollout, rate)

        if config.normalize_advantage:
            advantages = (advantages - advantages.mean()) / advantages.std()
        params, values, _ = plain(rollout.obs, rollout.state, rollout.starts)
        params, values = params[:-1], values[:-1]
        log_prob, entropy = policy(actions, params, rollout.actions)
        parts = [-(advantages * log_prob).mean(), ((returns - values) ** 2).mean(), entropy.mean()]
        loss = parts[0] + config.value_coefficient * parts[1] - config.entropy_coefficient * parts[2]
        torch.testing.assert_close(losses, torch.stack(parts).detach(), rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        gradients = tuple(g * min(1.0, config.max_grad_norm / norm.item()) for g in gradients)
        if optimizer != "rmsprop-tf":
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            stepper.step()
        else:  # TensorFlow's: epsilon inside of the root, means that begin at one
            with torch.no_grad():
                for parameter, gradient, square in zip(parameters, gradients, squares):
                    square.copy_(0.99 * square + 0.01 * gradient**2)
                    parameter -= rate * gradient / torch.sqrt(square + eps)
        for one, two in zip(agent.network.parameters(), parameters):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-6)
    assert ended, "rollouts with both kinds of ending"
    assert agent.grad_step == 3


def policy(actions: str, params: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies from torch.distributions."""
    td = torch.distributions
    if actions == "discrete":
        parts: list[Any] = [td.Categorical(logits=params)]
        return parts[0].log_prob(chosen), parts[0].entropy()
    if actions == "multi-discrete":
        parts = [td.Categorical(logits=part) for part in params.split([2, 3], -1)]
        pairs = [(part.log_prob(chosen[..., i]), part.entropy()) for i, part in enumerate(parts)]
        return pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]
    if actions == "multi-binary":
        one: Any = td.Bernoulli(logits=params)
    else:
        mean, log_std = params.chunk(2, -1)
        one = td.Normal(mean, log_std.exp())
    return one.log_prob(chosen).sum(-1), one.entropy().sum(-1)


def test_loss_by_hand():
    """Two transitions: -(2 ln 0.8 - ln 0.5) / 2 + 0.5 (1 + 9) / 2 - 0.1 (H(0.8) + H(0.5)) / 2."""
    params = torch.tensor([[[0.8, 0.2], [0.5, 0.5]]]).log()
    loss, losses = a2c_loss(
        make_distribution(spaces.Discrete(2)),
        params=params,
        values=torch.tensor([[1.0, 2.0]]),
        actions=torch.tensor([[0, 1]]),
        advantages=torch.tensor([[2.0, -1.0]]),
        returns=torch.tensor([[2.0, -1.0]]),
        config=A2CConfig(entropy_coefficient=0.1),
    )
    h = -0.8 * np.log(0.8) - 0.2 * np.log(0.2)
    expected = [-(2 * np.log(0.8) - np.log(0.5)) / 2, 5.0, (h + np.log(2)) / 2]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert loss.item() == pytest.approx(expected[0] + 0.5 * expected[1] - 0.1 * expected[2], rel=1e-5)
    assert not losses.requires_grad


def test_a_single_transition_is_not_normalised():
    env = make_vec("toys/Signs-v0", num_envs=1, seed=2)
    agent = A2C(env, A2CConfig(num_steps=1, normalize_advantage=True, optimizer="adam"), seed=3, device="cpu")
    before = agent.weights.detach().clone()
    agent.learn(3, progress=False)
    assert agent.grad_step == 3
    assert torch.isfinite(agent.weights).all()
    assert not torch.equal(before, agent.weights)


def test_learning_rate_falls_linearly_with_env_steps():
    agent = make(learning_rate=0.1, learning_rate_final=0.02)
    rates = [row["train/learning_rate"] for row in agent.training(90, log_every=18)]
    assert len(rates) == 5
    np.testing.assert_allclose(np.diff(rates), -0.08 / 5, rtol=1e-5)
    assert rates[-1] < 0.04 < 0.08 < rates[0] <= 0.1
    assert [row["train/learning_rate"] for row in make().training(36, log_every=18)] == [7e-4] * 2


def test_rows_are_means_over_the_updates_since_the_last():
    agent = make(entropy_coefficient=0.01)
    seen: list[torch.Tensor] = []
    update = agent.update

    def watched(*arguments):
        seen.append(update(*arguments))
        return seen[-1]

    agent.update = watched
    for row in agent.training(180, log_every=60):
        means = torch.stack(seen).mean(0)
        np.testing.assert_allclose([row[f"train/{name}"] for name in LOSSES], means, rtol=1e-5)
        seen.clear()


@pytest.mark.parametrize("actions", ["discrete", "multi-discrete", "multi-binary", "box"])
@pytest.mark.parametrize("memory", [None, "gru"])
def test_the_loss_stacks_over_seeds(actions, memory):
    """vmap of the gradient over stacked weights and rollouts is each seed's own gradient."""
    config = A2CConfig(entropy_coefficient=0.1, normalize_advantage=True)
    space, distribution = Signs().observation_space, make_distribution(Signs(actions).action_space)
    networks, rollouts = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        encoder = make_encoder("mlp-tanh", space, features_dim=8, hidden=())
        networks.append(ActorCritic(encoder, None, space, distribution, memory, 4))
        obs, starts = torch.randn(6, 5, 2), torch.rand(6, 5) < 0.3
        state = torch.randn(5, networks[-1].state_size)
        params = networks[-1](obs, state, starts)[0].detach()
        chosen = distribution.sample(params, distribution.noise((6, 5), torch.Generator().manual_seed(seed)))
        rollouts.append((obs, state, starts, chosen, torch.randn(6, 5), torch.randn(6, 5)))
    stacked, _ = torch.func.stack_module_state(networks)

    def loss(parameters, obs, state, starts, chosen, advantages, returns):
        params, values, _ = torch.func.functional_call(networks[0], parameters, (obs, state, starts))
        return a2c_loss(distribution, params, values, chosen, advantages, returns, config)[0]

    rollout = [torch.stack(parts) for parts in zip(*rollouts)]
    gradients = torch.func.vmap(torch.func.grad(loss))(stacked, *rollout)
    for i, network in enumerate(networks):
        parameters = dict(network.named_parameters())
        own = torch.autograd.grad(loss(parameters, *rollouts[i]), list(parameters.values()))
        for gradient, name in zip(own, parameters):
            torch.testing.assert_close(gradients[name][i], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be 1 or more, got 0"),
        ({"gae_lambda": -0.1}, "gae_lambda must be between 0 and 1, got -0.1"),
        ({"advantage": "td"}, "advantage must be n-step or gae, got 'td'"),
        ({"optimizer": "sgd"}, "optimizer must be rmsprop or rmsprop-tf or adam, got 'sgd'"),
        ({"optimizer_eps": 0.0}, "optimizer_eps must be greater than 0, got 0.0"),
    ],
)
def test_settings_that_are_not_taken(settings, message):
    with pytest.raises(ValueError, match=message):
        A2CConfig(**settings)
