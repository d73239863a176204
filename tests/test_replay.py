"""Replay against a list of whole transitions: everything it can give must be exactly one of the last ones."""

import copy
import doctest
import json
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as to_safetensors

from foveal.agents import replay as replay_module
from foveal.agents.replay import Replay
from foveal.envs import Step

FRAME = (2,)  # [environment, number of the frame]: no two frames are equal


class World:
    """Environments whose every frame is unique, with endings of every kind, and the oracle beside them:
    `transitions` holds, per step and environment, what a replay of unlimited memory would give."""

    def __init__(self, num_envs, stack, seed, ending=0.3, zeros=False, as_dict=False):
        self.num_envs, self.stack, self.ending = num_envs, stack, ending
        self.zeros, self.as_dict = zeros, as_dict  # the first stack: ALE's zeros, or the frame repeated
        self.rng = np.random.default_rng(seed)
        self.shown = [0] * num_envs  # frames each environment has shown, those of the first stacks included
        self.oldest = [0] * num_envs  # the number of the oldest row in each environment's stack
        self.stacks = [self.first(n) for n in range(num_envs)]
        self.transitions: list = []
        self.steps = 0

    @property
    def space(self):
        shape = FRAME if self.stack == 1 else (self.stack, *FRAME)
        box = spaces.Box(0, 2**30, shape, np.int32)
        flags = (1,) if self.stack == 1 else (self.stack, 1)
        return spaces.Dict({"grid": box, "odd": spaces.Box(0, 1, flags, np.uint8)}) if self.as_dict else box

    def frame(self, env):
        self.shown[env] += 1
        return np.array([env, self.shown[env]], np.int32)

    def first(self, env):
        """The first stack of a new episode: `stack` rows of storage."""
        frame = self.frame(env)
        self.shown[env] += self.stack - 1
        self.oldest[env] = self.shown[env] - self.stack
        fill = np.zeros_like(frame) if self.zeros else frame
        return np.stack([fill] * (self.stack - 1) + [frame])

    def obs(self):
        grid = np.stack(self.stacks)
        grid = grid[:, 0] if self.stack == 1 else grid
        return {"grid": grid, "odd": (grid[..., 1:] % 2).astype(np.uint8)} if self.as_dict else grid

    def reset(self):
        self.stacks = [self.first(n) for n in range(self.num_envs)]
        return self.obs()

    def step(self):
        """Random actions, and the Step that follows them."""
        n, rng = self.num_envs, self.rng
        actions = rng.integers(5, size=n)
        ends = rng.random(n) < self.ending
        terminated = ends & (rng.random(n) < 0.6)
        truncated = ends & (~terminated | (rng.random(n) < 0.2))
        reset = truncated | (terminated & (rng.random(n) < 0.5))  # a termination without one is a life loss
        rewards = np.arange(n, dtype=np.float32) + n * self.steps  # unique, so that it tells a transition
        before, oldest = self.obs(), list(self.oldest)
        for env in range(n):
            self.stacks[env] = np.concatenate([self.stacks[env][1:], self.frame(env)[None]])
            self.oldest[env] += 1
        next_obs = self.obs()
        for env in np.flatnonzero(reset).tolist():
            self.stacks[env] = self.first(env)
        step = Step(self.obs(), next_obs, rewards, terminated, truncated, reset, [])
        self.transitions.append(
            {"oldest": oldest, "fields": (before, actions, rewards, next_obs, terminated, truncated)}
        )
        self.steps += 1
        return actions, step

    def expected(self, capacity, frame_rows):
        """The transitions a replay must hold: the last ceil(capacity / N) steps, from the first of them on
        whose oldest frame is among the last `frame_rows` of every environment."""
        last = deque(self.transitions, maxlen=-(-capacity // self.num_envs))
        while last and any(o < s - frame_rows for o, s in zip(last[0]["oldest"], self.shown)):
            last.popleft()
        return list(last)


def everything(replay):
    return replay._gather(np.arange(len(replay)))


def check(replay, world, capacity):
    expected = world.expected(capacity, replay._frame_rows)
    assert len(replay) == len(expected) * world.num_envs
    if not expected:
        return
    got = everything(replay)
    names = ("obs", "actions", "rewards", "next_obs", "terminated", "truncated")
    for number, name in enumerate(names):
        values = [transition["fields"][number] for transition in expected]
        if isinstance(values[0], dict):
            for key in values[0]:
                np.testing.assert_array_equal(got[name][key], np.concatenate([v[key] for v in values]))
        else:
            np.testing.assert_array_equal(got[name], np.concatenate(values), err_msg=name)


def staged(replay):
    """Make a replay on the CPU write as one on a GPU does."""
    for ring in replay._rings().values():
        ring.staged = ring is not replay._rows
    return replay


WORLDS = {
    "num_envs": st.integers(1, 3),
    "stack": st.integers(1, 4),
    "ending": st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    "zeros": st.booleans(),
    "as_dict": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=80, deadline=None)
@given(**WORLDS, room=st.integers(0, 40), laps=st.floats(0.2, 4), gpu=st.booleans())
def test_every_transition_equals_the_oracles(num_envs, stack, ending, zeros, as_dict, seed, room, laps, gpu):
    world = World(num_envs, stack, seed, ending, zeros, as_dict)
    capacity = num_envs + room
    replay = Replay(capacity, num_envs, world.space, spaces.Discrete(5), frame_stack=stack)
    if gpu:
        staged(replay)
    replay.reset(world.obs())
    assert len(replay) == 0
    for number in range(max(1, int(laps * capacity / num_envs))):
        if world.rng.random() < 0.02:
            replay.reset(world.reset())
        replay.add(*world.step())
        for ring in replay._rings().values():
            places = [place for places, _ in ring._pending for place in places.tolist()]
            assert len(places) == len(set(places))  # the order within one copy to a GPU is not defined
        if number % 5 == 0:
            check(replay, world, capacity)
    check(replay, world, capacity)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_capacity_is_exact_with_episodes_of_one_step(num_envs):
    world = World(num_envs, 1, 0, ending=1.0)
    replay = Replay(20, num_envs, world.space, spaces.Discrete(5))
    replay.reset(world.obs())
    for number in range(70):
        replay.add(*world.step())
        assert len(replay) == min(number + 1, -(-20 // num_envs)) * num_envs


def test_short_episodes_of_stacks_cost_old_transitions_and_long_ones_none():
    lengths = {}
    for ending in (0.005, 1.0):
        world = World(2, 4, 0, ending)
        replay = Replay(2000, 2, world.space, spaces.Discrete(5), frame_stack=4)
        replay.reset(world.obs())
        for _ in range(2500):
            replay.add(*world.step())
        check(replay, world, 2000)
        lengths[ending] = len(replay)
    assert lengths[0.005] == 2000
    assert 2 * 200 <= lengths[1.0] < 1000  # five rows a step while most steps reset


def test_a_first_stack_is_kept_whole():
    """ALE starts with three zero frames and a real one, FrameStack wrappers with four times the first."""
    for zeros, first in ((True, [0, 0, 0, 1]), (False, [1, 1, 1, 1])):
        world = World(1, 4, 0, 0.0, zeros)
        replay = Replay(8, 1, world.space, spaces.Discrete(5), frame_stack=4)
        replay.reset(world.obs())
        replay.add(*world.step())
        replay.add(*world.step())
        transitions = everything(replay)
        assert transitions["obs"][0, :, 1].tolist() == first
        assert transitions["next_obs"][0, :, 1].tolist() == [*first[1:], 5]
        assert transitions["obs"][1, :, 1].tolist() == [*first[1:], 5]
        assert transitions["next_obs"][1, :, 1].tolist() == [*first[2:], 5, 6]


def filled(num_envs=2, stack=1, capacity=30, steps=40, ending=0.3, **more):
    world = World(num_envs, stack, 7, ending, **more)
    replay = Replay(capacity, num_envs, world.space, spaces.Discrete(5), frame_stack=stack)
    replay.reset(world.obs())
    for _ in range(steps):
        replay.add(*world.step())
    return replay, world


def test_sampling_is_uniform_over_all_that_is_stored():
    replay, world = filled()
    assert len(replay) == 30
    rewards = replay.sample(30_000, torch.Generator().manual_seed(0))["rewards"].numpy()
    oldest = 2 * (world.steps - 15)
    counts = np.bincount(rewards.astype(int) - oldest, minlength=30)
    assert len(counts) == 30
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 58.3  # 29 degrees of freedom: exceeded by one seed in a thousand


@pytest.mark.parametrize("stack", [1, 4])
def test_a_sample_is_what_gather_gives_in_the_asked_shape(stack):
    replay, _ = filled(stack=stack, as_dict=True)
    generator = torch.Generator().manual_seed(3)
    batch = replay.sample((6, 5), generator)
    index = torch.randint(len(replay), (6, 5), generator=torch.Generator().manual_seed(3))
    shape = () if stack == 1 else (stack,)
    assert batch["obs"]["grid"].shape == batch["next_obs"]["grid"].shape == (6, 5, *shape, 2)
    assert batch["obs"]["odd"].shape == (6, 5, *shape, 1)
    every = everything(replay)
    for name in ("actions", "rewards", "terminated", "truncated"):
        assert batch[name].shape == (6, 5)
        assert torch.equal(batch[name], every[name][index])
    for name in ("obs", "next_obs"):
        assert torch.equal(batch[name]["grid"], every[name]["grid"][index])
        assert torch.equal(batch[name]["odd"], every[name]["odd"][index])
    again = replay.sample(30, torch.Generator().manual_seed(3))
    assert torch.equal(again["rewards"], batch["rewards"].flatten())
    assert not torch.equal(replay.sample(30, generator)["rewards"], again["rewards"])


@pytest.mark.parametrize(
    ("space", "dtype", "shape"),
    [
        (spaces.Box(0, 255, (3, 8, 8), np.uint8), torch.uint8, (3, 8, 8)),
        (spaces.Box(-1, 1, (3,), np.float64), torch.float32, (3,)),
        (spaces.Box(0, 1, (2, 4, 4), bool), torch.bool, (2, 4, 4)),  # type: ignore[arg-type]
        (spaces.Discrete(7), torch.int64, ()),
        (spaces.MultiDiscrete([3, 4]), torch.int64, (2,)),
        (spaces.MultiBinary(3), torch.int8, (3,)),
    ],
)
def test_observations_keep_their_dtype_and_shape(space, dtype, shape):
    replay = Replay(10, 2, space, spaces.Discrete(2))
    space.seed(0)
    a, b = (np.stack([space.sample(), space.sample()]) for _ in range(2))
    none = np.zeros(2, bool)
    replay.reset(a)
    replay.add(np.array([0, 1]), Step(b, b, np.zeros(2, np.float32), none, none, none, []))
    batch = everything(replay)
    assert batch["obs"].dtype == batch["next_obs"].dtype == dtype
    assert batch["obs"].shape == (2, *shape)
    torch.testing.assert_close(batch["obs"], torch.from_numpy(a).to(dtype))
    torch.testing.assert_close(batch["next_obs"], torch.from_numpy(b).to(dtype))
    assert batch["actions"].dtype == torch.int64
    assert batch["rewards"].dtype == torch.float32
    assert batch["terminated"].dtype == batch["truncated"].dtype == torch.bool


@pytest.mark.parametrize(
    ("space", "dtype"),
    [(spaces.Box(-1, 1, (2,)), torch.float32), (spaces.MultiDiscrete([3, 5]), torch.int64)],
)
def test_actions_of_several_numbers(space, dtype):
    replay = Replay(4, 1, spaces.Box(-1, 1, (3,)), space)
    obs, none, action = np.zeros((1, 3), np.float32), np.zeros(1, bool), space.sample()
    replay.reset(obs)
    replay.add(action[None], Step(obs, obs, np.zeros(1, np.float32), none, none, none, []))
    actions = everything(replay)["actions"]
    assert actions.dtype == dtype
    np.testing.assert_array_equal(actions, action[None])


def test_what_is_stored_does_not_follow_the_arrays_it_came_from():
    for make in (lambda replay: replay, staged):
        world = World(2, 1, 0, 0.5)
        replay = make(Replay(10, 2, world.space, spaces.Discrete(5)))
        first = world.obs()
        replay.reset(first)
        actions, step = world.step()
        given = copy.deepcopy((actions, step))
        replay.add(*given)
        first[:] = -1
        for array in (given[0], *given[1][:5]):
            array[:] = 1
        check(replay, world, 10)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("num_envs", [1, 8, 64])
def test_a_million_atari_transitions_fit_in_seven_and_a_half_gigabytes(num_envs):
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    try:
        before = resident()
    except FileNotFoundError:
        pytest.skip("needs Linux, where untouched memory takes no room")
    replay = Replay(1_000_000, num_envs, space, spaces.Discrete(18), frame_stack=4)
    assert resident() - before < 20e6
    assert replay._length * num_envs == 1_000_000
    assert replay.nbytes <= 7.5e9
    assert replay.nbytes >= 1_000_000 * 84 * 84


def snapshot(replay):
    """A checkpoint in memory: the state as JSON, the segments as safetensors."""
    return json.dumps(replay.state()), {name: to_safetensors(read()) for name, read in replay.segments()}


def restored(like, saved, **replay_kwargs):
    state, segments = saved
    replay = Replay(**replay_kwargs)
    replay.restore(json.loads(state), lambda name: read_safetensors(segments[name]))
    assert len(replay) == len(like)
    return replay


@settings(max_examples=40, deadline=None)
@given(
    **WORLDS, room=st.integers(0, 40), laps=st.floats(0, 3), segment=st.integers(1, 400), gpu=st.booleans()
)
def test_a_restored_replay_goes_on_as_the_one_that_was_saved(
    num_envs, stack, ending, zeros, as_dict, seed, room, laps, segment, gpu
):
    world = World(num_envs, stack, seed, ending, zeros, as_dict)
    capacity = num_envs + room
    kwargs = {
        "capacity": capacity,
        "num_envs": num_envs,
        "observation_space": world.space,
        "action_space": spaces.Discrete(5),
        "frame_stack": stack,
    }
    replay = Replay(**kwargs)
    replay.segment_bytes = segment
    if gpu:
        staged(replay)
    replay.reset(world.obs())
    for _ in range(int(laps * capacity / num_envs)):
        replay.add(*world.step())
    saved = snapshot(replay)
    other = restored(replay, saved, **kwargs)
    assert snapshot(other) == saved
    for _ in range(20):
        transition = world.step()
        replay.add(*transition)
        other.add(*transition)
    check(replay, world, capacity)
    check(other, world, capacity)
    assert snapshot(other) == snapshot(replay)
    a, b = (r.sample(9, torch.Generator().manual_seed(1)) for r in (replay, other))
    assert torch.equal(a["rewards"], b["rewards"])


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_the_name_of_a_segment_changes_when_its_content_does_and_only_then(stack, num_envs):
    world = World(num_envs, stack, 0, 0.2)
    replay = Replay(60, num_envs, world.space, spaces.Discrete(5), frame_stack=stack)
    replay.segment_bytes = 100
    replay.reset(world.obs())
    seen: dict[str, bytes] = {}
    before: dict[str, tuple[str, bytes]] = {}
    for _ in range(150):
        replay.add(*world.step())
        now = {}
        for name, content in snapshot(replay)[1].items():
            assert seen.setdefault(name, content) == content
            now[name.rpartition("-")[0]] = (name, content)
        for place, (name, content) in before.items():
            assert (name == now[place][0]) == (content == now[place][1])
        before = now
    groups = [place.split("-")[0] for place in before]
    assert groups.count("steps") > 3
    assert groups.count("frames") > 3


def test_a_checkpoint_writes_only_what_was_written_since_the_last():
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    replay = Replay(1_000_000, 1, space, spaces.Discrete(6), frame_stack=4)
    replay.segment_bytes = 10 * 84 * 84
    none, stack = np.zeros(1, bool), np.zeros((1, 4, 84, 84), np.uint8)
    replay.reset(stack)

    def add(steps):
        for _ in range(steps):
            replay.add(none.astype(int), Step(stack, stack, np.ones(1, np.float32), none, none, none, []))
        return {name: sum(t.nbytes for t in read().values()) for name, read in replay.segments()}

    first = add(100)
    frames = sum(size for name, size in first.items() if name.startswith("frames"))
    assert frames == 104 * 84 * 84  # the first stack and a frame a step; nothing of the unwritten million
    assert len(first) == 1 + 11
    second = add(10)
    assert len(second.keys() - first.keys()) == 1 + 2  # rows 104 .. 113 lie in two segments
    assert len(second.keys() & first.keys()) == 10
    assert next(iter(replay.segments()))[0] == "steps-00000-110"


def test_segments_are_read_only_when_asked_and_then_are_the_storage_itself():
    replay, _ = filled()
    name, read = next(iter(replay.segments()))
    assert name.startswith("steps-00000-")
    assert read()["rewards"].data_ptr() == replay._rewards.tensor.data_ptr()


def test_restore_refuses_what_is_not_its_own():
    replay, world = filled()
    state, segments = snapshot(replay)
    kwargs = {"num_envs": 2, "observation_space": world.space, "action_space": spaces.Discrete(5)}

    def restore(state=state, segments=segments, capacity=30, **more):
        other = Replay(capacity, **{**kwargs, **more})
        other.restore(json.loads(state), lambda name: read_safetensors(segments[name]))
        return other

    assert len(restore()) == 30
    with pytest.raises(ValueError, match=r"replay state: .* \[30\].*takes \[32\]"):
        restore(capacity=31)
    with pytest.raises(ValueError, match=r"obs is .*int32.*takes .*float32"):
        restore(observation_space=spaces.Box(0, 1, FRAME))
    with pytest.raises(ValueError, match="got format 99, takes 1"):
        restore(state=json.dumps({**json.loads(state), "format": 99}))
    short = {
        n: to_safetensors({k: v[:-1] for k, v in read_safetensors(b).items()}) for n, b in segments.items()
    }
    with pytest.raises(ValueError, match=r"steps-00000-\d+: actions is \(14, 2\) .*takes \(15, 2\)"):
        restore(segments=short)
    with pytest.raises(ValueError, match="actions is nothing"):
        restore(segments={name: to_safetensors({"other": torch.zeros(1)}) for name in segments})
    with pytest.raises(RuntimeError, match="stored nothing yet"):
        replay.restore(json.loads(state), lambda name: {})


BOX = spaces.Box(-1, 1, (3,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity: got 0 transitions, takes at least one for each of num_envs=2"),
        ({"capacity": 1}, "capacity: got 1 transitions"),
        ({"num_envs": 0}, "num_envs: got 0, takes an integer of at least 1"),
        ({"frame_stack": -1}, "frame_stack: got -1"),
        ({"frame_stack": 4}, r"observation_space: got shape \(3,\), takes \(4, ...\) with frame_stack=4"),
        (
            {"observation_space": spaces.Text(3)},
            "observation_space: got Text.*takes Box, Discrete, .* or a Dict",
        ),
        (
            {"observation_space": spaces.Dict({"a": BOX, "b": spaces.Dict({"c": BOX})})},
            r"observation_space\['b'\]: got Dict",
        ),
        (
            {"observation_space": spaces.Box(0, 9, (2,), np.uint16)},
            "got dtype uint16, takes one of bool, uint8",
        ),
        (
            {"action_space": spaces.Dict({"a": BOX})},
            "action_space: got Dict.*takes Discrete, MultiDiscrete or Box",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    given = {"capacity": 10, "num_envs": 2, "observation_space": BOX, "action_space": spaces.Discrete(2)}
    with pytest.raises(ValueError, match=message):
        Replay(**{**given, **arguments})


def test_use_out_of_order_is_named():
    replay = Replay(10, 2, BOX, spaces.Discrete(2))
    obs, none = np.zeros((2, 3), np.float32), np.zeros(2, bool)
    step = Step(obs, obs, np.zeros(2, np.float32), none, none, none, [])
    with pytest.raises(ValueError, match="the replay is empty"):
        replay.sample(4, torch.Generator())
    with pytest.raises(RuntimeError, match="call reset"):
        replay.add(np.zeros(2, int), step)
    with pytest.raises(ValueError, match=r"obs: got shape \(3, 3\), takes \(2, 3\)"):
        replay.reset(np.zeros((3, 3), np.float32))
    replay.reset(obs)
    with pytest.raises(ValueError, match="the replay is empty"):
        replay.sample(4, torch.Generator())


def test_the_example_in_the_docstring():
    assert doctest.testmod(replay_module).failed == 0


def test_with_an_environment_of_gymnasium():
    """CartPole through the replay: every next_obs follows from obs by the environment's own equations."""
    env = gym.make("CartPole-v1")
    replay = Replay(300, 1, env.observation_space, env.action_space)
    obs, _ = env.reset(seed=0)
    replay.reset(obs[None])
    env.action_space.seed(0)
    for _ in range(400):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        obs = env.reset()[0] if done else next_obs
        ended, cut, reset = (np.array([flag]) for flag in (terminated, truncated, done))
        step = Step(obs[None], next_obs[None], np.array([reward], np.float32), ended, cut, reset, [])
        replay.add(np.array([action]), step)
    batch = everything(replay)
    x, velocity = batch["obs"][:, 0], batch["obs"][:, 1]
    torch.testing.assert_close(batch["next_obs"][:, 0], x + 0.02 * velocity)
    outside = (batch["next_obs"][:, 0].abs() > 2.4) | (batch["next_obs"][:, 2].abs() > 12 * np.pi / 180)
    assert torch.equal(outside, batch["terminated"])
    assert outside.any()
