"""Does an encoder that was trained to see help an agent that learns to act? PQN on MinAtar Breakout.

    python -m foveal.runs.benchmarks.transfer            # finished cells are skipped
    python -m foveal.runs.benchmarks.transfer --report   # the table of what is there, as Markdown

A classifier with the encoder `minatar-norm` learns, on frames of a random policy, how far the ball is from
the paddle; a VAE with the same encoder learns the frames themselves. The encoder then goes into PQN in four
ways, each with the same seeds and 200,000 environment steps: `end-to-end` does not use it, `random-frozen`
keeps a random encoder as it is, `pretrained-frozen` and `pretrained-finetuned` start from the classifier's,
`vae-frozen` and `vae-finetuned` from the VAE's. The score is the mean of 100 fresh episodes of the last
weights. One thread; a cell is one variant and one seed.
"""

import itertools
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...agents import PQN
from ...envs import make_vec
from ...generative import VAE, VAEConfig
from ...vision import Classifier, ClassifierConfig, Dataset, Split
from ..cli import guarded
from ..evaluation import evaluate
from ..statistics import bootstrap_ci, iqm
from .common import RESULTS, argument_parser, count, machine_info
from .suite import append, read

ENV, ENCODER = "MinAtar/Breakout-v1", "minatar-norm"
FARTHEST = 4
"""Distances beyond this many columns are one class."""
VARIANTS: dict[str, tuple[str | None, float | None]] = {
    "end-to-end": (None, None),
    "random-frozen": (None, 0.0),
    "pretrained-frozen": ("classifier", 0.0),
    "pretrained-finetuned": ("classifier", None),
    "vae-frozen": ("vae", 0.0),
    "vae-finetuned": ("vae", None),
}
"""Whose encoder is used, and the encoder's learning rate (None: the agent's)."""


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=count, default=10, help="how many (10)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which (all)")
    parser.add_argument("--steps", type=count, default=200_000, help="environment steps of a cell (200,000)")
    parser.add_argument("--frames", type=count, default=20_000, help="images to train encoders on (20,000)")
    parser.add_argument(
        "--results", type=Path, default=Path("results/transfer"), help="folder of their weights"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "transfer.json")
    parser.add_argument("--report", action="store_true", help="print the table of finished cells")
    given = parser.parse_args()
    if given.report:
        print(report(read(given.out)))
        return 0
    torch.set_num_threads(1)
    given.results.mkdir(parents=True, exist_ok=True)
    weights = {name: given.results / f"{name}-{given.frames}.safetensors" for name in PRETRAINING}
    used = {VARIANTS[variant][0] for variant in given.variants}
    for name, pretrain in PRETRAINING.items():
        if name in used and not weights[name].exists():
            pretrain(given.frames, weights[name])
    done = {(row["agent"], row["seed"], row["steps"]) for row in read(given.out)}
    for seed in range(given.seeds):
        for variant in given.variants:
            if (variant, seed, given.steps) not in done:
                train_cell(variant, seed, given.steps, weights, given.out)
    return 0


def frames_of(count: int, seed: int = 0) -> Dataset:
    """Frames of a uniformly random policy, labelled with the ball's column less the paddle's."""
    env = make_vec(ENV, num_envs=16, seed=seed)
    rng = np.random.default_rng(seed)
    obs = env.reset()
    space: Any = env.single_observation_space
    images: list[np.ndarray] = []
    labels: list[int] = []
    while len(images) < count:
        paddle, ball = (obs[:, channel].any(1).argmax(1) for channel in (0, 1))  # columns
        shown = obs[:, 0].any((1, 2)) & obs[:, 1].any((1, 2))
        images += list(obs[shown])
        labels += list((ball - paddle)[shown].clip(-FARTHEST, FARTHEST) + FARTHEST)
        obs = env.step(rng.integers(env.single_action_space.n, size=16)).obs  # type: ignore[attr-defined]
    env.close()
    pixels, truth = torch.from_numpy(np.stack(images[:count])), torch.tensor(np.array(labels[:count]))
    cuts = (0, count * 8 // 10, count * 9 // 10, count)
    train, validation, test = (Split(pixels[a:b], truth[a:b].long()) for a, b in itertools.pairwise(cuts))
    classes = tuple(f"{distance:+d}" for distance in range(-FARTHEST, FARTHEST + 1))
    return Dataset("breakout", train, validation, test, classes, int(space.high.max()))


def train_classifier(frames: int, path: Path) -> None:
    dataset = frames_of(frames)
    config = ClassifierConfig(encoder=ENCODER, optimizer="adam", learning_rate=1e-3)
    model = Classifier(dataset.space, dataset.classes, config, seed=0, device="cpu").fit(dataset, 10)
    print(f"the classifier's test error: {model.evaluate(dataset.test).error:.2%}", flush=True)
    model.save(path)


def train_vae(frames: int, path: Path) -> None:
    dataset = frames_of(frames)
    # With beta 1 its latents are 3 nats, and neither paddle nor ball is among them.
    config = VAEConfig(
        encoder=ENCODER, latent_dim=32, beta=0.1, kl_warmup=5.0, batch_size=64, learning_rate=3e-3
    )
    model = VAE(dataset.space, dataset.classes, config, seed=0, device="cpu").fit(dataset, 15)
    figures = model.test(dataset, k=20) | model.baseline(dataset)
    print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    model.save(path)


PRETRAINING = {"classifier": train_classifier, "vae": train_vae}


def train_cell(variant: str, seed: int, steps: int, weights: dict[str, Path], out: Path) -> None:
    pretrained, rate = VARIANTS[variant]
    config = PQN.recipe(ENV, encoder_learning_rate=rate)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    env = make_vec(ENV, config.num_envs, seed)
    agent = PQN(
        env, config, encoder=str(weights[pretrained]) if pretrained else ENCODER, seed=seed, device="cpu"
    )
    agent.learn(steps, progress=False)
    result = evaluate(agent, 100)
    env.close()
    after = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "env": ENV,
        "agent": variant,
        "seed": seed,
        "steps": steps,
        "last": result["eval/return_mean"],
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
    }
    append(out, row, machine_info())
    seconds = time.perf_counter() - began
    print(f"{variant} seed {seed}: {row['last']:.2f} in {seconds:.0f} s", flush=True)


def report(rows: list[dict[str, Any]]) -> str:
    lines = ["| encoder | seeds | mean score | 95 % interval | IQM |", "|---|---|---|---|---|"]
    for variant in VARIANTS:
        scores = [row["last"] for row in rows if row["agent"] == variant]
        if scores:
            low, high = bootstrap_ci(scores)
            lines.append(
                f"| {variant} | {len(scores)} | {np.mean(scores):.2f} | {low:.2f} to {high:.2f} | "
                f"{iqm(scores):.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guarded(main))
