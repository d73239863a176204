"""Record an agent at play as an mp4 that browsers show."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from gymnasium.envs.registration import load_env_creator

from ..envs import find_spec, make_vec
from .evaluation import Policy

__all__ = ["NoVideo", "record"]

SMALLEST = 320  # pixels: a smaller picture is enlarged by a whole factor, and a caption needs this width
STRIP = 26  # pixels below the picture for the caption
LINGER_S = 1.0  # how long the last picture of an episode stays


class NoVideo(ValueError):
    """The environment cannot be filmed; the message says why, in one line."""


def record(
    agent: Policy,
    path: str | Path,
    episodes: int = 1,
    *,
    max_steps: int = 2_000,
    seed: int | None = None,
    deterministic: bool = True,
) -> Path:
    """Film `agent` on an environment of its own and write an H.264 mp4 (yuv420p, even sizes).

    Below the picture stand the score so far and the step. The film runs at the environment's `render_fps`, 30
    where it names none. The file appears whole or not at all. As in `evaluate`, no training generator is
    drawn from.

    Args:
        agent: as in `evaluate`.
        path: of the mp4; one that exists is replaced.
        episodes: how many to film, at least 1.
        max_steps: the film ends after so many agent steps, at least 1; 2,000 are 40 s of CartPole.
        seed: of the environment; None is the training environments' seed. The first episode filmed is the
            first that `evaluate` plays with the same seed.
        deterministic: the greedy policy.

    Returns:
        `path`.

    Raises:
        NoVideo: the environment renders no pictures, or its renderer or ffmpeg does not work here.
        ValueError: `episodes` or `max_steps` below 1, or a `path` that does not end in .mp4.
        OSError: `path` cannot be written.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"path must end in .mp4, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    fps = frames_per_second(agent.env_spec()["env_id"])
    beside = path.with_name(f".{path.stem}.tmp.mp4")  # ffmpeg takes the format from the ending
    try:
        with closing(
            _frames(agent, episodes, max_steps, seed, deterministic, round(LINGER_S * fps))
        ) as frames:
            write_mp4(beside, frames, fps)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def frames_per_second(env_id: str) -> float:
    """An environment's `render_fps`, 30 where it names none. Raises NoVideo where it renders no arrays."""
    entry_point = find_spec(env_id).entry_point
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    metadata = getattr(creator, "metadata", None)
    if metadata is None:  # made by a function: only making it can tell
        return 30.0
    modes = metadata.get("render_modes") or ()
    if "rgb_array" not in modes:
        has = ", ".join(modes) or "none"
        raise NoVideo(f"{env_id} cannot be filmed: it has no render mode rgb_array (it has: {has})")
    return float(metadata.get("render_fps") or 30)


def write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    """Encode frames (H, W, 3) uint8, at least one, all of one size, H and W even."""
    import imageio_ffmpeg

    first = next(frames)
    height, width, _ = first.shape
    try:
        # Browsers want yuv420p, which is why sizes are even; faststart puts the index first, so that a film
        # plays while it loads. imageio's default macro block of 16 would stretch the picture.
        encoder = imageio_ffmpeg.write_frames(
            str(path),
            (width, height),
            fps=fps,
            codec="libx264",
            macro_block_size=1,
            quality=7,
            ffmpeg_log_level="error",
            output_params=["-preset", "veryfast", "-movflags", "+faststart"],
        )
        encoder.send(None)
    except (RuntimeError, OSError) as error:
        raise NoVideo(f"no video: ffmpeg does not start ({error})") from error
    count = 0
    with closing(encoder):
        for frame in itertools.chain([first], frames):
            try:
                encoder.send(frame)
            except OSError as error:  # its text has ffmpeg's command line in it
                raise OSError(f"ffmpeg stopped while it wrote {path}") from error
            count += 1
    # ffmpeg's exit status is not passed on; a full disk shows here.
    try:
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:
        written = 0
    if written != count:
        raise OSError(f"ffmpeg could not write {path}: {written} of {count} frames are there")


def _frames(
    agent: Policy, episodes: int, max_steps: int, seed: int | None, deterministic: bool, linger: int
) -> Generator[np.ndarray, None, None]:
    """Captioned pictures: one before each step, and the last one of an episode `linger` times more.

    The state that ends an episode is never seen: the environment has begun the next one by then. What is held
    is the picture before the last action, under the final score.
    """
    spec = {
        **agent.env_spec(),
        "num_envs": 1,
        "training": False,
        "backend": "auto",
        "render_mode": "rgb_array",
    }
    if seed is not None:
        spec["seed"] = seed
    env_id = spec["env_id"]
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else pygame looks for a screen, and complains
    try:
        env = make_vec(**spec)
    except Exception as error:  # renderers fail in ways of their own: no pygame, no GL, no display
        raise _no_video(env_id, error) from error
    with closing(env):
        obs, state, episode_start = env.reset(), None, np.ones(1, dtype=bool)
        try:
            captions = Captions(_enlarge(env.render()).shape[1])
        except Exception as error:
            raise _no_video(env_id, error) from error
        score, length, finished = 0.0, 0, 0
        for _ in range(max_steps):
            title = env_id if episodes == 1 else f"{env_id}, episode {finished + 1} of {episodes}"
            picture = _enlarge(env.render())
            yield captions.below(picture, title, score, length)
            actions, state = agent.predict(
                obs, state=state, episode_start=episode_start, deterministic=deterministic
            )
            step = env.step(actions)
            obs, episode_start = step.obs, step.reset
            score, length = score + float(step.rewards[0]), length + 1
            for episode in step.episodes:
                last = captions.below(picture, title, episode.episode_return, episode.length, over=True)
                yield from [last] * linger
                score, length, finished = 0.0, 0, finished + 1
            if finished == episodes:
                return


def _no_video(env_id: str, error: Exception) -> NoVideo:
    reason = str(error).strip().splitlines() or [""]
    return NoVideo(f"{env_id} cannot be filmed: {type(error).__name__}: {reason[0]}")


def _enlarge(picture: np.ndarray) -> np.ndarray:
    """Repeat every pixel so often that the longer side has `SMALLEST` pixels or more."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise TypeError(f"a picture must be (H, W, 3) uint8, got {picture.shape} {picture.dtype}")
    factor = max(1, -(-SMALLEST // max(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


class Captions:
    """Puts pictures on a dark canvas of even size, with a line of text below."""

    def __init__(self, width: int) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.width = max(width, SMALLEST)
        self.width += self.width % 2
        self.strip = Image.new("RGB", (self.width, STRIP))
        self.draw = ImageDraw.Draw(self.strip)
        self.font = ImageFont.load_default(14)

    def below(
        self, picture: np.ndarray, title: str, score: float, length: int, over: bool = False
    ) -> np.ndarray:
        """(H, W, 3) uint8 with even H and W: `picture`, centred, and below it the score and the step."""
        number = f"{score:,.2f}".rstrip("0").rstrip(".")
        text = f"score {number}   step {length:,}" + ("   over" if over else "")
        self.draw.rectangle((0, 0, self.width, STRIP), fill=(24, 24, 24))
        color = (255, 196, 61) if over else (255, 255, 255)
        self.draw.text((8, STRIP // 2), text, font=self.font, anchor="lm", fill=color)
        room = self.width - 24 - self.draw.textlength(text, font=self.font)
        if self.draw.textlength(title, font=self.font) < room:
            place = (self.width - 8, STRIP // 2)
            self.draw.text(place, title, font=self.font, anchor="rm", fill=(150, 150, 150))
        height, width, _ = picture.shape
        canvas = np.full((height + height % 2 + STRIP, self.width, 3), 24, dtype=np.uint8)
        left = (self.width - width) // 2
        canvas[:height, left : left + width] = picture
        canvas[-STRIP:] = np.asarray(self.strip)
        return canvas
