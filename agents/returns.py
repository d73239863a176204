"""Returns: what a rollout's rewards and value estimates say each step is worth.

Pure functions over rollouts of T steps in N environments. Tensors are (T, N), or (T, N, ...) throughout;
`terminated` and `truncated` are bool. `next_values[t]` is the value of the true successor of step t: of the
final observation where an episode was truncated, else of the observation that step t + 1 acts on. Where an
episode terminated it is ignored, whatever it is. Nothing flows from one episode into another, and an episode
that a truncation or the rollout's end cuts off is completed by its value estimate.

No value is looked at from Python, and nothing is written in place, so that all of it goes through
torch.func.vmap, torch.compile and autograd.
"""

import torch
from torch import Tensor

FEW = 32
"""Steps up to which going through them one by one takes fewer operations."""


def discounted_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    """G_t = r_t + gamma G_{t+1} to the end of the episode, (T, N).

    In place of G_{t+1} stands 0 at a termination, next_values[t] at a truncation and in the last row.
    """
    one_step = _one_step(rewards, next_values, terminated, gamma)
    ended = terminated | truncated
    base = torch.where(ended, one_step, rewards)
    return _backwards(torch.cat([base[:-1], one_step[-1:]]), _decay(ended, gamma, rewards))


def n_step_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, n: int
) -> Tensor:
    """r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n next_values[t+n-1], (T, N).

    (Sutton and Barto, "Reinforcement Learning", 2018, equation 7.1.) With fewer rewards, and the value that
    follows the last of them, where the episode or the rollout ends before; no value at a termination.
    Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    if n >= len(rewards):
        return discounted_returns(rewards, next_values, terminated, truncated, gamma)
    one_step = _one_step(rewards, next_values, terminated, gamma)
    ended = terminated | truncated
    base = torch.where(ended, one_step, rewards)[:-1]
    decay = _decay(ended, gamma, rewards)[:-1]
    returns = one_step
    for _ in range(n - 1):  # an n-step return is a reward and the (n-1)-step return of the next row
        returns = torch.cat([torch.addcmul(base, decay, returns[1:]), one_step[-1:]])
    return returns


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V' - V, (T, N).

    (Schulman et al. 2015, 1506.02438, equation 16.) The sum ends with the episode and with the rollout.
    `values` are those of the observations acted on; adding them gives the lambda-returns.
    """
    delta = _one_step(rewards, next_values, terminated, gamma) - values
    return _backwards(delta, _decay(terminated | truncated, gamma * gae_lambda, rewards))


def q_lambda(
    rewards: Tensor,
    next_q_max: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    q_lambda: float,
) -> Tensor:
    """G_t = r_t + gamma ((1 - lambda) max_a Q(s_{t+1}, a) + lambda G_{t+1}), (T, N).

    PQN's targets (Gallici et al. 2024, 2407.04811): Peng's Q(lambda), which exploring actions do not cut.
    `next_q_max[t]` is max_a Q of the true successor; at a truncation and in the last row it counts in full.
    """
    one_step = _one_step(rewards, next_q_max, terminated, gamma)
    ended = terminated | truncated
    base = torch.where(ended, one_step, torch.lerp(one_step, rewards, q_lambda))
    return _backwards(torch.cat([base[:-1], one_step[-1:]]), _decay(ended, gamma * q_lambda, rewards))


def _one_step(rewards: Tensor, next_values: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """r + gamma V', without V' at a termination."""
    return rewards + gamma * next_values.masked_fill(terminated, 0.0)


def _decay(ended: Tensor, factor: float, like: Tensor) -> Tensor:
    """`factor` where the episode goes on into the next row, else 0."""
    return (~ended).to(like.dtype) * factor


def _backwards(base: Tensor, decay: Tensor) -> Tensor:
    """x_t = base_t + decay_t x_{t+1}, all rows (T, ...); the last row is its base.

    Row by row where these are few. Else by doubling (Hillis and Steele 1986): after k rounds a row holds what
    it takes from the next 2^k rows, and the decay that lies between. That is log2(T) rounds of eight
    operations instead of T of them.
    """
    if base.shape[0] <= FEW:
        rows, decays = list(base.unbind()), decay.unbind()
        for t in range(len(rows) - 2, -1, -1):
            rows[t] = torch.addcmul(rows[t], decays[t], rows[t + 1])
        return torch.stack(rows)
    x, span = base, 1
    while span < len(x):
        x = torch.cat([torch.addcmul(x[:-span], decay[: len(x) - span], x[span:]), x[-span:]])
        decay = decay[:-span] * decay[span:]
        span *= 2
    return x
