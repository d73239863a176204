"""True transitions whatever the autoreset mode, exact replay, and errors that say what to do."""

import importlib.util
import multiprocessing
import os
import signal
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from vector_runs import assert_as_expected, assert_resumes, draw_actions, expected, record, round_trip, same

from foveal.envs import find_spec, list_env_ids, make, make_vec
from foveal.envs.registry import image_view

MODES = ["Disabled", "NextStep", "SameStep"]
needs_box2d = pytest.mark.skipif(importlib.util.find_spec("Box2D") is None, reason="needs the box2d extra")
GYMNASIUM = [(backend, mode) for backend in ("sync", "async") for mode in MODES]


class Counting(gym.Env):
    """Counts steps. The seed draws the episode's length from `lengths` and whether it ends by truncation."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, lengths=(1, 2, 5), truncate=0.5, as_dict=False, forgets=False, render_mode=None):
        self.lengths, self.truncate, self.as_dict, self.forgets = lengths, truncate, as_dict, forgets
        self.action_space = spaces.Discrete(3)
        self.observation_space = spaces.Box(-1, 1000, (4,), np.float32)
        if as_dict:
            image = spaces.Box(0, 255, (6, 5, 3), np.uint8)
            self.observation_space = spaces.Dict({"count": self.observation_space, "image": image})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = self.np_random.choice(self.lengths)
        self.truncates = self.np_random.random() < self.truncate
        self.ident = self.np_random.integers(1000)
        self.count, self.action = 0, -1
        if self.forgets:
            self.ident = np.random.default_rng().integers(1000)  # a state that the seed does not reach
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        self.action = action
        over = self.count >= self.length
        terminated, truncated = bool(over and not self.truncates), bool(over and self.truncates)
        return self.observe(), 10.0 * self.count + float(action), terminated, truncated, {"count": self.count}

    def observe(self):
        count = np.array([self.ident, self.count, self.action, self.length], np.float32)
        if not self.as_dict:
            return count
        return {"count": count, "image": np.full((6, 5, 3), (self.count, self.ident % 256, 7), np.uint8)}


@pytest.fixture(autouse=True, scope="module")
def counting():
    gym.register("Counting-v0", entry_point=lambda **kwargs: Counting(**kwargs))
    yield
    del gym.registry["Counting-v0"]


@pytest.mark.parametrize(("backend", "mode"), GYMNASIUM)
@pytest.mark.parametrize("lengths", [(1,), (1, 2, 5)])
def test_counting_transitions_are_those_of_single_environments(backend, mode, lengths):
    kwargs = {"lengths": lengths}
    env = make_vec("Counting-v0", 3, 7, backend=backend, autoreset_mode=mode, env_kwargs=kwargs)
    actions = draw_actions(env, 60)
    steps = record(env, actions)
    env.close()
    runs = expected(lambda: Counting(**kwargs), 7, 3, actions)
    assert_as_expected(steps, runs)
    ends = [step for step in steps[1:] if step.reset.any()]
    assert any(step.terminated.any() for step in ends)
    assert any(step.truncated.any() for step in ends)


@pytest.mark.parametrize(("backend", "mode"), [*GYMNASIUM, ("native", None), ("native", "NextStep")])
def test_cartpole_transitions_are_those_of_single_environments(backend, mode):
    env = make_vec("CartPole-v1", 4, 3, backend=backend, autoreset_mode=mode, max_episode_steps=15)
    actions = draw_actions(env, 120)
    actions[:, 0] = np.arange(120) % 2  # environment 0 reaches the time limit
    steps = record(env, actions)
    env.close()
    runs = expected(lambda: gym.make("CartPole-v1", max_episode_steps=15), 3, 4, actions)
    assert_as_expected(steps, runs)
    assert any(step.terminated.any() for step in steps[1:])
    assert any(step.truncated.any() for step in steps[1:])


def test_native_cartpole_agrees_with_sync_in_full_episodes_and_with_its_own_reward():
    kwargs: dict[str, Any] = {"env_kwargs": {"sutton_barto_reward": True}}
    runs = []
    for backend in ("native", "sync"):
        env = make_vec("CartPole-v0", 5, backend=backend, **kwargs)
        actions = draw_actions(env, 250)
        actions[:, ::2] = (np.arange(250) % 2)[:, None]
        runs.append(record(env, actions))
    assert same(*runs)
    assert any(e.episode_return == -1 for step in runs[0][1:] for e in step.episodes)


@pytest.mark.parametrize(("backend", "mode"), GYMNASIUM)
def test_dict_observations(backend, mode):
    kwargs = {"as_dict": True, "lengths": [2, 3]}
    env = make_vec("Counting-v0", 2, 1, backend=backend, autoreset_mode=mode, env_kwargs=kwargs)
    assert isinstance(env.single_observation_space, spaces.Dict)
    assert env.single_observation_space["image"].shape == (3, 6, 5)
    steps = record(env, draw_actions(env, 20))
    plain = make_vec("Counting-v0", 2, 1, env_kwargs={"lengths": [2, 3]})
    for step, other in zip(steps[1:], record(plain, draw_actions(plain, 20))[1:]):
        for ours, theirs in ((step.obs, other.obs), (step.next_obs, other.next_obs)):
            np.testing.assert_array_equal(ours["count"], theirs)
            assert ours["image"].shape == (2, 3, 6, 5)
            np.testing.assert_array_equal(ours["image"][:, 0, 0, 0], theirs[:, 1])  # counts steps
            assert (ours["image"][:, 2] == 7).all()
    tensors, meta = env.state()
    other = make_vec(**env.spec_dict())
    obs, exact = other.restore(tensors, meta)
    assert exact
    assert same(obs, steps[-1].obs)
    env.close()
    other.close()


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("CartPole-v1", {"backend": "sync"}),
        ("CartPole-v1", {"backend": "async"}),
        ("CartPole-v1", {"backend": "native"}),
        ("Counting-v0", {"autoreset_mode": "SameStep"}),
    ],
)
def test_arrays_handed_out_are_not_overwritten(env_id, kwargs):
    env = make_vec(env_id, 2, **kwargs)
    kept = []
    for item in record(env, draw_actions(env, 60)):
        arrays = [item] if isinstance(item, np.ndarray) else [x for x in item if isinstance(x, np.ndarray)]
        kept += [(array, array.copy()) for array in arrays]
    env.close()
    assert all(np.array_equal(array, copy) for array, copy in kept)


def test_obs_and_next_obs_are_one_array_where_nothing_ended():
    env = make_vec("Counting-v0", 2, env_kwargs={"lengths": [3]})
    env.reset()
    steps = [env.step(np.zeros(2, int)) for _ in range(3)]
    assert [step.obs is step.next_obs for step in steps] == [True, True, False]


def test_evaluation_has_its_own_seeds_and_a_step_limit(monkeypatch):
    monkeypatch.setattr(make, "EVALUATION_STEP_LIMIT", 4)
    kwargs: dict[str, Any] = {"env_kwargs": {"lengths": [9], "truncate": 0.0}}
    training = make_vec("Counting-v0", 1, 5, **kwargs)
    evaluation = make_vec("Counting-v0", 1, 5, training=False, **kwargs)
    longer = make_vec("Counting-v0", 1, 5, training=False, max_episode_steps=6, **kwargs)
    assert training.reset()[0, 0] != evaluation.reset()[0, 0]
    longer.reset()
    lengths = {}
    for name, env in (("training", training), ("evaluation", evaluation), ("longer", longer)):
        steps = [env.step(np.zeros(1, int)) for _ in range(9)]
        lengths[name] = [(e.length, bool(s.truncated[0])) for s in steps for e in s.episodes]
    assert lengths == {
        "training": [(9, False)],
        "evaluation": [(4, True), (4, True)],
        "longer": [(6, True)],
    }
    assert make_vec("CartPole-v1", training=False).spec_dict()["max_episode_steps"] is None


def test_reset_goes_on_to_new_episodes():
    env = make_vec("Counting-v0", 1, 5)
    first = [env.reset()[0, 0] for _ in range(4)]
    env = make_vec("Counting-v0", 1, 5)
    assert [env.reset()[0, 0] for _ in range(4)] == first
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("CartPole-v1", {"num_envs": 3, "backend": "sync"}),
        ("CartPole-v1", {"num_envs": 2, "backend": "sync", "autoreset_mode": "SameStep"}),
        ("CartPole-v1", {"num_envs": 2, "backend": "async", "autoreset_mode": "NextStep"}),
        ("CartPole-v1", {"num_envs": 3, "backend": "async"}),
        ("CartPole-v1", {"num_envs": 5, "backend": "native"}),
        ("Counting-v0", {"num_envs": 3}),
        ("Counting-v0", {"num_envs": 2, "env_kwargs": {"lengths": [1]}}),
        ("Pendulum-v1", {"num_envs": 2}),
        pytest.param("LunarLander-v3", {"num_envs": 2}, marks=needs_box2d),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 47])
def test_a_restored_environment_goes_on_as_if_never_stopped(env_id, kwargs, before):
    assert_resumes(env_id, kwargs, before, after=40)


def test_an_environment_that_does_not_replay_starts_a_new_episode():
    kwargs: dict[str, Any] = {"env_kwargs": {"lengths": [30], "forgets": True}}
    env = make_vec("Counting-v0", 2, **kwargs)
    record(env, draw_actions(env, 10))
    tensors, meta = round_trip(env.state())
    other = make_vec("Counting-v0", 2, **kwargs)
    obs, exact = other.restore(tensors, meta)
    assert not exact
    assert (obs[:, 1] == 0).all()  # at the start of an episode
    again = other.state()[0]
    np.testing.assert_array_equal(again["episode"], tensors["episode"] + 1)
    assert again["lengths"].tolist() == [0, 0]
    assert again["returns"].tolist() == [0, 0]
    steps = [other.step(np.zeros(2, int)) for _ in range(30)]
    assert [e.length for step in steps for e in step.episodes] == [30, 30]


def test_only_those_that_do_not_replay_start_anew():
    env = make_vec("Counting-v0", 3, env_kwargs={"lengths": [30]})
    steps = record(env, draw_actions(env, 10))
    tensors, meta = round_trip(env.state())
    meta["digests"][1] = "another"
    other = make_vec("Counting-v0", 3, env_kwargs={"lengths": [30]})
    obs, exact = other.restore(tensors, meta)
    assert not exact
    np.testing.assert_array_equal(obs[[0, 2]], steps[-1].obs[[0, 2]])
    assert obs[1, 1] == 0
    assert other.state()[0]["lengths"].tolist() == [10, 0, 10]


def test_a_state_of_another_shape_is_refused():
    env = make_vec("Counting-v0", 3)
    record(env, draw_actions(env, 5))
    with pytest.raises(ValueError, match="num_envs=2"):
        make_vec("Counting-v0", 2).restore(*env.state())


def test_the_action_log_holds_the_running_episodes_only():
    env = make_vec("Counting-v0", 2, env_kwargs={"lengths": [1, 40, 90]})
    env.reset()
    largest = 0
    for action in draw_actions(env, 3000):
        env.step(action)
        largest = max(largest, len(env._actions))
    assert largest <= 180
    tensors, _ = env.state()
    assert len(tensors["actions"]) == tensors["lengths"].max()


def test_images_become_channels_first_uint8():
    pixels = spaces.Box(0, 255, (96, 90, 3), np.uint8)
    space, convert = image_view(pixels)
    image = pixels.sample()
    assert space == spaces.Box(0, 255, (3, 96, 90), np.uint8)
    assert convert is not None
    np.testing.assert_array_equal(convert(image)[1], image[:, :, 1])
    assert image_view(space) == (space, None)
    planes = spaces.Box(0, 1, (10, 10, 10), np.bool_)  # type: ignore[arg-type]
    space, convert = image_view(planes)
    assert space == spaces.Box(0, 1, (10, 10, 10), np.uint8)
    board = planes.sample()
    assert convert is not None
    np.testing.assert_array_equal(convert(board)[4], board[:, :, 4])
    assert image_view(spaces.Box(0, 255, (128,), np.uint8))[1] is None
    floats = spaces.Box(-1, 1, (8, 9, 3), np.float32)
    space, convert = image_view(floats)
    assert space == spaces.Box(-1, 1, (3, 8, 9), np.float32)
    assert convert is not None
    np.testing.assert_array_equal(convert(obs := floats.sample()), obs.transpose(2, 0, 1))
    assert image_view(space) == (space, None)


def test_actions_are_converted_and_checked():
    env = make_vec("Pendulum-v1", 2)
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(np.zeros((2, 1)))
    env.reset()
    env.step(np.array([[0.1], [0.2]]))
    assert env.state()[0]["actions"].dtype == np.float32
    with pytest.raises(ValueError, match=r"\(2, 1\), got \(2,\)"):
        env.step(np.zeros(2))


def test_ctrl_c_does_not_stop_the_workers():
    env = make_vec("CartPole-v1", 2, backend="async")
    env.reset()
    for process in multiprocessing.active_children():
        os.kill(process.pid or 0, signal.SIGINT)
    for _ in range(3):
        step = env.step(np.zeros(2, int))
    assert step.rewards.tolist() == [1, 1]
    env.close()
    env.close()


@pytest.mark.filterwarnings("ignore:.*render_mode")
def test_an_environment_of_the_users_own_module(tmp_path, monkeypatch):
    (tmp_path / "my_foveal_env.py").write_text(
        "import gymnasium as gym, numpy as np\n"
        "class Mine(gym.Env):\n"
        "    observation_space = gym.spaces.Box(0, 9, (1,))\n"
        "    action_space = gym.spaces.Discrete(2)\n"
        "    def reset(self, seed=None, options=None):\n"
        "        self.n = 0\n"
        "        return np.zeros(1, np.float32), {}\n"
        "    def step(self, action):\n"
        "        self.n += 1\n"
        "        if self.n == 4: raise ZeroDivisionError('mine')\n"
        "        return np.full(1, self.n, np.float32), 1.0, False, False, {}\n"
        "gym.register('Mine-v0', entry_point='my_foveal_env:Mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = make_vec("my_foveal_env:Mine-v0", 2, backend="async")
    env.reset()
    assert env.step(np.array([0, 1])).obs.tolist() == [[1], [1]]
    env.close()
    env = make_vec("my_foveal_env:Mine-v0")
    env.reset()
    for _ in range(3):
        env.step(np.array([0]))
    with pytest.raises(ZeroDivisionError, match="mine"):  # its own errors come through
        env.step(np.array([0]))
    with pytest.raises(ValueError, match=r"'render_mode'.*Mine-v0 refuses them"):
        make_vec("my_foveal_env:Mine-v0", render_mode="rgb_array")
    with pytest.raises(ValueError, match=r"Counting-v0.*no render_mode 'rgb_array'"):
        make_vec("Counting-v0", render_mode="rgb_array")
    (tmp_path / "my_broken_env.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"cannot import 'my_broken_env' .ZeroDivisionError"):
        make_vec("my_broken_env:Mine-v0")


def test_rendering():
    for backend in ("sync", "async"):
        env = make_vec("CartPole-v1", 2, backend=backend, render_mode="rgb_array")
        env.reset()
        assert env.render().shape == (400, 600, 3)
        env.close()
    env = make_vec("CartPole-v1", 8, render_mode="rgb_array")  # the native one cannot, so auto takes another
    env.reset()
    assert env.render().dtype == np.uint8
    with pytest.raises(RuntimeError, match="rgb_array"):
        make_vec("CartPole-v1").render()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "CartPoel-v1"}, "'CartPoel-v1'.*did you mean CartPole-v1"),
        ({"env_id": "cartpole"}, "did you mean CartPole-v1"),
        ({"env_id": "LunarLander-v2"}, "did you mean LunarLander-v3"),
        ({"env_id": "Xyzzy-v0"}, "no registered Gymnasium environment; .*list environments"),
        ({"env_id": "no_such_module:Env-v0"}, "cannot import 'no_such_module'"),
        ({"env_id": "json:Env-v0"}, "no registered"),
        ({"env_id": ""}, "env_id must be"),
        ({"env_id": "Blackjack-v1"}, "observations are Tuple"),
        ({"num_envs": 0}, "num_envs must be a positive integer, got 0"),
        ({"num_envs": -3}, "num_envs .* got -3"),
        ({"num_envs": 1.5}, "num_envs .* got 1.5"),
        ({"max_episode_steps": 0}, "max_episode_steps .* got 0"),
        ({"seed": -1}, "seed .* got -1"),
        ({"backend": "gpu"}, "backend must be one of auto, sync, async, native, got 'gpu'"),
        ({"backend": "native", "env_id": "Acrobot-v1"}, "native is for ALE"),
        ({"backend": "native", "autoreset_mode": "SameStep"}, "native is for ALE"),
        ({"autoreset_mode": "Never"}, "NextStep, SameStep, Disabled, got 'Never'"),
        ({"render_mode": "human"}, "render_mode .* got 'human'"),
        ({"env_kwargs": {"gravitas": 1}}, "env_kwargs .*CartPole-v1 refuses .*'gravitas'"),
        ({"env_kwargs": {"gravitas": 1}, "num_envs": 8}, "env_kwargs .*CartPole-v1 refuses .*'gravitas'"),
        ({"env_kwargs": {"gravitas": 1}, "backend": "async"}, "env_kwargs .*CartPole-v1 refuses"),
        ({"env_kwargs": [1]}, "env_kwargs must be a dict"),
        ({"env_kwargs": {"render_mode": "human"}}, "render_mode is an argument of its own"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_vec(**{"env_id": "CartPole-v1", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "module", "extra"),
    [
        ("ALE/Pong-v5", "ale_py", "atari"),
        ("MinAtar/Breakout-v1", "minatar", "minatar"),
        ("LunarLander-v3", "Box2D", "box2d"),
        ("Hopper-v5", "mujoco", "mujoco"),
    ],
)
def test_a_missing_extra_comes_with_the_command_that_installs_it(env_id, module, extra, monkeypatch):
    for name in list(sys.modules):
        if name.startswith((module, f"gymnasium.envs.{extra}")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    if "/" in env_id:
        monkeypatch.delitem(gym.registry, env_id, raising=False)
    with pytest.raises(ValueError, match=rf'needs the {extra} extra: pip install "foveal\[{extra}\]"'):
        make_vec(env_id)


def test_ids_are_listed_and_found():
    ids = list_env_ids()
    assert {"CartPole-v1", "Acrobot-v1", "LunarLander-v3"} <= set(ids)
    assert ids == sorted(ids)
    assert not any(env_id.startswith(("phys2d", "GymV2")) for env_id in ids)
    assert find_spec("CartPole-v1").max_episode_steps == 500
