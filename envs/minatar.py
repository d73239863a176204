"""MinAtar (Young and Tian, "MinAtar", arXiv:1903.03176), made repeatable and visible."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

CELL = 16  # pixels of a rendered cell, so that the 10x10 board becomes 160x160

# black, then one colour a channel; Seaquest has the most, ten
PALETTE = np.array(
    [
        (0, 0, 0), (86, 180, 233), (240, 228, 66), (213, 94, 0), (0, 158, 115), (204, 121, 167),
        (230, 159, 0), (0, 114, 178), (250, 250, 250), (150, 110, 220), (120, 120, 120),
    ],
    dtype=np.uint8,
)  # fmt: skip


class MinAtar(gym.Wrapper):
    """MinAtar's Gymnasium environment with two repairs.

    Its sticky actions remember the last action of the previous episode, so a seeded reset alone does not
    repeat an episode; here the reset forgets it. And its own rendering needs seaborn; this one does not.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        self.unwrapped.game.last_action = 0  # type: ignore[attr-defined]
        return self.env.reset(seed=seed, options=options)

    def render(self) -> np.ndarray:
        """The board as an image (160, 160, 3), uint8; where channels overlap the highest shows."""
        board = self.unwrapped.game.state()  # type: ignore[attr-defined]  # (10, 10, C) bool
        colour = np.max(board * np.arange(1, board.shape[-1] + 1), axis=-1)  # (10, 10)
        return PALETTE[colour].repeat(CELL, axis=0).repeat(CELL, axis=1)
