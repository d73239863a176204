"""Videos, read back with the ffmpeg that wrote them."""

from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest

from foveal.envs import make_vec
from foveal.runs import video
from foveal.runs.evaluation import evaluate
from foveal.runs.video import NoVideo, record, write_mp4


class Picture(gym.Env):
    """Episodes of `length` steps, reward .5 each; the picture is a grey that brightens by 20 a step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012
    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None, length=5, size=(21, 33), dtype="uint8"):
        self.render_mode, self.length, self.size, self.dtype = render_mode, length, size, dtype

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return np.array([0], np.float32), {}

    def step(self, action):
        self.at += 1
        return np.array([self.at], np.float32), 0.5, self.at == self.length, False, {}

    def render(self):
        return np.full((*self.size, 3), 20 * self.at, self.dtype)


class Blind(Picture):
    metadata = {"render_modes": ["human"]}  # noqa: RUF012


class Broken(Picture):
    def render(self):
        raise RuntimeError("no GL here\nand a long story")


ENVIRONMENTS: list[Any] = [Picture, Blind, Broken]


@pytest.fixture(autouse=True)
def environments():
    for env in ENVIRONMENTS:
        gym.register(f"test/{env.__name__}-v0", env, max_episode_steps=100)
    yield
    for env in ENVIRONMENTS:
        gym.registry.pop(f"test/{env.__name__}-v0")


class Agent:
    def __init__(self, env_id="test/Picture-v0", **spec):
        self.spec, self.starts = {"env_id": env_id, "seed": 5, "num_envs": 3, **spec}, []

    def env_spec(self):
        return self.spec

    def predict(self, obs, state=None, episode_start=None, deterministic=False):
        assert obs.shape[0] == 1
        self.starts.append(bool(episode_start[0]))
        return np.ones(1, np.int64), state


def read(path):
    """What ffmpeg says of the file, and its frames (T, H, W, 3)."""
    frames = imageio_ffmpeg.read_frames(str(path))
    meta = next(frames)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


def test_an_episode_frame_by_frame(tmp_path):
    path = tmp_path / "film.mp4"
    agent = Agent()
    assert record(agent, path) == path
    meta, frames = read(path)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 12
    # 33x21 grows tenfold to 330x210, and 26 rows of caption follow.
    assert meta["size"] == (330, 236)
    # A picture before each of the 5 steps; the last one stays for a second.
    levels = frames[:, :200].mean(axis=(1, 2, 3))
    assert levels == pytest.approx([0, 20, 40, 60, 80] + [80] * 12, abs=3)
    assert agent.starts == [True, False, False, False, False]
    assert list(tmp_path.iterdir()) == [path]


def test_the_caption_counts(tmp_path, monkeypatch):
    said = []
    original = video.Captions.below

    def below(self, picture, title, score, length, over=False):
        said.append((title, score, length, over))
        return original(self, picture, title, score, length, over)

    monkeypatch.setattr(video.Captions, "below", below)
    record(Agent(env_kwargs={"length": 2}), tmp_path / "film.mp4", episodes=2)
    first, second = "test/Picture-v0, episode 1 of 2", "test/Picture-v0, episode 2 of 2"
    assert said == [
        (first, 0, 0, False), (first, 0.5, 1, False), (first, 1, 2, True),
        (second, 0, 0, False), (second, 0.5, 1, False), (second, 1, 2, True),
    ]  # fmt: skip
    caption = read(tmp_path / "film.mp4")[1][:, -26:]
    assert (caption.max(axis=(1, 2, 3)) > 150).all()  # there is writing


def test_max_steps_ends_the_film(tmp_path):
    record(Agent(env_kwargs={"length": 50}), tmp_path / "film.mp4", max_steps=7)
    assert len(read(tmp_path / "film.mp4")[1]) == 7


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 10), (320, 346)), ((401, 33), (320, 428)), ((84, 321), (322, 110))]
)
def test_sizes_are_even_and_wide_enough(tmp_path, size, expected):
    record(Agent(env_kwargs={"length": 2, "size": size}), tmp_path / "film.mp4")
    assert read(tmp_path / "film.mp4")[0]["size"] == expected


def test_cartpole_is_the_episode_that_is_evaluated(tmp_path):
    class Leaning(Agent):
        def predict(self, obs, state=None, episode_start=None, deterministic=False):
            return (obs[:, 2] > 0).astype(np.int64), state

    agent = Leaning("CartPole-v1", num_envs=8)
    record(agent, tmp_path / "film.mp4")
    meta, frames = read(tmp_path / "film.mp4")
    assert meta["size"] == (600, 426)
    assert meta["fps"] == 50
    assert len(frames) == evaluate(agent, episodes=1)["eval/returns"][0] + 50


def test_it_leaves_the_training_environments_alone(tmp_path):
    venv = make_vec("test/Picture-v0", seed=5)
    venv.reset()
    record(Agent(**venv.spec_dict()), tmp_path / "film.mp4", max_steps=3)
    assert venv.step(np.zeros(1, np.int64)).next_obs.tolist() == [[1]]


@pytest.mark.filterwarnings("ignore:.*dtype uint8, got float64")
@pytest.mark.parametrize(
    ("env_id", "kwargs", "reason"),
    [
        (
            "test/Blind-v0",
            {},
            r"^test/Blind-v0 cannot be filmed: it has no render mode rgb_array \(it has: human\)$",
        ),
        ("test/Broken-v0", {}, "^test/Broken-v0 cannot be filmed: RuntimeError: no GL here$"),
        ("test/Picture-v0", {"dtype": "float64"}, r"TypeError: a picture must be \(H, W, 3\) uint8"),
    ],
)
def test_what_cannot_be_filmed_says_why(tmp_path, env_id, kwargs, reason):
    with pytest.raises(NoVideo, match=reason):
        record(Agent(env_id, env_kwargs=kwargs), tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_ffmpeg_is_no_video(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "absent"))
    with pytest.raises(NoVideo, match="ffmpeg does not start"):
        write_mp4(tmp_path / "film.mp4", iter(np.zeros((3, 64, 64, 3), np.uint8)), 10)


def test_a_failure_half_way_keeps_the_older_film(tmp_path):
    class Failing(Agent):
        def predict(self, *args, **kwargs):
            if len(self.starts) == 3:
                raise KeyboardInterrupt
            return super().predict(*args, **kwargs)

    path = tmp_path / "film.mp4"
    path.write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt):
        record(Failing(), path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_film_cut_short_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (2, 0.1))
    with pytest.raises(OSError, match="2 of 17 frames"):
        record(Agent(), tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("film.mp4", {"episodes": 0}, ValueError, "episodes must be at least 1"),
        ("film.mp4", {"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ("film.gif", {}, ValueError, r"must end in \.mp4"),
        ("absent/film.mp4", {}, FileNotFoundError, "no folder"),
    ],
)
def test_bad_arguments(tmp_path, name, arguments, error, message):
    with pytest.raises(error, match=message):
        record(Agent(), tmp_path / name, **arguments)
