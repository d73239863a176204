"""PPO: its loss by hand, its KL stop, minibatches, schedules, and that memory's ratios begin at 1."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from toys import Signs

from foveal.agents import PPO
from foveal.agents.distributions import make_distribution
from foveal.agents.policy import ActorCritic
from foveal.agents.ppo import LOSSES, Batch, PPOConfig, ppo_loss
from foveal.agents.returns import gae
from foveal.envs import make_vec
from foveal.vision import make_encoder

SMALL = PPOConfig(num_envs=4, num_steps=8, minibatch_size=8, epochs=3, learning_rate=0.01)


def make(settings: PPOConfig = SMALL, **kwargs: Any) -> Any:
    env = make_vec("toys/Signs-v0", num_envs=settings.num_envs, seed=2, env_kwargs=kwargs)
    agent: Any = PPO(env, settings, seed=3, device="cpu")
    agent.start()
    return agent


def batch_of(agent: Any) -> Batch:
    return agent.advantages(agent.collect(agent.config.num_steps))


def loss_by_hand(ratios, advantages, values=None, old_values=None, returns=None, **settings):
    """The loss of a network with these ratios of Bernoulli probabilities to the old ones, which are 0.4."""
    ratios, advantages = torch.tensor(ratios), torch.tensor(advantages)
    n = len(ratios)
    values = torch.zeros(n) if values is None else torch.tensor(values)
    logits = torch.logit(0.4 * ratios).view(1, n, 1)

    def network(obs, state, starts):
        return logits, values.view(1, n), None

    batch = Batch(
        obs=None,
        state=torch.zeros(n, 0),
        starts=torch.zeros(1, n, dtype=torch.bool),
        actions=torch.ones(1, n, 1),
        log_probs=torch.full((1, n), math.log(0.4)),
        values=(torch.zeros(n) if old_values is None else torch.tensor(old_values)).view(1, n),
        advantages=advantages.view(1, n),
        returns=(torch.zeros(n) if returns is None else torch.tensor(returns)).view(1, n),
    )
    config = PPOConfig(**{"normalize_advantage": False, **settings})
    distribution = make_distribution(spaces.MultiBinary(1))
    loss, losses = ppo_loss(network, distribution, batch, config.clip, config)  # type: ignore[arg-type]
    return loss.item(), dict(zip(LOSSES, losses.tolist()))


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (1.0, 2.0, 2.0, 0),
        (1.1, 2.0, 2.2, 0),
        (1.5, 2.0, 2.4, 1),  # no more gain beyond 1.2
        (0.5, 2.0, 1.0, 1),  # but the whole loss
        (0.9, -2.0, -1.8, 0),
        (0.5, -2.0, -1.6, 1),  # no more gain below 0.8
        (1.5, -2.0, -3.0, 1),
    ],
)
def test_clipped_objective_by_hand(ratio, advantage, objective, clipped):
    loss, losses = loss_by_hand([ratio], [advantage])
    assert loss == pytest.approx(-objective, rel=1e-5)
    assert losses["policy_loss"] == pytest.approx(-objective, rel=1e-5)
    assert losses["clip_fraction"] == clipped
    assert losses["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)
    p = 0.4 * ratio
    assert losses["entropy"] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-4)


def test_the_parts_are_weighted_and_averaged():
    loss, losses = loss_by_hand(
        *([1.5, 0.5, 1.0], [2.0, -2.0, 3.0]),
        values=[1.0, 2.0, 3.0],
        returns=[0.0, 4.0, 3.0],
        value_coefficient=0.7,
        entropy_coefficient=0.3,
    )
    assert losses["policy_loss"] == pytest.approx(-(2.4 - 1.6 + 3.0) / 3, rel=1e-5)
    assert losses["value_loss"] == pytest.approx((1 + 4 + 0) / 3)
    assert losses["clip_fraction"] == pytest.approx(2 / 3)
    expected = losses["policy_loss"] + 0.7 * losses["value_loss"] - 0.3 * losses["entropy"]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "old", "target", "error"),
    [
        (1.0, 0.0, 2.0, 1.5**2),  # moved by 1, counts as 0.5: the larger error is what it is held to
        (3.0, 0.0, 2.0, 1.5**2),
        (0.3, 0.0, 2.0, 1.7**2),
        (-1.0, 0.0, 2.0, 3.0**2),  # moved away: the true error is the larger one
    ],
)
def test_value_clip_by_hand(value, old, target, error):
    arguments = {"values": [value], "old_values": [old], "returns": [target]}
    assert loss_by_hand([1.0], [0.0], **arguments, value_clip=0.5)[1]["value_loss"] == pytest.approx(error)
    plain = loss_by_hand([1.0], [0.0], **arguments)[1]["value_loss"]
    assert plain == pytest.approx((value - target) ** 2)


def test_advantages_are_normalised_in_each_minibatch_but_never_alone():
    advantages = [1.0, 2.0, 6.0]
    loss, _ = loss_by_hand([1.0, 1.0, 1.1], advantages, normalize_advantage=True)
    normal = (np.array(advantages) - 3) / np.std(advantages, ddof=1)
    assert loss == pytest.approx(-(normal @ [1.0, 1.0, 1.1]) / 3, abs=1e-6)
    assert loss_by_hand([1.0], [5.0], normalize_advantage=True)[0] == pytest.approx(-5.0, rel=1e-6)


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.5])
def test_gradient_is_that_of_the_textbook_loss(entropy_coefficient):
    """Against autograd through torch.distributions and the equations as the paper has them."""
    agent = make(replace(SMALL, entropy_coefficient=entropy_coefficient, value_clip=0.1), actions="box")
    batch = batch_of(agent)
    with torch.no_grad():
        agent.weights.add_(0.05 * torch.randn(agent.weights.shape))
    loss, _ = ppo_loss(agent.network, agent.distribution, batch, 0.2, agent.config)
    ours = torch.autograd.grad(loss, agent.parameters)
    params, values, _ = agent.network(batch.obs, batch.state, batch.starts)
    mean, log_std = params.chunk(2, -1)
    policy = torch.distributions.Normal(mean, log_std.exp())
    ratio = (policy.log_prob(batch.actions).sum(-1) - batch.log_probs).exp()
    assert ((ratio - 1).abs() > 0.2).any()
    a = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    objective = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    near = batch.values + (values - batch.values).clamp(-0.1, 0.1)
    errors = torch.max((values - batch.returns) ** 2, (near - batch.returns) ** 2)
    entropy = policy.entropy().sum(-1).mean()
    theirs = torch.autograd.grad(
        -objective + 0.5 * errors.mean() - entropy_coefficient * entropy, agent.parameters
    )
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_advantages_and_returns_of_a_rollout():
    agent = make(replace(SMALL, gamma=0.9, gae_lambda=0.7))
    rollout = agent.collect(8)
    batch = agent.advantages(rollout)
    with torch.no_grad():
        params, values, states = agent.network(rollout.obs, rollout.state, rollout.starts)
        following = agent.next_values(rollout, values, states)
    for i in range(4):
        advantage = 0.0
        for t in reversed(range(8)):
            ended = rollout.terminated[t, i] or rollout.truncated[t, i]
            after = 0.0 if rollout.terminated[t, i] else following[t, i].item()
            delta = rollout.rewards[t, i].item() + 0.9 * after - values[t, i].item()
            advantage = delta + (0.0 if ended else 0.9 * 0.7 * advantage)
            assert batch.advantages[t, i].item() == pytest.approx(advantage, abs=1e-5)
            assert batch.returns[t, i].item() == pytest.approx(advantage + values[t, i].item(), abs=1e-5)
    log_p = params[:-1].log_softmax(-1).gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(batch.log_probs, log_p)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recurrent": "gru", "recurrent_size": 4},
        {"recurrent": "lstm", "recurrent_size": 4, "share_encoder": True, "normalize_observations": True},
    ],
)
@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_ratios_are_1_before_the_first_step_of_each_update(settings, actions):
    """The loss's pass over whole sequences gives the probabilities that were acted with, step by step."""
    agent = make(replace(SMALL, **settings), actions=actions)
    agent.learn(100, progress=False)
    acted: list[Any] = []
    act = agent.network.act

    def watched(*arguments):
        acted.append(act(*arguments))
        return acted[-1]

    agent.network.act = watched
    for _ in range(2):
        weights, hidden = agent.weights.detach().clone(), agent.hidden.clone()
        acted.clear()
        rollout = agent.collect(8)
        torch.testing.assert_close(rollout.state, hidden, rtol=0, atol=0)
        params = torch.stack([params for params, _ in acted])
        expected, _ = agent.distribution.log_prob_entropy(params, rollout.actions)
        batch = agent.advantages(rollout)
        torch.testing.assert_close(batch.log_probs, expected, rtol=1e-4, atol=1e-5)
        count = 0
        for minibatch in agent.minibatches(batch):
            losses = ppo_loss(agent.network, agent.distribution, minibatch, 0.2, agent.config)[1]
            assert losses[3].item() == pytest.approx(0.0, abs=1e-6)
            assert losses[4] == 0
            assert losses[0].item() == pytest.approx(0.0, abs=1e-4), "normalised advantages have mean 0"
            count += 1
        assert count == 4
        assert torch.equal(weights, agent.weights)
        agent.update(batch, 0.01, 0.2)


def test_an_epoch_has_every_transition_once():
    """And each with what belongs to it."""
    agent = make()
    batch = batch_of(agent)
    orders = []
    for _ in range(3):
        seen = []
        for minibatch in agent.minibatches(batch):
            assert minibatch.actions.shape == (1, 8)
            for k in range(8):
                rows = (batch.obs == minibatch.obs[0, k]).all(-1)
                assert rows.sum() == 1
                t, n = (int(x) for x in torch.nonzero(rows)[0])
                for name in ("starts", "actions", "log_probs", "values", "advantages", "returns"):
                    assert getattr(minibatch, name)[0, k] == getattr(batch, name)[t, n], name
                seen.append((t, n))
        assert sorted(seen) == [(t, n) for t in range(8) for n in range(4)]
        orders.append(tuple(seen))
    assert len(set(orders)) == 3, "shuffled anew each time"


def test_minibatches_with_memory_are_whole_sequences_from_their_own_state():
    agent = make(replace(SMALL, recurrent="gru", recurrent_size=4, minibatch_size=16))
    agent.collect(8)
    batch = batch_of(agent)
    assert batch.state.abs().sum(1).gt(0).all()
    orders = set()
    for _ in range(8):
        seen = []
        for minibatch in agent.minibatches(batch):
            assert minibatch.actions.shape == (8, 2)
            for k in range(2):
                (n,) = (
                    torch.nonzero((batch.obs == minibatch.obs[:, k : k + 1]).all(-1).all(0))
                    .flatten()
                    .tolist()
                )
                assert torch.equal(minibatch.state[k], batch.state[n])
                for name in ("starts", "actions", "log_probs", "values", "advantages", "returns"):
                    assert torch.equal(getattr(minibatch, name)[:, k], getattr(batch, name)[:, n]), name
                seen.append(n)
        assert sorted(seen) == [0, 1, 2, 3]
        orders.add(tuple(seen))
    assert len(orders) > 1


def test_the_whole_rollout_in_one_minibatch():
    agent = make(replace(SMALL, minibatch_size=32, recurrent="gru", recurrent_size=4))
    batch = batch_of(agent)
    (only,) = agent.minibatches(batch)
    assert only is batch


# The KL stop.


def plain_update(agent: Any, batch: Batch, config: PPOConfig, rate: float) -> tuple[Any, int, torch.Tensor]:
    """The update as a loop with torch's Adam and a break, on a copy of the network."""
    network, rng = copy.deepcopy(agent.network), agent.rng.clone_state()
    before, agent.rng = agent.rng, rng
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, eps=config.adam_eps)
    count, sums = 0, torch.zeros(len(LOSSES))
    stopped = False
    for _ in range(config.epochs):
        for minibatch in agent.minibatches(batch):
            loss, losses = ppo_loss(network, agent.distribution, minibatch, 0.2, config)
            if config.target_kl is not None and losses[3] > 1.5 * config.target_kl:
                stopped = True
                break
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
            optimizer.step()
            count, sums = count + 1, sums + losses
        if stopped:
            break
    agent.rng = before
    return network, count, sums


@pytest.mark.parametrize("target_kl", [None, 1e-6, 2e-3, 1e3])
def test_update_is_the_plain_algorithm_with_a_break(target_kl):
    config = replace(SMALL, target_kl=target_kl, minibatch_size=16, epochs=5)
    agent = make(config, lengths=[3, 5])
    batch = batch_of(agent)
    network, count, sums = plain_update(agent, batch, agent.config, 0.01)
    own_sums, own_count = agent.update(batch, 0.01, 0.2)
    assert {None: count == 10, 1e-6: count == 1, 2e-3: 1 < count < 10, 1e3: count == 10}[target_kl], count
    assert own_count == agent.grad_step == agent.adam.steps == count
    torch.testing.assert_close(own_sums, sums, rtol=1e-3, atol=1e-5)
    for one, two in zip(network.parameters(), agent.network.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_after_the_stop_nothing_moves():
    agent = make(replace(SMALL, target_kl=1e-9, epochs=1))
    batch = batch_of(agent)
    snapshots = []
    masked_step = agent.masked_step

    def step(going, rate):
        masked_step(going, rate)
        snapshots.append((bool(going), agent.weights.detach().clone(), *(t.clone() for t in agent.adam)))

    agent.masked_step = step
    agent.update(batch, 0.01, 0.2)
    assert [going for going, *_ in snapshots] == [True, False, False, False]
    for snapshot in snapshots[1:]:
        for old, new in zip(snapshots[0][1:], snapshot[1:]):
            assert torch.equal(old, new)


# Schedules and settings.


def test_schedules_fall_linearly_with_env_steps():
    config = replace(SMALL, learning_rate=0.1, learning_rate_final=0.02, clip=0.3, clip_final=0.1)
    rows = list(make(config).training(160, log_every=32))
    assert len(rows) == 5
    rates, clips = ([row[f"train/{name}"] for row in rows] for name in ("learning_rate", "clip"))
    np.testing.assert_allclose(np.diff(rates), -0.08 / 5, rtol=1e-5)
    np.testing.assert_allclose(np.diff(clips), -0.2 / 5, rtol=1e-5)
    assert rates[-1] < 0.04 < 0.08 < rates[0] <= 0.1
    constant = list(make(SMALL).training(64, log_every=32))
    assert [row["train/learning_rate"] for row in constant] == [0.01, 0.01]
    assert [row["train/clip"] for row in constant] == [0.2, 0.2]


def test_rows_say_how_the_update_went():
    agent = make(replace(SMALL, target_kl=2e-3, gamma=0.5))
    rows = list(agent.training(640, log_every=32))
    for row in rows:
        assert set(LOSSES) <= {key.removeprefix("train/") for key in row}
        assert 0 <= row["train/clip_fraction"] <= 1
        assert -1e-6 <= row["train/approx_kl"] <= 1.5 * 2e-3, "a mean of those that were stepped on"
        assert 0 < row["train/entropy"] <= math.log(2) + 1e-6
        assert row["train/explained_variance"] <= 1
    assert rows[-1]["grad_step"] < 20 * 12, "some updates stopped"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"minibatch_size": 100},
            "minibatch_size must divide num_envs \\* num_steps = 8 \\* 128 = 1024, got 100",
        ),
        ({"minibatch_size": 2048}, "minibatch_size must divide num_envs .* = 1024, got 2048"),
        (
            {"minibatch_size": 64, "recurrent": "gru"},
            "minibatch_size must be a multiple of num_steps = 128 with recurrent gru, got 64",
        ),
        ({"clip": 0.0}, "clip must be greater than 0, got 0.0"),
        ({"clip_final": -0.1}, "clip_final must be 0 or more, got -0.1"),
        ({"value_clip": 0.0}, "value_clip must be greater than 0, got 0.0"),
        ({"target_kl": float("nan")}, "target_kl must be greater than 0, got nan"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"num_steps": 0}, "num_steps must be 1 or more, got 0"),
        ({"gae_lambda": 1.5}, "gae_lambda must be between 0 and 1, got 1.5"),
        ({"adam_eps": 0.0}, "adam_eps must be greater than 0, got 0.0"),
    ],
)
def test_settings_that_are_not_taken(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        PPOConfig(**{"num_envs": 8, "num_steps": 128, "minibatch_size": 256, **settings})
    assert "\n" not in str(refused.value)


def test_environments_that_do_not_fit_the_minibatches():
    """Their number is the environments', not the config's."""
    with pytest.raises(ValueError, match="minibatch_size must divide num_envs .* = 3 \\* 8 = 24, got 16"):
        PPO(make_vec("toys/Signs-v0", num_envs=3), replace(SMALL, minibatch_size=16))


# Stacking over seeds.


@pytest.mark.parametrize("memory", [None, "gru", "lstm"])
@pytest.mark.parametrize("actions", ["discrete", "multi-discrete", "multi-binary", "box"])
def test_the_loss_stacks_over_seeds(memory, actions):
    """vmap of the gradient over stacked weights and batches is each seed's own gradient."""
    config = replace(SMALL, entropy_coefficient=0.1, value_clip=0.1, recurrent=memory)
    space, distribution = Signs().observation_space, make_distribution(Signs(actions).action_space)
    networks, batches = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        encoder = make_encoder("mlp-tanh", space, features_dim=8, hidden=())
        other = make_encoder("mlp-tanh", space, features_dim=8, hidden=())
        network = ActorCritic(encoder, other, space, distribution, memory, 4, normalize=True)
        assert network.normalizer is not None
        network.normalizer.update(torch.randn(6, 5, 2))
        obs, starts = torch.randn(6, 5, 2), torch.rand(6, 5) < 0.3
        state = torch.randn(5, network.state_size)
        params, values, _ = network(obs, state, starts)
        chosen = distribution.sample(params, distribution.noise((6, 5), torch.Generator().manual_seed(seed)))
        log_probs, _ = distribution.log_prob_entropy(params, chosen)
        ends = torch.zeros(2, 6, 5, dtype=torch.bool)
        rewards = torch.randn(6, 5)
        advantages = gae(rewards, values, values.roll(-1, 0), ends[0], ends[1], 0.9, 0.9)
        parts = (chosen, log_probs - 0.1 * torch.randn(6, 5), values, advantages, advantages + values)
        batches.append(Batch(obs, state, starts, *(part.detach() for part in parts)))
        networks.append(network)
    stacked, buffers = torch.func.stack_module_state(networks)
    batch = Batch(*(torch.stack(parts) for parts in zip(*batches)))

    def loss(parameters, buffers, *batch):
        def network(*arguments):
            return torch.func.functional_call(networks[0], (parameters, buffers), arguments)

        return ppo_loss(network, distribution, Batch(*batch), 0.2, config)[0]  # type: ignore[arg-type]

    gradients = torch.func.vmap(torch.func.grad(loss))(stacked, buffers, *batch)
    for i, network in enumerate(networks):
        own_loss, _ = ppo_loss(network, distribution, batches[i], 0.2, config)
        own = torch.autograd.grad(own_loss, list(network.parameters()))
        for gradient, (name, _) in zip(own, network.named_parameters()):
            torch.testing.assert_close(gradients[name][i], gradient, rtol=1e-4, atol=1e-5)
