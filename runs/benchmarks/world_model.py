"""Does an agent learn from a world model's latents what it learns from pixels? PQN on MinAtar Breakout.

    python -m foveal.runs.benchmarks.world_model            # finished cells are skipped
    python -m foveal.runs.benchmarks.world_model --report   # the table of what is there, as Markdown

Frames and steps of a random policy train a VAE, and with it a world model. PQN then learns, with the same
settings, seeds and environment steps, from `pixels`, from the latents z and the recurrent state h (`z and h`)
or from `z` alone; of both kinds also with a world model whose weights are random (`random z and h`). On
vectors its network is `mlp-norm`. The score is the mean of 100 fresh episodes of the last weights. One
thread; a cell is one variant and one seed.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...agents import PQN
from ...envs import make_vec
from ...generative import VAE, WorldModel
from ...generative.world_model import Experience, read_experience
from ...vision import load_dataset
from ..cli import guarded
from ..collect import Collect, play
from ..collect import write as write_frames
from ..evaluation import evaluate
from ..statistics import bootstrap_ci
from .common import RESULTS, argument_parser, count, machine_info
from .suite import append, read

ENV = "MinAtar/Breakout-v1"
VARIANTS: dict[str, tuple[str, bool] | None] = {
    "pixels": None,
    "z and h": ("world", True),
    "z": ("world", False),
    "random z and h": ("random", True),
}
"""Which world model is seen through, and whether h is shown; None: neither."""
VAE_SETTINGS: dict[str, Any] = {
    "encoder": "minatar-norm", "latent_dim": 32, "beta": 0.1, "kl_warmup": 5.0, "batch_size": 64,
    "learning_rate": 3e-3,
}  # fmt: skip
"""A paddle of one pixel in ten costs little more to guess than to tell, in nats: with beta 1 the latents are
3 nats, and neither paddle nor ball is among them. An agent needs both, not a bound on the likelihood."""
VAE_EPOCHS, WORLD_EPOCHS = 15, 40


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=count, default=5, help="how many (5)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which (all)")
    parser.add_argument("--steps", type=count, default=200_000, help="environment steps of a cell (200,000)")
    parser.add_argument("--frames", type=count, default=20_000, help="frames to train the models on (20,000)")
    parser.add_argument(
        "--results", type=Path, default=Path("results/world-model-benchmark"), help="folder of its models"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "world_model.json")
    parser.add_argument("--report", action="store_true", help="print the table of finished cells")
    given = parser.parse_args()
    if given.report:
        print(report(read(given.out)))
        return 0
    torch.set_num_threads(1)
    models = train_models(given.results, given.frames)
    done = {(row["agent"], row["seed"], row["steps"]) for row in read(given.out)}
    for seed in range(given.seeds):
        for variant in given.variants:
            if (variant, seed, given.steps) not in done:
                train_cell(variant, seed, given.steps, models, given.out)
    return 0


def train_models(folder: Path, frames: int) -> dict[str, Any]:
    """The world model of `frames` frames and one of random weights, as weights files, trained where they are
    not there yet with these settings; and their figures."""
    folder.mkdir(parents=True, exist_ok=True)
    data, eye, world, random, figures = (
        folder / f"{name}-{frames}{end}"
        for name, end in (("frames", ".npz"), *((n, ".safetensors") for n in ("vae", "world", "random")),
                          ("figures", ".json"))
    )  # fmt: skip
    settings = {"vae": {**VAE_SETTINGS, "epochs": VAE_EPOCHS}, "world_model": {"epochs": WORLD_EPOCHS}}
    if not figures.exists() or json.loads(figures.read_text()).get("settings") != settings:
        before = cpu_seconds()
        write_frames(data, play(Collect(env_id=ENV, frames=frames)))
        dataset = load_dataset(data)
        vae = VAE(dataset.space, dataset.classes, VAE.Config(**VAE_SETTINGS), seed=0, device="cpu")
        vae.fit(dataset, VAE_EPOCHS).save(eye)
        steps: Experience = read_experience(dataset, data)
        made: dict[str, WorldModel] = {}
        for name, path, seed in (("world", world, 0), ("random", random, 1)):
            config = WorldModel.Config(vae=str(eye))
            made[name] = WorldModel(steps.space, steps.classes, config, seed=seed, device="cpu")
            if name == "random":  # its eye is new as well
                other = VAE(dataset.space, dataset.classes, vae.config, seed=1, device="cpu")
                made[name].network.vae.load_state_dict(other.network.state_dict())
            else:
                made[name].fit(steps, WORLD_EPOCHS)
            made[name].save(path)
        result = {
            "settings": settings,
            "vae": vae.test(dataset, k=100),
            "independent_pixels": vae.baseline(dataset)["independent_pixels_nats"],
            "world_model": made["world"].test(steps),
            "baseline": made["world"].baseline(steps),
            "cpu_s": round(cpu_seconds() - before),
        }
        figures.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result), flush=True)
    return {"world": world, "random": random, "figures": json.loads(figures.read_text())}


def train_cell(variant: str, seed: int, steps: int, models: dict[str, Any], out: Path) -> None:
    config = PQN.recipe(ENV)
    before, began = cpu_seconds(), time.perf_counter()
    seen = VARIANTS[variant]
    if seen is None:
        env = make_vec(ENV, config.num_envs, seed)
    else:
        kwargs = {"env_id": ENV, "world_model": str(models[seen[0]].absolute()), "memory": seen[1]}
        env = make_vec("foveal/Latent-v0", config.num_envs, seed, env_kwargs=kwargs)
    encoder = "minatar-norm" if seen is None else "mlp-norm"
    agent = PQN(env, config, encoder=encoder, seed=seed, device="cpu")
    agent.learn(steps, progress=False)
    result = evaluate(agent, 100)
    env.close()
    row = {
        "env": ENV,
        "agent": variant,
        "seed": seed,
        "steps": steps,
        "last": result["eval/return_mean"],
        "cpu_s": round(cpu_seconds() - before, 1),
        "models": models["figures"],
    }
    append(out, row, machine_info())
    print(f"{variant} seed {seed}: {row['last']:.2f} in {time.perf_counter() - began:.0f} s", flush=True)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def report(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the agents, and one of the world model that they see through."""
    lines = [
        "| PQN sees | seeds | steps | mean score | 95 % interval | seed by seed | CPU-s |",
        "|---|---|---|---|---|---|---|",
    ]
    for steps in sorted({row["steps"] for row in rows}):
        for variant in VARIANTS:
            mine = [row for row in rows if (row["agent"], row["steps"]) == (variant, steps)]
            if mine:
                scores, cpu_s = [row["last"] for row in mine], np.mean([row["cpu_s"] for row in mine])
                low, high = bootstrap_ci(scores)
                mean, spread = f"{np.mean(scores):.2f}", f"{low:.2f} to {high:.2f}"
                each = " ".join(f"{score:.2f}" for score in scores)
                lines.append(
                    f"| {variant} | {len(mine)} | {steps:,} | {mean} | {spread} | {each} | {cpu_s:.0f} |"
                )
    if rows:
        model, trivial = rows[-1]["models"]["world_model"], rows[-1]["models"]["baseline"]
        pairs = [
            ("squared error of the next frame", model["frame_error"],
             f"{trivial['same_frame_error']:.3g} (the frame before), "
             f"{trivial['reconstruction_error']:.3g} (the VAE's reconstruction of the next)"),
            ("nats of the next z", model["nats"], f"{trivial['gaussian_nats']:.2f} (Gaussians)"),
            ("squared error of the reward", model["reward_error"],
             f"{trivial['mean_reward_error']:.3g} (the mean)"),
            ("nats of endings", model["ending_nats"], f"{trivial['ending_share_nats']:.3g} (their share)"),
        ]  # fmt: skip
        lines += ["", "| on the last fifth of the steps | world model | without it |", "|---|---|---|"]
        lines += [f"| {what} | {value:.4g} | {others} |" for what, value, others in pairs]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guarded(main))
