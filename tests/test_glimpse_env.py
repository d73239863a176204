"""foveal/Glimpse-v0: the episodes are those that the batched trainer plays; every form is the same task."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from foveal.agents import DQN, RAM
from foveal.agents.recurrent_attention import unroll
from foveal.envs import make_vec
from foveal.envs.glimpse import GlimpseVectorEnv, hashed, load_canvases
from foveal.vision import Dataset, Split, load_dataset
from foveal.vision.fixations import OPEN, RIGHT, WRONG
from foveal.vision.glimpse import glimpse

N = 12


def plain(**changes) -> GlimpseVectorEnv:
    settings = {"dataset": load_dataset("digits"), "glimpses": 3, "patch": 3, "scales": 2, **changes}
    return GlimpseVectorEnv(N, autoreset_mode=AutoresetMode.DISABLED, **settings)


def looks_of(rng: np.random.Generator) -> dict[str, np.ndarray]:
    look = rng.uniform(-1.5, 1.5, (N, 2)).astype(np.float32)
    return {"look": look, "answer": rng.integers(10, size=N)}


def test_the_trainer_and_the_environment_play_the_same_episodes():
    """The same images, first looks and noise: the same pixels, locations, answers and rewards."""
    env = plain()
    digits = load_dataset("digits")
    config = RAM.Config(glimpses=3, patch=3, scales=2, hidden=16, glimpse_hidden=8, std=0.5)
    ram = RAM(digits.space, digits.classes, config, seed=1, device="cpu").learn(digits, 0.2)
    obs, _ = env.reset(seed=list(range(N)))
    images, labels = env.images.images[env.image], torch.from_numpy(env.labels)
    first, noise = torch.from_numpy(obs["location"].copy()), torch.randn(2, N, 2)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        episodes = unroll(ram.network, ram.frame(images), first, noise, ram.config, ram.high, seen.append)
        answers = ram.network.classifier(episodes.hidden[-1]).argmax(-1)
    state, total = None, np.zeros(N)
    for t in range(3):
        np.testing.assert_array_equal(obs["glimpse"], seen[t].numpy())
        np.testing.assert_array_equal(obs["location"], episodes.locations[t].numpy())
        np.testing.assert_allclose(obs["time"], (t + 1) / 3, rtol=1e-6)
        actions, state = ram.predict(obs, state, deterministic=True)
        if t < 2:
            with torch.no_grad():
                means = ram.network.means(episodes.hidden[t], t + 1)
            np.testing.assert_allclose(actions["look"], means.numpy(), atol=1e-6)
            actions["look"] = episodes.samples[t].numpy()  # not cut: that is the environment's part
        else:
            np.testing.assert_array_equal(actions["answer"], answers.numpy())
        obs, rewards, terminated, truncated, _ = env.step(actions)
        total += rewards
        assert terminated.all() == (t == 2)
        assert not truncated.any()
    np.testing.assert_array_equal(total, (answers == labels).numpy())
    assert 0 < total.sum() < N


def test_predict_is_the_pass_that_the_model_is_scored_by():
    env = plain()
    digits = load_dataset("digits")
    config = RAM.Config(glimpses=3, patch=3, scales=2, hidden=16, glimpse_hidden=8)
    ram = RAM(digits.space, digits.classes, config, seed=1, device="cpu").learn(digits, 0.2)
    obs, _ = env.reset(seed=list(range(N)))
    first, state = torch.from_numpy(obs["location"].copy()), None
    for t in range(3):
        start = np.full(N, t == 0)
        alone, _ = ram.predict({k: v[2] for k, v in obs.items()}, None if state is None else state[2:3],
                               deterministic=True)  # fmt: skip
        actions, state = ram.predict(obs, state, start, deterministic=True)
        np.testing.assert_allclose(alone["look"], actions["look"][2], atol=1e-6)
        obs, rewards, *_ = env.step(actions)
    with torch.no_grad():
        episodes = unroll(ram.network, ram.frame(env.images.images[env.image]), first, torch.zeros(2, N, 2),
                          ram.config, ram.high)  # fmt: skip
        right = ram.network.classifier(episodes.hidden[-1]).argmax(-1).numpy() == env.labels
    np.testing.assert_array_equal(rewards, right)
    # A new episode forgets the last one.
    again, _ = ram.predict(obs, state, np.ones(N, np.bool_), deterministic=True)
    fresh, _ = ram.predict(obs, None, deterministic=True)
    np.testing.assert_array_equal(again["look"], fresh["look"])
    one, two = (ram.predict(obs, None)[0]["look"] for _ in range(2))
    assert not np.array_equal(one, two)


def test_seeds_fix_episodes_and_resets_of_some_leave_the_others():
    one, two = plain(), plain()
    seeds = list(range(100, 100 + N))
    first, _ = one.reset(seed=seeds)
    second, _ = two.reset(seed=seeds[::-1])
    for key in first:
        np.testing.assert_array_equal(first[key], second[key][::-1])
    rng = np.random.default_rng(0)
    before, *_ = one.step(looks_of(rng))
    mask = np.arange(N) % 3 == 0
    after, _ = one.reset(seed=[7 if m else None for m in mask], options={"reset_mask": mask})
    for key in after:
        np.testing.assert_array_equal(after[key][~mask], before[key][~mask])
        assert (after[key][mask] == after[key][0]).all()
    assert one.taken.tolist() == [1 if m else 2 for m in mask]


def test_images_and_first_looks_are_drawn_evenly():
    seeds = np.arange(40_000)
    counts = np.bincount((hashed(seeds, 0) % np.uint64(10)).astype(int), minlength=10)
    assert abs(counts - 4_000).max() < 4.5 * 60
    env = GlimpseVectorEnv(4_000, dataset=load_dataset("digits"), glimpses=1)
    obs, _ = env.reset(seed=1)
    x, y = obs["location"].T
    histogram = np.histogram2d(x, y, bins=4, range=[(-1, 1)] * 2)[0]
    assert abs(histogram - 250).max() < 4.5 * 250**0.5
    assert abs(np.corrcoef(obs["location"].T)[0, 1]) < 0.07


def test_next_step_autoreset_begins_new_episodes_without_a_reward():
    env = GlimpseVectorEnv(N, dataset=load_dataset("digits"), glimpses=2, patch=4)
    obs, _ = env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        env.step(looks_of(rng))[0]
        *_, terminated, _, _ = env.step({**looks_of(rng), "answer": env.labels})
        assert terminated.all()
        before = env.image.copy()
        obs, rewards, terminated, _, _ = env.step({**looks_of(rng), "answer": env.labels})
        assert not terminated.any()
        assert not rewards.any()
        np.testing.assert_array_equal(obs["time"], 0.5)
        assert not np.array_equal(env.image, before)


def test_every_form_is_the_same_task():
    dict_env, box, grid = plain(), plain(form="box"), plain(form="grid", grid=3)
    seeds = list(range(N))
    obs, _ = dict_env.reset(seed=seeds)
    flat, _ = box.reset(seed=seeds)
    np.testing.assert_array_equal(grid.reset(seed=seeds)[0], flat)
    rng = np.random.default_rng(0)
    rewards = []
    for t in range(3):
        joined = np.concatenate([obs["glimpse"].reshape(N, -1), obs["location"], obs["time"]], 1)
        np.testing.assert_array_equal(joined, flat)
        assert box.observation_space.contains(flat)
        assert dict_env.observation_space.contains(obs)
        cell = rng.integers(9, size=N)
        actions = np.where(np.arange(N) % 2, cell, env_answers := dict_env.labels) if t == 2 else cell
        look = np.stack([(2 * (actions % 9 % 3) + 1) / 3 - 1, (2 * (actions % 9 // 3) + 1) / 3 - 1], 1)
        scores = np.eye(10)[actions % 10] * 0.5 - 0.2
        obs, r1, *_ = dict_env.step({"look": look.astype(np.float32), "answer": actions % 10})
        flat, r2, *_ = box.step(np.concatenate([look, scores], 1).astype(np.float32))
        same, r3, *_ = grid.step(actions)
        np.testing.assert_array_equal(flat, same)
        rewards.append((r1, r2, r3))
    for r1, r2, r3 in rewards:
        np.testing.assert_array_equal(r1, r2)
        np.testing.assert_array_equal(r1, r3)
    assert rewards[-1][0][::2].all()
    assert grid.single_action_space == gym.spaces.Discrete(10)
    assert plain(form="grid").single_action_space == gym.spaces.Discrete(25)
    assert len(env_answers) == N


def test_one_at_a_time_is_a_gymnasium_environment():
    env = gym.make("foveal/Glimpse-v0", dataset=load_dataset("digits"), glimpses=3, patch=4)
    check_env(env.unwrapped, skip_render_check=True)
    for form, space in (("Box", gym.spaces.Box), ("Grid", gym.spaces.Discrete)):
        env = gym.make(f"foveal/Glimpse{form}-v0", dataset=load_dataset("digits"), patch=4)
        check_env(env.unwrapped, skip_render_check=True)
        assert isinstance(env.action_space, space)
    assert gym.make_vec("foveal/Glimpse-v0", num_envs=3, dataset=load_dataset("digits")).num_envs == 3


def test_pictures_show_the_glimpses_so_far_and_the_answer():
    digits = load_dataset("digits")
    env = GlimpseVectorEnv(2, dataset=digits, glimpses=2, patch=3, render_mode="rgb_array")
    for wrong in (0, 1):
        env.reset(seed=[5, 6])
        colors = []
        for _ in range(3):
            picture = env.render()
            assert picture.dtype == np.uint8
            assert picture.shape[2] == 3
            colors.append([bool((picture == ink).all(-1).any()) for ink in (OPEN, RIGHT, WRONG)])
            if env.answer is None:
                env.step({"look": np.full((2, 2), 0.25, np.float32), "answer": (env.labels + wrong) % 10})
        assert colors == [[True, False, False]] * 2 + [[False, not wrong, bool(wrong)]]
    # The path is what was seen: the pixels at the last location are the last glimpse.
    obs = env.observe()
    image = env.images.images[env.image[:1]]
    seen = glimpse(image, torch.from_numpy(env.path[-1])[None], 3) / 16
    np.testing.assert_array_equal(seen[0].numpy(), obs["glimpse"][0])


def test_make_vec_trains_on_training_images_and_evaluates_on_test_images():
    kwargs = {"glimpses": 2, "patch": 4, "scales": 2}
    env = make_vec("foveal/GlimpseGrid-v0", 5, seed=1, env_kwargs=kwargs)
    other = make_vec("foveal/GlimpseGrid-v0", 5, seed=1, env_kwargs=kwargs, training=False)
    data = load_canvases("digits", None, None, None, None, 0)
    for made, split in ((env, data.train), (other, data.test)):
        backend: Any = made.backend
        assert backend.env.images is split
    assert data.train.images.shape == (20_000, 1, 40, 40)
    obs = env.reset()
    assert obs.shape == (5, 2 * 16 + 3)
    lengths = []
    for _ in range(6):
        step = env.step(np.zeros(5))
        assert (step.next_obs[:, :-3] >= 0).all()
        lengths += [episode.length for episode in step.episodes]
    assert lengths == [2] * 15


def test_where_every_environment_stood_comes_back_exactly():
    kwargs = {"glimpses": 4, "patch": 4}
    env, other = (make_vec("foveal/GlimpseBox-v0", 3, seed=1, env_kwargs=kwargs) for _ in range(2))
    env.reset()
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (9, 3, 12)).astype(np.float32)
    for action in actions[:6]:
        step = env.step(action)
    obs, exact = other.restore(*env.state())
    assert exact
    np.testing.assert_array_equal(obs, step.obs)
    for action in actions[6:]:
        mine, theirs = env.step(action), other.step(action)
        np.testing.assert_array_equal(mine.obs, theirs.obs)
        np.testing.assert_array_equal(mine.rewards, theirs.rewards)


def test_an_agent_of_the_lab_trains_on_it():
    env = make_vec("foveal/GlimpseGrid-v0", 8, seed=1, env_kwargs={"glimpses": 2})
    config = DQN.recipe("foveal/GlimpseGrid-v0", learning_starts=64)
    agent = DQN(env, config, seed=1, device="cpu").learn(400, progress=False)
    assert agent.grad_step > 0
    assert agent.env_step == 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 9}, "patch must be from 1 to the shorter side of the 8x8 canvas, got 9"),
        ({"glimpses": 0}, "glimpses must be a positive integer, got 0"),
        ({"form": "round"}, "form must be one of dict, box, grid, got 'round'"),
        ({"split": "all"}, "split must be one of train, validation, test, got 'all'"),
        ({"autoreset_mode": AutoresetMode.SAME_STEP}, "autoreset_mode must be NextStep or Disabled"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GlimpseVectorEnv(2, **{"dataset": load_dataset("digits"), **changes})


def test_actions_that_are_refused():
    env = plain()
    env.reset(seed=1)
    look, answer = np.zeros((N, 2), np.float32), np.zeros(N, np.int64)
    for actions, message in (
        ({"look": look, "answer": answer + 10}, "answer must be from 0 to 9, got 10"),
        ({"look": look, "answer": answer - 1}, "answer must be from 0 to 9, got -1"),
        ({"look": look, "answer": answer + 0.5}, r"answer must be \(12,\) integers, got \(12,\) float64"),
        ({"look": look * np.nan, "answer": answer}, r"look must be \(12, 2\) finite numbers"),
        ({"look": look[:3], "answer": answer}, r"look must be \(12, 2\) finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            env.step(actions)
    grid = plain(form="grid")
    grid.reset(seed=1)
    with pytest.raises(ValueError, match="action must be from 0 to 24, got 25"):
        grid.step(np.full(N, 25))


@pytest.mark.parametrize(
    ("env_id", "arguments", "message"),
    [
        ("foveal/Glimpse-v0", {}, "agents take foveal/GlimpseBox-v0"),
        ("foveal/GlimpseBox-v0", {"backend": "sync"}, "is stepped as one"),
        ("foveal/GlimpseBox-v0", {"env_kwargs": {"form": "dict"}}, "does not take form; it takes background"),
        ("foveal/GlimpseBox-v0", {"env_kwargs": {"translated": 20, "cluttered": 20}}, "are two tasks"),
        ("foveal/GlimpseBox-v0", {"env_kwargs": {"dataset": "digit"}}, "unknown data set 'digit'"),
    ],
)
def test_what_make_vec_refuses(env_id, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vec(env_id, 2, **arguments)


def test_a_split_without_images_is_refused():
    digits = load_dataset("digits")
    empty = Split(digits.train.images[:0], digits.train.labels[:0])
    data = Dataset("digits", digits.train, empty, digits.test, digits.classes, 16)
    with pytest.raises(ValueError, match="split: digits has no validation images"):
        GlimpseVectorEnv(2, dataset=data, split="validation")
