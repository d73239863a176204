"""Runs of vector environments, and the same runs from single environments to compare them with."""

import json

import numpy as np
from gymnasium import spaces
from safetensors.numpy import load, save

from foveal.envs import make_vec


def seed_of(seed, training, env, episode):
    key = (0 if training else 1, env, episode)
    return int(np.random.SeedSequence(entropy=seed, spawn_key=key).generate_state(1)[0]) >> 1


def draw_actions(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    space = env.single_action_space
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.n, size=(steps, env.num_envs))
    return rng.uniform(space.low, space.high, size=(steps, env.num_envs, *space.shape)).astype(space.dtype)


def record(env, actions, start=True):
    """Everything that a run gives: first observations and every Step."""
    return [env.reset() if start else None, *[env.step(action) for action in actions]]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def expected(make_one, seed, num_envs, actions, training=True):
    """The same run from single environments, a fresh one for every episode: a list of transitions each."""
    runs = []
    for i in range(num_envs):
        episode, env, run = 0, make_one(), []
        obs = env.reset(seed=seed_of(seed, training, i, episode))[0]
        total, length = 0.0, 0
        for action in actions[:, i]:
            next_obs, reward, terminated, truncated, _ = env.step(action)
            total, length = total + reward, length + 1
            after, ended = next_obs, None
            if terminated or truncated:
                ended = (i, total, length)
                episode, env, total, length = episode + 1, make_one(), 0.0, 0
                after = env.reset(seed=seed_of(seed, training, i, episode))[0]
            run.append((obs, next_obs, after, reward, terminated, truncated, ended))
            obs = after
        runs.append(run)
    return runs


def assert_as_expected(steps, runs):
    obs = steps[0]
    for t, step in enumerate(steps[1:]):
        for i, run in enumerate(runs):
            before, next_obs, after, reward, terminated, truncated, ended = run[t]
            np.testing.assert_array_equal(obs[i], before)
            np.testing.assert_array_equal(step.next_obs[i], next_obs)
            np.testing.assert_array_equal(step.obs[i], after)
            assert step.rewards[i] == np.float32(reward)
            assert (step.terminated[i], step.truncated[i]) == (terminated, truncated)
            assert step.reset[i] == (ended is not None)
        assert [tuple(e) for e in step.episodes] == [run[t][-1] for run in runs if run[t][-1]]
        assert step.rewards.dtype == np.float32
        assert step.terminated.dtype == step.truncated.dtype == step.reset.dtype == np.bool_
        obs = step.obs


def round_trip(state):
    """Through the formats of a checkpoint."""
    tensors, meta = state
    return load(save(tensors)), json.loads(json.dumps(meta))


def assert_resumes(env_id, kwargs, before, after):
    env = make_vec(env_id, seed=11, **kwargs)
    actions = draw_actions(env, before + after)
    steps = record(env, actions[:before])
    state = round_trip(env.state())
    rest = record(env, actions[before:], start=False)
    final = env.state()
    env.close()
    other = make_vec(**json.loads(json.dumps(env.spec_dict())))
    obs, exact = other.restore(*state)
    assert exact
    assert same(obs, steps[-1].obs if before else steps[0])
    assert same(record(other, actions[before:], start=False), rest)
    assert same(other.state(), final)
    other.close()
