"""ALE's vector environment, frame for frame against one game alone, life losses and true scores included."""

import functools
import itertools

import numpy as np
import pytest
from gymnasium import spaces
from vector_runs import assert_as_expected, assert_resumes, draw_actions, record, same, seed_of

from foveal.envs import make_vec

pytest.importorskip("ale_py")

SMALL = {"img_height": 20, "img_width": 20}  # speeds the comparison up


@functools.cache
def alone(game, seed, num_envs, steps, training=True, **kwargs):
    """Per environment a list of transitions, from a vector of one that is made anew for every episode.

    Life losses as ALE itself reports them; in training the rewards are the signs.
    """
    from ale_py.vector_env import AtariVectorEnv

    actions = draw_actions(make_vec("ALE/Breakout-v5", num_envs), steps)
    kwargs = {"repeat_action_probability": 0.25, "num_threads": 1, **kwargs}
    runs = []
    for i in range(num_envs):
        episode, run, env, total, length = -1, [], None, 0.0, 0
        for action in actions[:, i]:
            if env is None:
                episode += 1
                env = AtariVectorEnv(game, 1, reward_clipping=False, life_loss_info=training, **kwargs)
                obs = env.reset(seed=np.array([seed_of(seed, training, i, episode)]))[0][0]
            next_obs, reward, terminated, truncated, infos = env.step(np.array([action]))
            total, length = total + float(reward[0]), length + 1
            over = bool(truncated[0] or (terminated[0] and infos["lives"][0] == 0))
            ended = (i, total, length) if over else None
            learned = np.sign(reward[0]) if training else reward[0]
            run.append(
                [obs, next_obs[0], next_obs[0], learned, bool(terminated[0]), bool(truncated[0]), ended]
            )
            obs = next_obs[0]
            if over:
                env, total, length = None, 0.0, 0
        runs.append(run)
        for now, following in itertools.pairwise(run):  # act next on what the next transition begins with
            now[2] = following[0]
    for run in runs:
        run.pop()
    return runs


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("training", [True, False])
def test_breakout_is_the_game_alone(mode, training):
    env = make_vec("ALE/Breakout-v5", 2, 5, autoreset_mode=mode, training=training, env_kwargs=SMALL)
    actions = draw_actions(env, 320)
    steps = record(env, actions)
    assert_as_expected(steps[:-1], alone("breakout", 5, 2, 320, training, **SMALL))
    losses = [step for step in steps[1:] if (step.terminated & ~step.reset).any()]
    games = [episode for step in steps[1:] for episode in step.episodes]
    assert len(losses) >= 8 if training else not losses
    assert len(games) >= 2
    if mode == "NextStep" and training:  # the standard picture, once
        full = make_vec("ALE/Breakout-v5", 1, 5)
        assert full.reset().shape == (1, 4, 84, 84)


def test_a_game_that_plays_on_with_no_life_left_is_not_over():
    env = make_vec("ALE/Frogger-v5", 1, 3, env_kwargs=SMALL)
    steps = record(env, (np.arange(300) % 4)[:, None])
    ends = [(bool(step.terminated[0]), bool(step.reset[0])) for step in steps[1:]]
    assert ends.count((True, False)) == 3  # of four lives, the last ends with the game
    assert ends.count((True, True)) == 1
    assert ends.index((True, True)) > max(i for i, end in enumerate(ends) if end == (True, False)) + 40


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("frameskip", [4, 3])
def test_a_step_limit_counts_agent_steps(mode, frameskip):
    kwargs = {**SMALL, "frameskip": frameskip}
    env = make_vec("ALE/Breakout-v5", 2, 8, autoreset_mode=mode, max_episode_steps=35, env_kwargs=kwargs)
    actions = draw_actions(env, 80)
    steps = record(env, actions)
    runs = alone("breakout", 8, 2, 80, max_num_frames_per_episode=35 * frameskip, **kwargs)
    assert_as_expected(steps[:-1], runs)
    episodes = [episode for step in steps[1:] for episode in step.episodes]
    assert [episode.length for episode in episodes] == [35] * 4
    assert all((step.truncated == step.reset).all() for step in steps[1:])


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_life_lost_at_the_step_limit_is_a_truncation(mode):
    kwargs = {**SMALL, "frameskip": 3}
    env = make_vec("ALE/Breakout-v5", 2, 6, autoreset_mode=mode, max_episode_steps=35, env_kwargs=kwargs)
    step = record(env, draw_actions(env, 105))[-1]  # ALE's own life_loss_info would hide the truncation
    assert step.truncated.tolist() == step.reset.tolist() == [True, True]
    assert step.terminated.tolist() == [False, False]


def test_every_mode_gives_the_same_standard_transitions():
    runs = []
    for mode, training in (("NextStep", True), ("SameStep", True)):
        env = make_vec("ALE/Breakout-v5", 2, 1, autoreset_mode=mode, training=training)
        runs.append(record(env, draw_actions(env, 200)))
    assert same(*runs)
    obs = runs[0][0]
    assert not obs[:, :3].any()  # the first stack is three empty frames and one real
    for step in runs[0][1:]:
        np.testing.assert_array_equal(step.next_obs[:, :3], obs[:, 1:])  # the stack shifts, life lost or not
        obs = step.obs


def test_learning_sees_signs_and_episodes_keep_the_score():
    actions = None
    scores, rewards = [], []
    for env_kwargs in ({}, {"reward_clipping": False}):
        env = make_vec(
            "ALE/SpaceInvaders-v5", 1, 2, env_kwargs={**SMALL, **env_kwargs}, max_episode_steps=200
        )
        actions = draw_actions(env, 200) if actions is None else actions
        steps = record(env, actions)
        rewards.append(np.concatenate([step.rewards for step in steps[1:]]))
        scores.append(steps[-1].episodes[0].episode_return)
    clipped, true = rewards
    np.testing.assert_array_equal(clipped, np.sign(true))
    assert true.max() > 1
    assert scores == [true.sum()] * 2


def test_life_losses_can_be_switched_off_in_training():
    env = make_vec("ALE/Breakout-v5", 1, 5, env_kwargs={**SMALL, "life_loss_info": False})
    steps = record(env, draw_actions(env, 300))
    assert all((step.terminated == step.reset).all() for step in steps[1:])


def test_full_actions_and_frame_stack():
    env = make_vec("ALE/Pong-v5", env_kwargs={**SMALL, "full_action_space": True, "stack_num": 2})
    assert env.single_action_space == spaces.Discrete(18)
    assert env.frame_stack == 2
    assert env.reset().shape == (1, 2, 20, 20)
    assert make_vec("ALE/Pong-v5").frame_stack == 4


def test_arrays_handed_out_are_not_overwritten():
    env = make_vec("ALE/Breakout-v5", 2, env_kwargs=SMALL)
    kept = []
    for item in record(env, draw_actions(env, 200)):
        arrays = [item] if isinstance(item, np.ndarray) else [x for x in item if isinstance(x, np.ndarray)]
        kept += [(array, array.copy()) for array in arrays]
    assert all(np.array_equal(array, copy) for array, copy in kept)


@pytest.mark.parametrize(
    ("env_id", "num_envs", "before"),
    [("ALE/Pong-v5", 2, 60), ("ALE/Breakout-v5", 3, 45), ("ALE/Breakout-v5", 2, 300)],
)
def test_resumes_exactly(env_id, num_envs, before):
    assert_resumes(env_id, {"num_envs": num_envs}, before, after=100)


def test_the_picture_follows_the_game():
    env = make_vec("ALE/Breakout-v5", 2, 1, render_mode="rgb_array")
    plain = make_vec("ALE/Breakout-v5", 2, 1)
    actions = draw_actions(env, 60)
    obs = env.reset()
    assert same(obs, plain.reset())
    for action in actions:
        step = env.step(action)
        assert same(step, plain.step(action))
        frame = env.render()
        assert frame.shape == (210, 160, 3)
        assert frame.dtype == np.uint8
        # the agent's newest frame is this picture, grey and smaller: bright and dark rows agree
        small = frame.mean(-1).reshape(42, 5, 160).mean((1, 2))
        grey = step.obs[0, -1].reshape(42, 2, 84).mean((1, 2))
        assert np.corrcoef(small, grey)[0, 1] > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "ALE/Pogn-v5"}, "did you mean ALE/Pong-v5"),
        ({"env_id": "pong"}, "did you mean ALE/Pong-v5"),
        ({"backend": "sync"}, "backend: ALE/Pong-v5 has only ALE's own .* got 'sync'"),
        ({"autoreset_mode": "Disabled"}, "NextStep and SameStep, got 'Disabled'"),
        ({"env_kwargs": {"episodic_life": True}}, "does not take episodic_life; it takes .*frameskip"),
        ({"env_kwargs": {"frameskip": 0}}, "env_kwargs .*frameskip"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vec(**{"env_id": "ALE/Pong-v5", **arguments})
