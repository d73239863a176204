"""Steps per CPU-second of foveal/Glimpse-v0, and of training RAM beside a loop over images.

    python -m foveal.runs.benchmarks.glimpse_speed          # about a CPU minute

Environment: the built-in digits on their canvas, 6 glimpses of 8x8, random actions made before; stepped as
Gymnasium's vector environment and through `make_vec`, which seeds every episode and checks every number. The
known active-perception environments for Gymnasium take about 4,100 steps per CPU-second.

Training: MNIST's sizes (28x28, 6 glimpses of 8x8, batches of 128, a core of 256) on random pixels. Beside it
the structure of public PyTorch implementations, written anew here: each glimpse is cut out image by image in
a Python loop from a padded batch, as fast as such a loop can be, and stacked; distributions and optimizer are
torch's modules. The network is the same one, so that what differs is that structure. One thread, in turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from ...agents import RAM
from ...agents.recurrent_attention import RAMConfig, RAMNetwork
from ...envs import make_vec
from .common import RESULTS, argument_parser, machine_info, write_results

KNOWN_ENVIRONMENT = 4_100
"""Steps per CPU-second of the known environments."""
SIZES = ((28, 8, 1, 6), (60, 12, 3, 8))
"""Side of the canvas, patch, scales, glimpses."""
BATCH = 128


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--updates", type=int, default=10, help="gradient steps a turn (10)")
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
    training = {}
    for side, patch, scales, glimpses in SIZES:
        name = f"{side}x{side}, {glimpses} glimpses of {patch}x{patch}, {scales} scale{'s' * (scales > 1)}"
        ours, loop = training_speeds(side, patch, scales, glimpses, given.rounds, given.updates)
        training[name] = {"foveal": ours, "loop over images": loop}
        a, b = statistics.median(ours), statistics.median(loop)
        print(f"{name}: {a:,.1f} updates per CPU-second, {b:,.1f} with a loop over images, {a / b:.1f} times")
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
) -> tuple[list[float], list[float]]:
    """Gradient steps per CPU-second of RAM, and of the loop, in turns."""
    space = spaces.Box(0, 255, (1, side, side), np.uint8)
    config = RAMConfig(glimpses=glimpses, patch=patch, scales=scales, batch_size=BATCH)
    ram = RAM(space, tuple("0123456789"), config, device="cpu")
    peer = LoopOverImages(config)
    images = torch.randint(0, 256, (BATCH, 1, side, side), dtype=torch.uint8)
    labels = torch.randint(0, 10, (BATCH,))
    floats = images.float() / 255  # public ones get them so from their loader; not counted
    ours: list[float] = []
    loop: list[float] = []
    for turn in range(-1, rounds):  # the first warms up
        for update, speeds in ((lambda: ram.update(images, labels, 1e-3), ours),
                               (lambda: peer.update(floats, labels), loop)):  # fmt: skip
            began = time.process_time()
            for _ in range(updates):
                update()
            if turn >= 0:
                speeds.append(updates / (time.process_time() - began))
    return ours, loop


class LoopOverImages:
    """RAM's training as public implementations have it: a loop over glimpses, and in it one over images."""

    def __init__(self, config: RAMConfig):
        self.config = config
        assert config.patch is not None
        assert config.scales is not None
        self.patch, self.scales = config.patch, config.scales
        self.network = RAMNetwork(config.scales * config.patch**2, 10, config)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)

    def glimpse(self, images: Tensor, locations: Tensor) -> Tensor:
        height = images.shape[2]
        corners = (0.5 * (locations + 1) * height).long()
        scales = []
        for scale in range(self.scales):
            side = self.patch << scale
            padded = F.pad(images, (side // 2, side - side // 2) * 2)
            parts = [padded[i, :, y : y + side, x : x + side] for i, (x, y) in enumerate(corners.tolist())]
            part = torch.stack(parts)
            scales.append(F.avg_pool2d(part, 1 << scale) if scale else part)
        return torch.cat(scales, 1)

    def update(self, images: Tensor, labels: Tensor) -> None:
        network, config = self.network, self.config
        location = 2 * torch.rand(len(images), 2) - 1
        state = torch.zeros(len(images), network.core.state_size)
        log_probs, baselines = [], []
        for t in range(config.glimpses):
            output, state = network(self.glimpse(images, location), location, state)
            if t < config.glimpses - 1:
                policy = torch.distributions.Normal(network.means(output), config.std)
                sample = policy.sample()
                log_probs.append(policy.log_prob(sample).sum(1))
                baselines.append(network.baseline(output.detach()).squeeze(1))
                location = sample.clamp(-1, 1)
        log_probabilities = network.classifier(output).log_softmax(1)
        reward = (log_probabilities.detach().argmax(1) == labels).float().unsqueeze(1)
        values = torch.stack(baselines, 1)
        advantage = reward - values.detach()
        loss = F.nll_loss(log_probabilities, labels)
        loss = loss + (values - reward).square().sum(1).mean()
        loss = loss - (torch.stack(log_probs, 1) * advantage).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
