"""What a run is: command line, tracking, evaluation, plots, films, benchmarks."""

import gymnasium as gym

from .evaluation import evaluate
from .run import Run, create_run, list_runs, open_run, resume_run

gym.register("foveal/Latent-v0", "foveal.runs.latent_env:LatentEnv")

__all__ = ["Run", "create_run", "evaluate", "list_runs", "open_run", "resume_run"]
