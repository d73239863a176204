"""A2C and PPO beside Stable-Baselines3's: from the same weights and transitions the same updates."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from foveal.agents import A2C, PPO
from foveal.agents.on_policy import Rollout
from foveal.agents.sb3 import SB3A2C, SB3PPO
from foveal.agents.sb3_settings import A2CConfig, PPOConfig
from foveal.envs import make_vec

LENGTH = 12  # steps after which an episode is truncated; CartPole often terminates before
SHARED: dict[str, Any] = {"num_envs": 4, "gamma": 0.97, "learning_rate": 1e-3, "max_grad_norm": 0.3}


def copy_weights(theirs: Any, network: Any) -> None:
    """Their policy's weights into a network of ours, whose layers come in another order."""
    policy = theirs.model.policy
    linears = [m for m in network.encoder.modules() if isinstance(m, torch.nn.Linear)]
    linears += [m for m in network.value_encoder.modules() if isinstance(m, torch.nn.Linear)]
    extractor = policy.mlp_extractor
    others = [m for part in (extractor.policy_net, extractor.value_net) for m in part]
    others = [m for m in others if isinstance(m, torch.nn.Linear)] + [policy.action_net, policy.value_net]
    with torch.no_grad():
        for mine, other in zip([*linears, network.policy_head, network.value_head], others, strict=True):
            mine.weight.copy_(other.weight)
            mine.bias.copy_(other.bias)
        if network.log_std is not None:
            network.log_std.copy_(policy.log_std)


def rollouts(theirs: Any, ours: Any, updates: int) -> Iterator[Rollout]:
    """Rollouts of theirs, as ours has them, for both to learn from before the next; ours begins with their
    weights. In the end their weights are ours up to rounding, and both have moved by far more than that."""
    model, env, buffer = theirs.model, theirs.env, theirs.model.rollout_buffer
    theirs.start()
    _, callback = model._setup_learn(10**6)
    copy_weights(theirs, ours.network)
    initial = ours.weights.detach().clone()
    steps: list[Any] = []
    step = env.step

    def stepped(actions: np.ndarray) -> Any:
        result = step(actions)
        steps.append(copy.deepcopy(result))  # they add to the rewards in place
        return result

    env.step = stepped
    terminations = truncations = 0
    for _ in range(updates):
        steps.clear()
        starts = [model._last_episode_starts.astype(bool)]
        model.collect_rollouts(model.env, callback, buffer, n_rollout_steps=model.n_steps)
        rewards, terminated, truncated = (
            np.stack([getattr(one, name) for one in steps]) for name in ("rewards", "terminated", "truncated")
        )
        ends = np.stack(np.nonzero(truncated))
        final = [steps[t].next_obs[n] for t, n in ends.T]
        at = torch.from_numpy(ends)
        actions = torch.from_numpy(buffer.actions.copy())
        yield Rollout(
            obs=torch.from_numpy(np.concatenate([buffer.observations, model._last_obs[None]])),
            state=torch.zeros(buffer.n_envs, 0),
            starts=torch.from_numpy(np.array(starts + [one.reset for one in steps])),
            actions=actions if isinstance(env.single_action_space, spaces.Box) else actions[..., 0].long(),
            rewards=torch.from_numpy(rewards),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
            final=(at[0], at[1], torch.from_numpy(np.stack(final))) if final else None,
        )
        terminations, truncations = terminations + terminated.sum(), truncations + truncated.sum()
    expected = copy.deepcopy(ours.network)
    copy_weights(theirs, expected)
    for name, weights in ours.network.named_parameters():
        torch.testing.assert_close(weights, expected.get_parameter(name), rtol=0, atol=2e-5, msg=name)
    assert (ours.weights - initial).abs().max() > 1e-3
    assert truncations, "episodes cut by the limit"
    assert terminations or env.env_id == "Pendulum-v1", "episodes ended before it"


CASES = pytest.mark.parametrize("closed_form", [True, False])
ENVS = pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])


@CASES
@pytest.mark.parametrize("optimizer", ["rmsprop", "rmsprop-tf", "adam"])
@ENVS
def test_a2c(env_id, optimizer, closed_form):
    kind: Any = {"use_rms_prop": optimizer != "adam", "rms_prop_tf": optimizer == "rmsprop-tf"}
    env = make_vec(env_id, 4, seed=5, max_episode_steps=LENGTH)
    theirs = SB3A2C(env, A2CConfig(**SHARED, ent_coef=0.01, vf_coef=0.4, **kind), seed=5, device="cpu")
    config = A2C.Config(**SHARED, entropy_coefficient=0.01, value_coefficient=0.4, optimizer=optimizer)
    ours: Any = A2C(env_id, config, device="cpu")
    if not closed_form:
        ours.learner = None
    # RMSprop divides what rounding leaves of a gradient by its own size: hence few updates.
    for rollout in rollouts(theirs, ours, 12):
        theirs.model.train()
        ours.update(rollout, config.learning_rate)


@CASES
@ENVS
def test_ppo(env_id, closed_form):
    """With the whole rollout in one minibatch, whose order is drawn in another way on either side."""
    steps, clip = 16, 0.02
    both: dict[str, Any] = {**SHARED, "gae_lambda": 0.9}
    theirs_alone: dict[str, Any] = {"n_steps": steps, "batch_size": 4 * steps, "n_epochs": 5}
    settings = PPOConfig(
        **both, **theirs_alone, clip_range=clip, ent_coef=0.01, vf_coef=0.4, log_std_init=-1.0
    )
    env = make_vec(env_id, 4, seed=5, max_episode_steps=LENGTH)
    theirs = SB3PPO(env, settings, seed=5, device="cpu")
    ours_alone: dict[str, Any] = {"num_steps": steps, "minibatch_size": 4 * steps, "epochs": 5}
    config = PPO.Config(**both, **ours_alone, clip=clip, entropy_coefficient=0.01, value_coefficient=0.4)
    ours: Any = PPO(env_id, config, device="cpu")
    if not closed_form:
        ours.learner = None
    clipped = 0.0
    for rollout in rollouts(theirs, ours, 5):
        theirs.model.train()
        losses, _ = ours.update(ours.advantages(rollout), config.learning_rate, clip)
        clipped = max(clipped, losses[4].item())
    assert clipped > 0, "ratios beyond the clip"
