"""REINFORCE: its gradient against the exact one, what baselines do to it, and which steps it learns from."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from toys import Scripted

from foveal.agents import REINFORCE
from foveal.agents.distributions import make_distribution
from foveal.agents.reinforce import REINFORCEConfig, reinforce_loss
from foveal.agents.tabular import policy_gradient, policy_values, softmax
from foveal.envs import VectorEnv, make_mdp, make_vec

BASELINES: list[Any] = ["none", "average", "value"]


class OneHot(torch.nn.Module):
    """States as they are, so that a linear policy over them is a table."""

    def __init__(self, num_states: int):
        super().__init__()
        self.features_dim = num_states

    def forward(self, obs):
        return torch.nn.functional.one_hot(obs.reshape(-1), self.features_dim).float()


def scripted(script: list[str], **settings: Any) -> Any:
    spec = {"env_id": "scripted", "num_envs": len(script[0]), "seed": 0, "training": True}
    env = VectorEnv(Scripted(script), spec, frame_stack=1, clip_rewards=False)
    agent: Any = REINFORCE(env, REINFORCEConfig(**settings), seed=1, device="cpu")
    return agent


@pytest.fixture(scope="module")
def gradients():
    """Estimates (100, S, A) of the gradient by each baseline and weighting, all from the same 100 rollouts of
    a corridor, and the exact gradients. The learned value is the true one, and a bit wrong."""
    gamma, kwargs = 0.9, {"map": "PS..G", "slip": 0.2, "pit_reward": 2.0, "goal_reward": 4.0}
    mdp = make_mdp("foveal/GridWorld-v0", kwargs)
    env = make_vec("foveal/GridWorld-v0", 32, seed=1, env_kwargs=kwargs, max_episode_steps=10_000)
    config = REINFORCEConfig(gamma=gamma, share_encoder=True)
    agent: Any = REINFORCE(env, config, OneHot(mdp.num_states), seed=1, device="cpu")
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(mdp.num_states, mdp.num_actions))
    values = policy_values(mdp, softmax(theta), gamma) + 0.1 * rng.normal(size=mdp.num_states)
    with torch.no_grad():
        agent.network.policy_head.weight.copy_(torch.tensor(theta.T))
        agent.network.value_head.weight.copy_(torch.tensor(values[None]))
    estimates: dict[tuple[str, bool], list[np.ndarray]] = {}
    agent.grad_step = 1  # as if the average had begun
    averages = {discount: torch.tensor(0.5) for discount in (True, False)}
    for _ in range(100):
        rollout = agent.play()
        for discount in (True, False):
            for baseline in BASELINES:
                agent.config = replace(config, baseline=baseline, discount_gradient=discount)
                agent.average = averages[discount] if baseline == "average" else torch.zeros(())
                loss, _ = agent.loss(rollout)
                if baseline == "average":
                    averages[discount] = agent.average
                (gradient,) = torch.autograd.grad(loss, [agent.network.policy_head.weight])
                estimates.setdefault((baseline, discount), []).append(-gradient.T.numpy())
    exact = {d: policy_gradient(mdp, theta, gamma, discount_states=d) for d in (True, False)}
    return {key: np.stack(each) for key, each in estimates.items()}, exact


@pytest.mark.parametrize("discount", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
def test_gradient_is_the_exact_one(gradients, baseline, discount):
    """Every component within 4 standard errors, and all of them together as often off as errors are."""
    estimates, exact = gradients[0][baseline, discount], gradients[1][discount]
    spread = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    seen = spread > 0  # no action is taken where episodes are over
    assert seen.sum() == 12
    np.testing.assert_allclose(estimates.mean(0)[~seen], exact[~seen], atol=1e-7)
    scores = (estimates.mean(0) - exact)[seen] / spread[seen]
    assert np.abs(scores).max() < 4
    assert 0.2 < np.sqrt((scores**2).mean()) < 2
    # The estimate is good enough to tell a wrong gradient: it is known to about a tenth of its length.
    assert np.linalg.norm(spread) < 0.15 * np.linalg.norm(exact)
    assert np.linalg.norm(estimates.mean(0) - exact) < 0.2 * np.linalg.norm(exact)


@pytest.mark.parametrize("discount", [True, False])
def test_each_baseline_lowers_the_variance(gradients, discount):
    variance = {name: gradients[0][name, discount].var(0, ddof=1).sum() for name in BASELINES}
    assert variance["average"] < 0.4 * variance["none"]
    assert variance["value"] < 0.4 * variance["none"]


def test_the_two_weightings_differ(gradients):
    """Or the first test could not tell them apart."""
    exact = gradients[1]
    assert np.linalg.norm(exact[True] - exact[False]) > 0.3 * np.linalg.norm(exact[True])


def test_loss_by_hand():
    """Two episodes, of two steps and of one, with probabilities 0.8 of action 0 throughout."""
    params = torch.tensor([0.8, 0.2]).log().expand(2, 2, 2)
    loss, losses = reinforce_loss(
        make_distribution(spaces.Discrete(2)),
        params=params,
        values=torch.tensor([[1.0, 2.0], [3.0, 9.0]]),
        actions=torch.tensor([[0, 1], [1, 0]]),
        returns=torch.tensor([[2.0, 5.0], [1.0, 9.9]]),
        baseline=torch.tensor([[1.0, 1.0], [1.0, 1.0]]),
        weights=torch.tensor([[1.0, 1.0], [0.5, 0.0]]),
        config=REINFORCEConfig(entropy_coefficient=0.1, value_coefficient=0.5),
    )
    h = -0.8 * np.log(0.8) - 0.2 * np.log(0.2)
    policy_sum = -(1.0 * np.log(0.8) + 4.0 * np.log(0.2) + 0.5 * 0.0)
    value_sum = (2 - 1) ** 2 + (5 - 2) ** 2 + (1 - 3) ** 2
    expected = (policy_sum + 0.5 * value_sum - 0.1 * 3 * h) / 2  # sums over steps, means over episodes
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(losses, [policy_sum / 3, value_sum / 3, h], rtol=1e-5)  # means of steps


SCRIPT = ["..", "T.", "..", "C.", ".L", ".C", "TT"]  # environment 0 is over after 2 steps, 1 after 6


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("settings", [{}, {"recurrent": "gru", "recurrent_size": 3}])
def test_what_comes_after_the_first_episode_is_not_learned_from(baseline, settings):
    agent = scripted(SCRIPT, baseline=baseline, gamma=0.9, entropy_coefficient=0.1, **settings)
    rollout = agent.play()
    assert len(rollout.actions) == 6
    assert agent.env_step == 12, "but they are counted"
    loss, losses = agent.loss(rollout)
    agent.average = torch.zeros(())
    changed = rollout._replace(
        rewards=torch.where(torch.arange(6)[:, None] < torch.tensor([2, 6]), rollout.rewards, 1e3),
        obs=torch.where(
            torch.arange(7)[:, None, None] < torch.tensor([2, 7])[:, None], rollout.obs, 7 * torch.ones(3)
        ),
        actions=torch.where(torch.arange(6)[:, None] < torch.tensor([2, 6]), rollout.actions, 1),
    )
    assert not torch.equal(changed.rewards, rollout.rewards)
    other_loss, other_losses = agent.loss(changed)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_losses, losses)
    # while a change within it matters
    agent.average = torch.zeros(())
    within = rollout._replace(rewards=rollout.rewards + torch.eye(6, 2).roll(1, 0))
    assert agent.loss(within)[0] != loss


@pytest.mark.parametrize("baseline", BASELINES)
def test_returns_of_episodes_that_were_cut_off(baseline):
    """A learned value completes them; without one they end with their last reward."""
    agent = scripted(["..", "CT"], baseline=baseline, gamma=0.5, discount_gradient=True)
    with torch.no_grad():
        agent.network.value_head.bias.fill_(3.0)
        agent.network.value_head.weight.zero_()
    agent.average, agent.grad_step = torch.tensor(2.0 if baseline == "average" else 0.0), 1
    rollout = agent.play()
    r = rollout.rewards
    loss, _ = agent.loss(rollout)
    bootstrap = 3.0 if baseline == "value" else 0.0
    returns = torch.stack([r[0] + 0.5 * (r[1] + torch.tensor([0.5 * bootstrap, 0.0])), r[1]])
    returns[1, 0] += 0.5 * bootstrap
    params = agent.network(rollout.obs, rollout.state, rollout.starts)[0][:-1]
    log_p = params.log_softmax(-1).gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
    b = {"none": 0.0, "average": 2.0, "value": 3.0}[baseline]
    expected = -(torch.tensor([[1.0], [0.5]]) * (returns - b) * log_p).sum() / 2
    if baseline == "value":
        expected = expected + 0.5 * (returns - 3.0).square().sum() / 2
    torch.testing.assert_close(loss, expected)
    if baseline == "average":
        assert agent.average == pytest.approx(0.9 * 2.0 + 0.1 * returns.mean().item(), rel=1e-5)


def test_the_average_begins_with_the_first_returns():
    env = make_vec("toys/Signs-v0", num_envs=4, seed=1)
    config = REINFORCEConfig(baseline="average", gamma=0.9, average_decay=0.75)
    agent: Any = REINFORCE(env, config, seed=1, device="cpu")
    expected = 0.0
    for update in range(3):
        rollout = agent.play()
        first = (rollout.starts[1:].cumsum(0) - rollout.starts[1:].long()) == 0
        returns = []
        for n in range(4):
            after = 0.0
            for t in reversed(range(int(first[:, n].sum()))):
                after = rollout.rewards[t, n].item() + 0.9 * after
                returns.append(after)
        expected = np.mean(returns) if update == 0 else 0.75 * expected + 0.25 * np.mean(returns)
        agent.update(rollout, 0.01)
        assert agent.average.item() == pytest.approx(expected, rel=1e-5)


def test_episodes_begin_together_and_each_update_plays_anew():
    env = make_vec("toys/Signs-v0", num_envs=4, seed=1, env_kwargs={"lengths": [2, 5]})
    agent: Any = REINFORCE(env, REINFORCEConfig(recurrent="lstm", recurrent_size=3), seed=1, device="cpu")
    agent.start()
    for _ in range(5):
        rollout = agent.play()
        assert rollout.starts[0].all()
        ends = rollout.starts[1:].long()
        assert ends.sum(0).min() == 1
        assert ends[-1].any(), "it stops as soon as all have ended once"
        assert (ends[:-1].sum(0) == 0).any()


def test_updates_are_adam_on_the_clipped_gradient():
    env = make_vec("toys/Signs-v0", num_envs=4, seed=1)
    agent: Any = REINFORCE(env, REINFORCEConfig(max_grad_norm=0.5, gamma=0.9), seed=1, device="cpu")
    plain = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(plain.network.parameters(), lr=0.01)
    for _ in range(3):
        rollout = agent.play()
        agent.update(rollout, 0.01)
        optimizer.zero_grad()
        plain.loss(rollout)[0].backward()
        assert torch.nn.utils.clip_grad_norm_(plain.network.parameters(), 0.5) > 0.5
        optimizer.step()
    assert agent.grad_step == 3
    for one, two in zip(agent.network.parameters(), plain.network.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", ["none", "average"])
def test_without_a_learned_baseline_no_value_is_learned(baseline):
    env = make_vec("toys/Signs-v0", num_envs=4, seed=1)
    agent: Any = REINFORCE(env, REINFORCEConfig(baseline=baseline), seed=1, device="cpu")
    before = agent.network.value_head.weight.clone()
    agent.learn(100, progress=False)
    assert torch.equal(before, agent.network.value_head.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": "mean"}, "baseline must be none, average or value, got 'mean'"),
        ({"average_decay": 1.0}, "average_decay must be at least 0 and less than 1, got 1.0"),
        ({"adam_eps": 0.0}, "adam_eps must be greater than 0, got 0.0"),
        ({"gamma": -0.1}, "gamma must be between 0 and 1, got -0.1"),
    ],
)
def test_settings_that_are_not_taken(settings, message):
    with pytest.raises(ValueError, match=message):
        REINFORCEConfig(**settings)
