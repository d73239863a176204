"""Train an agent into a run folder: log, evaluate, checkpoint, stop, resume, and show what came out."""

import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium import spaces

from ..agents import AGENTS, Agent, TabularAgent, load, newest_first, save_checkpoint, sweep
from ..agents.agent import Row, passes
from ..agents.progress import progress as progress_display
from ..envs import grid_map, make_vec
from ..vision import find_weights, is_image, read_weights
from .evaluation import (
    decimals,
    evaluate,
    evaluation_row,
    random_policy_return,
    score_text,
    validation_seed,
)
from .lifecycle import (
    ALL_THREADS,
    RunOptions,
    closing,
    imports_of,
    is_resumable,
    keep_first_checkpoint,
    load_chosen,
    peak_memory,
    resume_command,
    say,
    stop_signals,
)
from .plots import learning_curve, values_on_map
from .run import Run, create_run, open_run, resume_run
from .video import NoVideo, record


@dataclass(frozen=True)
class Options(RunOptions):
    """What a training run is, beside the agent's own settings."""

    env_id: str = "CartPole-v1"
    """Environment: a Gymnasium id, ALE/..., MinAtar/..., or module:Env-v0 for one of your own."""
    total_steps: int = 50_000
    """Environment steps to train for, all environments together."""
    encoder: str = "auto"
    """A name of `foveal list encoders`, module:Class, or the path of a trained run; auto is what fits agent
    and observations. For observations of several parts: IMAGES+VECTORS, such as nature+mlp-tanh."""
    env_kwargs: tuple[str, ...] = ()
    """Arguments for the environment, as name=value (values are read as JSON, else as text)."""
    max_episode_steps: int | None = None
    """Step limit of an episode, where the environment's own is not wanted."""
    backend: Literal["auto", "sync", "async", "native"] = "auto"
    """How environments are stepped side by side; async puts each into a process."""

    log_every: int = 1_000
    """Environment steps between two rows of metrics."""
    eval_every: int | None = None
    """Environment steps between two evaluations, which choose the best checkpoint: the longest trained of
    those at most a standard error below the best mean; 0 for none.
    By default a twentieth of the training, but no less than 5,000."""
    eval_episodes: int = 20
    """Episodes of such an evaluation."""
    final_episodes: int = 100
    """Fresh episodes of the score at the end."""
    checkpoint_every: int = 10_000
    """Environment steps between two checkpoints."""
    target_score: float | None = None
    """Stop as soon as an evaluation reaches this mean score."""
    video: bool = True
    """Record an mp4 of the greedy policy at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("total_steps", "log_every", "eval_episodes", "final_episodes", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if (self.eval_every or 0) < 0:
            raise ValueError(f"eval_every must be 0 or more, got {self.eval_every}")
        # Between rows an agent is not whole, so nothing can come more often than they do.
        for name in ("eval_every", "checkpoint_every"):
            if 0 < (getattr(self, name) or 0) < self.log_every:
                raise ValueError(
                    f"{name} must be at least log_every ({self.log_every}), got {getattr(self, name)}"
                )
        parse_env_kwargs(self.env_kwargs)

    @property
    def evaluation_cadence(self) -> int:
        """Environment steps between two evaluations; 0 for none."""
        if self.eval_every is not None:
            return self.eval_every
        return max(5_000, self.log_every, self.total_steps // 20)


def parse_env_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """("sutton_barto_reward=true", "difficulty=2") -> {"sutton_barto_reward": True, "difficulty": 2}."""
    kwargs = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"env_kwargs takes name=value, got {pair!r}")
        try:
            kwargs[name] = json.loads(value)
        except json.JSONDecodeError:
            kwargs[name] = value
    return kwargs


def make_agent(agent_name: str, options: Options, config: Any) -> Agent:
    """The agent that a run begins with. Raises ValueError for whatever cannot be taken; no folder is made."""
    env = make_vec(
        options.env_id,
        config.num_envs,
        options.seed,
        backend=options.backend,
        env_kwargs=parse_env_kwargs(options.env_kwargs),
        max_episode_steps=options.max_episode_steps,
    )
    agent = AGENTS[agent_name](env, config, encoder=options.encoder, seed=options.seed, device=options.device)
    if options.init_from is not None:
        path = find_weights(options.init_from)
        agent.load_weights(read_weights(path)[0], path)
    agent.start()
    return agent


def train(agent_name: str, options: Options, config: Any) -> Run:
    """Train a new agent into a new run folder, which is finished or stopped when this returns.

    Raises ValueError or OSError, before any folder is made, for whatever cannot be taken.
    """
    agent = make_agent(agent_name, options, config)
    run = create_run(
        options.results,
        group=options.group or f"{agent_name}-{options.env_id}",
        name=options.name or f"seed{options.seed}",
        config={
            "agent": agent_name,
            "env_id": options.env_id,
            "seed": options.seed,
            "total_steps": options.total_steps,
            "device": str(agent.device),
            "encoder": agent.describe()["encoder"]["name"],
            "parameters": sum(p.numel() for p in agent.network.parameters()),
            "config": asdict(config),
            "options": json.loads(json.dumps(asdict(options), default=str)),
        },
        tags=options.tags,
        track=options.track,
        parents=[find_weights(options.init_from)] if options.init_from else [],
    )
    keep_first_checkpoint(run, agent)
    with closing(run):
        return _train(run, agent, options)


def resume(path: Path, total_steps: int | None, checkpoint: str | None, progress: bool = True) -> Run:
    """Go on with a run from its newest checkpoint, or the one named, as if it had never stopped.

    A finished run needs more `total_steps` to go on. With another `total_steps` the schedules are other ones,
    so rows after the checkpoint are history of a run that is no more, and are dropped. Raises ValueError or
    FileNotFoundError, naming the file and the checkpoint before it, where a checkpoint is not whole.
    """
    run = open_run(path)
    path, stored = run.path, _options_of(run)
    if not is_resumable(run):
        raise ValueError(
            f"{path}: {run.config['agent']} runs cannot be resumed: Stable-Baselines3 keeps neither "
            f"its replay nor its random state; to train on from the weights: {resume_command(run)}"
        )
    options = replace(stored, progress=progress, total_steps=total_steps or stored.total_steps)
    agent, exact, chosen = load_chosen(run, checkpoint, lambda folder: load(folder, device=options.device))
    if agent.env_step >= options.total_steps and run.summary.get("state") == "finished":
        raise ValueError(
            f"{path} is finished: {agent.env_step:,} of {options.total_steps:,} steps; "
            "to train it further, give more --total-steps"
        )
    if agent.converged and run.summary.get("state") == "finished":
        raise ValueError(f"{path} is finished: it converged at {agent.env_step:,} steps")
    changed = options.total_steps != stored.total_steps
    if changed or not exact:
        run.rewind(agent.env_step)
        best = path / "checkpoints" / "best" / "weights.safetensors"
        if best.exists() and read_weights(best)[1]["env_step"] > agent.env_step:
            best.unlink()
    if changed:
        as_json = {**run.config["options"], "total_steps": options.total_steps}
        run.configure({"total_steps": options.total_steps, "options": as_json})
    sweep(path / "checkpoints", after=chosen)
    run = resume_run(path)
    if not exact:
        run.summarize({"resume_exact": False})
        say("an environment could not be replayed to where it was, and starts a new episode")
    with closing(run):
        return _train(run, agent, options)


def _options_of(run: Run) -> Options:
    """The options that a run was started with. ValueError where its config.json is not a training's."""
    try:
        stored = run.config["options"]
        lists = {name: tuple(stored[name]) for name in ("env_kwargs", "tags")}
        return Options(**{**stored, **lists, "init_from": None, "results": Path(stored["results"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{run.path}/config.json has no options of a training of this version: {error}"
        ) from error


def _train(run: Run, agent: Agent, options: Options) -> Run:
    torch.set_num_threads(options.threads or default_threads(agent.observation_space))
    checkpoints = run.path / "checkpoints"
    before = saved = agent.env_step
    past = [row for row in run.rows() if row["env_step"] <= before]
    best: Row | None = max((row for row in past if "eval/return_mean" in row), key=_mean, default=None)
    wall_s = max((row["time/wall_s"] for row in past), default=0.0)
    clock = time.perf_counter() - wall_s
    label = f"{agent.name} {options.env_id} seed {options.seed}"
    stopped = False

    show_progress = progress_display(options.total_steps, before, enabled=options.progress, label=label)
    with stop_signals() as stop, show_progress as show:
        for row in agent.training(options.total_steps, options.log_every):
            now, end = row["env_step"], row["env_step"] >= options.total_steps or agent.converged
            cadence = options.evaluation_cadence
            if cadence and (passes(cadence, before, now) or end):
                result = evaluate(agent, options.eval_episodes, seed=validation_seed(options.seed))
                row |= evaluation_row(result)
                # What is exact is so whatever its luck.
                if best is None or is_as_good(row, best) or agent.converged:
                    (checkpoints / "best").mkdir(exist_ok=True)
                    agent.save(checkpoints / "best" / "weights.safetensors")
                best = row if best is None else max(row, best, key=_mean)
            wall_s = row["time/wall_s"] = time.perf_counter() - clock
            run.log(row)
            show(row)
            if options.target_score is not None and best is not None:
                end = end or _mean(best) >= options.target_score
            stopped = stop() and not end
            if passes(options.checkpoint_every, before, now) or end or stopped:
                save_checkpoint(agent, checkpoints)
                saved = now
            before = now
            if end or stopped:
                break

    if stopped:
        run.summarize({"wall_s": wall_s})
        run.finish("stopped")
        say(f"stopped at {saved:,} steps; to go on: {resume_command(run)}")
        return run
    _conclude(run, agent, options, wall_s)
    run.finish("finished")
    return run


def is_as_good(row: Row, best: Row) -> bool:
    """Whether an evaluation is at most a standard error below the best one before it.

    A few episodes tell neighbouring checkpoints apart by luck, and the luckiest of twenty is a poor choice:
    of those that are as good as the best, the one that was trained for longest is taken.
    """
    return _mean(row) >= _mean(best) - best["eval/return_std"] / math.sqrt(best["eval/episodes"])


def _mean(row: Row) -> float:
    return row["eval/return_mean"]


def default_threads(space: spaces.Space) -> int:
    """All cores where there are images, else one, because more only slow small networks down."""
    parts = list(space.values()) if isinstance(space, spaces.Dict) else [space]
    return ALL_THREADS if any(is_image(part) for part in parts) else 1


def _conclude(run: Run, agent: Agent, options: Options, wall_s: float) -> None:
    """Score the run on fresh episodes, draw its curve, film its policy, and say where all of it is."""
    if options.progress:
        print(f"scoring on {options.final_episodes} fresh episodes ...", file=sys.stderr, flush=True)
    last = evaluate(agent, options.final_episodes)
    scored, score, what = agent, last, "last weights"
    best = run.path / "checkpoints" / "best" / "weights.safetensors"
    if best.exists():
        scored = load(best, device=str(agent.device))
        score, what = evaluate(scored, options.final_episodes), f"best checkpoint, step {scored.env_step:,}"
    random_return = random_policy_return(agent.env_spec(), options.final_episodes)
    run.summarize(
        {key: value for key, value in score.items() if key != "eval/returns"}
        | {
            "eval/env_step": scored.env_step,
            "last/return_mean": last["eval/return_mean"],
            "baseline/random_policy": random_return,
            "speed/env_steps_per_s": agent.env_step / wall_s,
            "speed/updates_per_s": agent.grad_step / wall_s,
            "wall_s": wall_s,
            **peak_memory(run),
            "device": run.config["device"],
            "git": run.config["run"]["git"],
            "versions": run.config["versions"],
        }
    )
    say(f"score: {score_text(score)}; {what})")
    digits = decimals(score)
    say(f"last weights: {last['eval/return_mean']:.{digits}f}; random policy: {random_return:.{digits}f}")
    curve = run.path / "plots" / "learning_curve.png"
    learning_curve(
        run.rows(),
        curve,
        title=f"{agent.name} on {options.env_id}, seed {options.seed}",
        baseline=random_return,
        best=_validated(run, scored),
        steps_are=agent.step_name,
    )
    run.image("plots/learning_curve", curve, env_step=agent.env_step)
    say(f"learning curve: {curve}")
    if isinstance(scored, TabularAgent) and (rows := grid_map(scored.env_spec())):
        picture = run.path / "plots" / "values.png"
        values_on_map(scored.q, rows, picture, title=f"{agent.name} on {options.env_id}, seed {options.seed}")
        run.image("plots/values", picture, env_step=scored.env_step)
        say(f"values: {picture}")
    if options.video:
        try:
            film = record(scored, run.path / "videos" / "policy.mp4")
            run.video("videos/policy", film, env_step=scored.env_step)
            run.artifact("film", "video", film, {"env_step": scored.env_step})
            say(f"video: {film}")
        except (NoVideo, OSError) as reason:  # the training is done and saved: a film is worth no failure
            say(f"video: none ({reason})")
    chosen = best if best.exists() else newest_first(run.path / "checkpoints")[0] / "weights.safetensors"
    run.artifact("agent", "model", chosen, {"env_step": scored.env_step})
    say(f"weights: {chosen}")
    say(f"run folder: {run.path}")
    quoted = shlex.quote(str(run.path))
    if run.track == "offline":
        say(f"offline W&B run, to send once logged in: foveal sync {quoted}")
    say(f"again: foveal evaluate {quoted}{imports_of(run)}")


def _validated(run: Run, chosen: Agent) -> tuple[int, float] | None:
    """Where the chosen checkpoint lies on the learning curve; None without validation."""
    scores = {row["env_step"]: row["eval/return_mean"] for row in run.rows() if "eval/return_mean" in row}
    step = chosen.env_step
    return (step, scores[step]) if step in scores else None
