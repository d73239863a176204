"""Steps per CPU-second of foveal/Glimpse-v0, and of training RAM beside a loop over images.

    python -m foveal.runs.benchmarks.glimpse_speed          # about a CPU minute

Environment: the built-in digits on their canvas, 6 glimpses of 8x8, random actions made before; stepped as
Gymnasium's vector environment and through `make_vec`, which seeds every episode and checks every number. The
known active-perception environments for Gymnasium take about 4,100 steps per CPU-second.

Training: MNIST's sizes (28x28, 6 glimpses of 8x8) and the paper's larger ones, batches of 128, a core of 256,
on random pixels. Beside it the structure of the public PyTorch implementation, written anew here: a Python
loop over glimpses, in it one over images, that cuts each glimpse out by itself; its layers at the paper's
sizes, torch's distributions and optimizer. It has been published with two ways of cutting, and both are
measured. What its data loader takes is not counted. One thread, in turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from ...agents import RAM
from ...agents.recurrent_attention import RAMConfig
from ...envs import make_vec
from ..cli import guarded
from .common import RESULTS, argument_parser, count, machine_info, write_results

KNOWN_ENVIRONMENT = 4_100
"""Steps per CPU-second of the known environments."""
SIZES = ((28, 8, 1, 6), (60, 12, 3, 8))
"""Side of the canvas, patch, scales, glimpses."""
BATCH = 128
CUTS = ("padded batch", "padded images")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=count, default=5, help="turns of each (5)")
    parser.add_argument("--updates", type=count, default=10, help="gradient steps a turn (10)")
    parser.add_argument("--out", type=Path, default=RESULTS / "glimpse_speed.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    environment = {
        f"{how}, {count:,} images": environment_speed(how, count, given.rounds)
        for count in (256, 4096)
        for how in ("vector environment", "make_vec")
    }
    for name, speeds in environment.items():
        middle = statistics.median(speeds)
        print(f"{name:<36} {middle:11,.0f} env steps per CPU-second, {middle / KNOWN_ENVIRONMENT:.0f} times")
    training: dict[str, dict[str, list[float]]] = {}
    for side, patch, scales, glimpses in SIZES:
        name = f"{side}x{side}, {glimpses} glimpses of {patch}x{patch}, {scales} scale{'s' * (scales > 1)}"
        sides = training[name] = training_speeds(side, patch, scales, glimpses, given.rounds, given.updates)
        ours = statistics.median(sides["foveal"])
        print(f"{name}: {ours:,.1f} updates per CPU-second")
        for cut in CUTS:
            theirs = statistics.median(sides[f"loop, {cut}"])
            print(f"    {theirs:,.1f} with a loop over images, {cut}: {ours / theirs:.1f} times as many")
    results: dict[str, Any] = {"environment": environment, "known_environment": KNOWN_ENVIRONMENT}
    write_results(given.out, {**machine_info(), **results, "updates_per_cpu_second": training})
    return 0


def environment_speed(how: str, count: int, rounds: int) -> list[float]:
    """Steps of all `count` environments together per CPU-second, of each round."""
    rng = np.random.default_rng(0)
    if how == "make_vec":
        env: Any = make_vec("foveal/GlimpseBox-v0", count, seed=0)
        env.reset()
        actions: list[Any] = [rng.uniform(-1, 1, (count, 12)).astype(np.float32) for _ in range(4)]
    else:
        env = gym.make_vec("foveal/Glimpse-v0", num_envs=count)
        env.reset(seed=0)
        looks = [rng.uniform(-1, 1, (count, 2)).astype(np.float32) for _ in range(4)]
        actions = [{"look": look, "answer": rng.integers(10, size=count)} for look in looks]
    steps = max(14, 70 * 1024 // count)
    speeds = []
    for _ in range(rounds):
        began = time.process_time()
        for step in range(steps):
            env.step(actions[step % 4])
        speeds.append(steps * count / (time.process_time() - began))
    env.close()
    return speeds


def training_speeds(
    side: int, patch: int, scales: int, glimpses: int, rounds: int, updates: int
) -> dict[str, list[float]]:
    """Gradient steps per CPU-second of RAM and of the loops, in turns."""
    space = spaces.Box(0, 255, (1, side, side), np.uint8)
    config = RAMConfig(glimpses=glimpses, patch=patch, scales=scales, batch_size=BATCH)
    ram = RAM(space, tuple("0123456789"), config, device="cpu")
    images = torch.randint(0, 256, (BATCH, 1, side, side), dtype=torch.uint8)
    labels = torch.randint(0, 10, (BATCH,))
    floats = images.float() / 255  # public ones get them so from their loader
    sides: dict[str, Callable[[], object]] = {"foveal": lambda: ram.update(images, labels, 1e-3, config.std)}
    for cut in CUTS:
        sides[f"loop, {cut}"] = partial(LoopOverImages(config, cut).update, floats, labels)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):  # the first warms up
        for name, update in sides.items():
            began = time.process_time()
            for _ in range(updates):
                update()
            if turn >= 0:
                speeds[name].append(updates / (time.process_time() - began))
    return speeds


class PublicNetwork(nn.Module):
    """The layers of public implementations, of the paper's sizes: every Linear is one of its own."""

    def __init__(self, values: int, config: RAMConfig):
        super().__init__()
        half, size = 128, config.hidden
        self.see, self.place = nn.Linear(values, half), nn.Linear(2, half)
        self.what, self.where = nn.Linear(half, size), nn.Linear(half, size)
        self.input, self.memory = nn.Linear(size, size), nn.Linear(size, size)
        self.locator = nn.Sequential(nn.Linear(size, size // 2), nn.ReLU(), nn.Linear(size // 2, 2))
        self.baseline = nn.Linear(size, 1)
        self.classifier = nn.Linear(size, 10)

    def forward(self, glimpses: Tensor, locations: Tensor, hidden: Tensor) -> Tensor:
        what = self.what(F.relu(self.see(glimpses.flatten(1))))
        where = self.where(F.relu(self.place(locations)))
        return F.relu(self.input(F.relu(what + where)) + self.memory(hidden))


class LoopOverImages:
    """RAM's training as public implementations have it: a loop over glimpses, and in it one over images.

    `cut` is how a glimpse is cut out of each image: "padded batch", slices at 0-dimensional tensors of a
    batch that was padded as a whole; or "padded images", numbers taken out of tensors one by one, and an
    image padded where its glimpse sticks out.
    """

    def __init__(self, config: RAMConfig, cut: str):
        assert config.patch is not None
        assert config.scales is not None
        self.config, self.cut = config, cut
        self.patch, self.scales = config.patch, config.scales
        self.network = PublicNetwork(config.scales * config.patch**2, config)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=3e-4)

    def glimpse(self, images: Tensor, locations: Tensor) -> Tensor:
        scales = []
        for scale in range(self.scales):
            cut = padded_batch if self.cut == "padded batch" else padded_images
            part = cut(images, locations, self.patch << scale)
            scales.append(F.avg_pool2d(part, 1 << scale) if scale else part)
        return torch.cat(scales, 1)

    def update(self, images: Tensor, labels: Tensor) -> None:
        network, config = self.network, self.config
        location = torch.empty(len(images), 2).uniform_(-1, 1)
        hidden = torch.zeros(len(images), config.hidden)
        log_probs, baselines = [], []
        for _ in range(config.glimpses):
            hidden = network(self.glimpse(images, location), location, hidden)
            mean = torch.tanh(network.locator(hidden.detach()))
            policy = torch.distributions.Normal(mean, config.std)
            sample = policy.sample()
            log_probs.append(policy.log_prob(sample).sum(1))
            baselines.append(network.baseline(hidden.detach()).squeeze(1))
            location = sample.clamp(-1, 1)
        log_probabilities = F.log_softmax(network.classifier(hidden), 1)
        reward = (log_probabilities.detach().argmax(1) == labels).float().unsqueeze(1)
        values = torch.stack(baselines, 1)
        loss = F.nll_loss(log_probabilities, labels) + F.mse_loss(values, reward.expand_as(values))
        advantage = reward - values.detach()
        loss = loss - 0.01 * (torch.stack(log_probs, 1) * advantage).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()  # shown after each step


def padded_batch(images: Tensor, locations: Tensor, side: int) -> Tensor:
    start = (0.5 * (locations + 1) * images.shape[2]).long()
    end = start + side
    padded = F.pad(images, (side // 2, side - side // 2) * 2)
    parts = [padded[i, :, start[i, 1] : end[i, 1], start[i, 0] : end[i, 0]] for i in range(len(images))]
    return torch.stack(parts)


def padded_images(images: Tensor, locations: Tensor, side: int) -> Tensor:
    size, before = images.shape[2], side // 2 + 1
    corners = (0.5 * (locations + 1) * size).long() - side // 2
    parts = []
    for i in range(len(images)):
        image = images[i : i + 1]
        left, right = corners[i, 0].item(), (corners[i, 0] + side).item()
        top, bottom = corners[i, 1].item(), (corners[i, 1] + side).item()
        if left < 0 or top < 0 or right > size or bottom > size:
            image = F.pad(image, (before,) * 4)
            left, right, top, bottom = (int(edge) + before for edge in (left, right, top, bottom))
        parts.append(image[:, :, int(top) : int(bottom), int(left) : int(right)])
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(guarded(main))
