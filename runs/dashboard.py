"""foveal dashboard: a workspace and a report of a project on Weights & Biases, built with wandb-workspaces.

Both show the same panels: curves as mean and standard deviation over the seeds of each agent or model, final
scores as bars, films and pictures, speed, and a table of the runs. The names are those that training logs and
that `tracking.whole_summary` leaves at a run's end; a test holds every one of them to real runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from .run import open_run
from .settings import check_known, fields_of
from .sync import run_folders
from .tracking import (
    PROJECT,
    SERVER_S,
    check_server,
    check_track,
    wandb_environment,
    wandb_lines,
    whole_summary,
)
from .wandb_file import is_media


class Panel(NamedTuple):
    title: str
    metric: str
    """Of a curve a key of rows; of bars a key of W&B's summary; of media their key."""
    kind: Literal["curve", "bars", "media"] = "curve"


class Section(NamedTuple):
    title: str
    axis: str
    """What its curves are drawn against."""
    panels: tuple[Panel, ...]


SECTIONS: tuple[Section, ...] = (
    Section(
        "Return",
        "env_step",
        (
            Panel("return in evaluation", "eval/return_mean"),
            Panel("return in training", "train/return_mean"),
            Panel("final score", "eval/return_mean.last", "bars"),
            Panel("best in evaluation", "eval/return_mean.max", "bars"),
            Panel("random policy's score", "baseline/random_policy", "bars"),
            Panel("episode length in evaluation", "eval/length_mean"),
            Panel("episode length in training", "train/length_mean"),
        ),
    ),
    Section(
        "Learning of agents",
        "env_step",
        (
            Panel("Q loss", "train/q_loss"),
            Panel("TD error", "train/td_error"),
            Panel("policy loss", "train/policy_loss"),
            Panel("value loss", "train/value_loss"),
            Panel("entropy", "train/entropy"),
            Panel("KL divergence of an update", "train/approx_kl"),
            Panel("share of clipped ratios", "train/clip_fraction"),
            Panel("explained variance of returns", "train/explained_variance"),
            Panel("exploration (epsilon)", "train/epsilon"),
            Panel("step size", "train/learning_rate"),
        ),
    ),
    Section(
        "Classifiers and RAM",
        "epoch",
        (
            Panel("accuracy on validation images", "validation/accuracy"),
            Panel("accuracy on training images", "train/accuracy"),
            Panel("test error", "test/error", "bars"),
            Panel("error of always the commonest class", "baseline/commonest_class", "bars"),
            Panel("loss on validation images", "validation/loss"),
            Panel("loss on training images", "train/loss"),
            Panel("RAM: loss of where it looks", "train/look_loss"),
            Panel("RAM: loss of the baseline", "train/baseline_loss"),
            Panel("RAM: test error with drawn looks", "test/error_sampled", "bars"),
            Panel("RAM: error of random looking", "baseline/random_looking", "bars"),
        ),
    ),
    Section(
        "Likelihood and reconstruction",
        "epoch",
        (
            Panel("bits/dim of validation images", "validation/bits_per_dim"),
            Panel("bits/dim of training images", "train/bits_per_dim"),
            Panel("bits/dim of test images", "test/bits_per_dim", "bars"),
            Panel("nats of validation images", "validation/nats"),
            Panel("ELBO of validation images", "validation/elbo"),
            Panel("nats of test images", "test/nats", "bars"),
            Panel("VAE: reconstruction term", "train/reconstruction"),
            Panel("VAE: KL term", "train/kl"),
            Panel("squared error of validation images", "validation/squared_error"),
            Panel("squared error of test images", "test/squared_error", "bars"),
        ),
    ),
    Section(
        "GANs",
        "epoch",
        (
            Panel("FID on validation images", "validation/fid"),
            Panel("FID on test images", "test/fid", "bars"),
            Panel("FID of training images", "baseline/fid_of_training_images", "bars"),
            Panel("precision", "test/precision", "bars"),
            Panel("recall", "test/recall", "bars"),
            Panel("loss of the generator", "train/generator_loss"),
            Panel("loss of the critic", "train/critic_loss"),
        ),
    ),
    Section(
        "Films and pictures",
        "env_step",
        (
            Panel("policy", "videos/policy", "media"),
            Panel("samples", "plots/samples", "media"),
            Panel("reconstructions", "plots/reconstructions", "media"),
            Panel("interpolation", "plots/interpolation", "media"),
            Panel("completions", "plots/completions", "media"),
            Panel("samples over nearest training images", "plots/nearest", "media"),
            Panel("latent map", "plots/latent_map", "media"),
            Panel("where RAM looked", "plots/glimpses_png", "media"),
            Panel("confusions", "plots/confusion", "media"),
            Panel("values", "plots/values", "media"),
            Panel("learning curve", "plots/learning_curve", "media"),
            Panel("training curves", "plots/training_curves", "media"),
        ),
    ),
    Section(
        "Speed and memory",
        "time/wall_s",
        (
            Panel("environment steps per second", "speed/env_steps_per_s"),
            Panel("updates per second", "speed/updates_per_s"),
            Panel("images per second", "speed/images_per_s"),
            Panel("environment steps per second, whole run", "speed/env_steps_per_s", "bars"),
            Panel("wall time, seconds", "wall_s", "bars"),
            Panel("peak memory, MB", "memory/peak_mb", "bars"),
        ),
    ),
)
COLUMNS = (
    "run:displayName", "config:agent.value", "config:env_id.value", "config:seed.value", "run:state",
    "summary:eval/return_mean.last", "summary:test/error", "summary:test/bits_per_dim", "summary:test/nats",
    "summary:test/fid", "summary:wall_s", "summary:memory/peak_mb",
)  # fmt: skip
"""Of the table of runs."""
PLAIN = {name: name for name in ("agent", "encoder", "seed", "device", "parameters", "total_steps", "epochs")}
"""Settings that every run has; `known_settings` has all."""
MOST = 50
"""Groups or runs that a panel draws; by default W&B's are 10."""


@dataclass(frozen=True)
class Dashboard:
    """Show a project on Weights & Biases: a workspace and a report of curves over seeds, scores, pictures,
    films, speed and runs. Without --save and --spec only says what they would show.

    Saving again replaces what was saved before under the same name.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, or folders of them: only panels of what these have logged, and in the report a part for
    each environment or dataset. Without: everything that foveal logs."""
    by: tuple[str, ...] = ("agent",)
    """Settings whose values make runs one curve, seeds of it; apart from the environment or dataset."""
    project: str | None = None
    """W&B's project; by default WANDB_PROJECT, or foveal."""
    entity: str | None = None
    """User or team that it belongs to; by default WANDB_ENTITY, or the account's own."""
    name: str = "foveal"
    """Name of workspace and report."""
    save: bool = False
    """Send both to W&B's server."""
    spec: bool = False
    """Print what would be sent, as JSON; with --out FILE write it there."""
    out: Path | None = None
    """With --spec: the file."""


class Part(NamedTuple):
    """Of the report: a heading, a grid of panels, and the table of the runs that they are of."""

    title: str
    task: str | None
    """The environment or dataset that its runs are of; None: any."""
    sections: tuple[Section, ...]


class Board(NamedTuple):
    """What is shown of which project."""

    project: str
    entity: str
    name: str
    by: tuple[str, ...]
    """Keys of the config as W&B has it, with an agent's own settings under `config.`."""
    sections: tuple[Section, ...]
    parts: tuple[Part, ...]


def dashboard(given: Dashboard) -> int:
    """What `foveal dashboard` does. Returns the exit code.

    Raises ValueError or OSError (ConnectionError where the server does not take it), in one line.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError("a dashboard needs wandb-workspaces: pip install 'foveal[dashboard]'")
    if given.out is not None and not given.spec:
        raise ValueError(f"out: got {given.out} without --spec, whose file it is")
    if given.out is not None and given.out.is_dir():
        raise ValueError(f"out: got {given.out}, which is a folder; takes a file")
    if given.spec and given.save:
        raise ValueError("spec and save exclude each other: print what would be sent, or send it")
    board = design(given)
    if given.save:
        send(board, given.runs)
    elif given.spec:
        text = json.dumps(spec_of(board), indent=2) + "\n"
        if given.out is None:
            print(text, end="")
        else:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(text, encoding="utf-8")
            print(f"what would be sent: {given.out}")
    else:
        print(outline(board))
        print("nothing was sent: --save sends it to W&B's server, --spec prints what would be sent")
    return 0


def design(given: Dashboard) -> Board:
    """The panels and groups that are asked for. Raises ValueError or FileNotFoundError where there are no
    runs, and for an unknown setting."""
    for field in ("project", "entity", "name"):
        text = getattr(given, field)
        if text is not None and (not text.strip() or set(text) & set("/\\#?%:\n")):
            raise ValueError(f"{field}: got {text!r}, takes a name without / \\ # ? % :")
    known = PLAIN if set(given.by) <= set(PLAIN) else known_settings()
    for name in given.by:
        check_known("setting", name, known)
    sections, parts = SECTIONS, tuple(Part(section.title, None, (section,)) for section in SECTIONS)
    if given.runs:
        names = logged(run_folders(given.runs))
        sections = of_these(*names.values())
        parts = tuple(Part(task, task, of_these(names[task])) for task in sorted(names))
    return Board(
        project=given.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        entity=given.entity or os.environ.get("WANDB_ENTITY") or "",
        name=given.name,
        by=tuple(known[name] for name in given.by),
        sections=sections,
        parts=parts,
    )


def known_settings() -> dict[str, str]:
    """What runs can be told apart by, and where W&B's config has it."""
    from ..agents import AGENTS
    from .fit import MODELS, FitOptions
    from .train import Options

    kinds: list[Any] = [*AGENTS.values(), *MODELS.values()]
    own = {name for kind in kinds for name in fields_of(kind.Config)}
    options = fields_of(Options) | fields_of(FitOptions)
    return {
        **{name: f"options.{name}" for name in options},
        **{name: f"config.{name}" for name in own},
        **PLAIN,
    }


Names = dict[str, set[str]]
"""What has been logged, by the kind of panel that shows it."""


def logged(folders: Sequence[Path]) -> dict[str, Names]:
    """What the runs have logged, by environment or dataset. Raises ValueError where none can be read."""
    found: dict[str, Names] = {}
    skipped = ""
    for folder in folders:
        try:
            run = open_run(folder)
            names = logged_names(run.rows(), run.summary, media_keys(folder))
        except ValueError as error:
            skipped = f"skipped: {error}"
            print(skipped, file=sys.stderr)
            continue
        of_task = found.setdefault(str(run.config.get("env_id")), {kind: set() for kind in names})
        for kind, some in names.items():
            of_task[kind] |= some
    if not found:
        raise ValueError(f"no runs that can be read; {skipped}")
    return found


def media_keys(folder: Path) -> set[str]:
    """Of the pictures and films in a run's W&B files."""
    return {
        key
        for line in wandb_lines(folder)
        if is_media(line.row)
        for key, value in line.row.items()
        if isinstance(value, dict)
    }


def logged_names(rows: list[dict[str, Any]], summary: Mapping[str, Any], media: set[str]) -> Names:
    """The keys that W&B knows a run by: of rows, of the summary, of media."""
    bars = set()
    for key, value in whole_summary(rows, summary).items():
        bars |= {f"{key}.{part}" for part in value} if isinstance(value, dict) else {key}
    return {"curve": {key for row in rows for key in row}, "bars": bars, "media": media}


def of_these(*names: Names) -> tuple[Section, ...]:
    """The sections, with the panels only whose metric is among the names."""
    panels = {
        section: tuple(p for p in section.panels if any(p.metric in some[p.kind] for some in names))
        for section in SECTIONS
    }
    return tuple(section._replace(panels=found) for section, found in panels.items() if found)


def outline(board: Board) -> str:
    """What is shown, as text."""
    by = ", ".join(key.removeprefix("config.").removeprefix("options.") for key in board.by)
    lines = [f"workspace and report {board.name!r} of project {board.project}, by environment, {by}"]
    for section in board.sections:
        lines.append(f"{section.title}")
        for panel in section.panels:
            against = f" against {section.axis}, mean and std" if panel.kind == "curve" else ""
            lines.append(f"  {panel.title}: {panel.metric}{against}")
    return "\n".join(lines)


# What W&B gets.


def workspace_of(board: Board) -> Any:
    """As wandb-workspaces has it."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    sections = [
        ws.Section(
            name=section.title,
            panels=[panel_of(panel, section.axis) for panel in section.panels],
            is_open=True,
            panel_settings=ws.SectionPanelSettings(x_axis=section.axis),
        )
        for section in board.sections
    ]
    sections.append(ws.Section(name="Runs", panels=[wr.RunComparer(diff_only="split")], is_open=True))
    return ws.Workspace(
        entity=board.entity,
        project=board.project,
        name=board.name,
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=MOST),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config(key) for key in ("env_id", *board.by)], pinned_columns=list(COLUMNS)
        ),
    )


def panel_of(panel: Panel, axis: str, layout: Any = None) -> Any:
    import wandb_workspaces.reports.v2 as wr

    placed = {} if layout is None else {"layout": layout}
    # Over the seeds that a group of runs is.
    over_seeds: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    if panel.kind == "media":
        return wr.MediaBrowser(title=panel.title, media_keys=[panel.metric], num_columns=2, **placed)
    if panel.kind == "bars":
        return wr.BarPlot(
            title=panel.title, metrics=[panel.metric], max_bars_to_show=MOST, **over_seeds, **placed
        )
    return wr.LinePlot(
        title=panel.title, x=axis, y=[panel.metric], title_x=axis, max_runs_to_show=MOST,
        **over_seeds, **placed,
    )  # fmt: skip


def report_of(board: Board, entity: str) -> Any:
    """As wandb-workspaces has it. With an `entity` it asks W&B's server for the project's number."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for part in board.parts:
        runs = wr.Runset(
            entity=entity,
            project=board.project if entity else "",
            name=part.title,
            filters="" if part.task is None else f"Config('env_id') == {part.task!r}",
            groupby=[f"config.{key}" for key in (*(["env_id"] if part.task is None else []), *board.by)],
            visible_columns=list(COLUMNS),
        )
        shown = [(panel, section.axis) for section in part.sections for panel in section.panels]
        panels = [
            panel_of(panel, axis, wr.Layout(x=8 * (n % 3), y=6 * (n // 3), w=8, h=6))
            for n, (panel, axis) in enumerate(shown)
        ]
        blocks += [wr.H2(part.title), wr.PanelGrid(runsets=[runs], panels=panels)]
    about = "Mean and standard deviation over the runs of each group, which differ in their seed."
    return wr.Report(
        project=board.project, entity=board.entity, title=board.name, description=about, blocks=blocks,
        width="fluid",
    )  # fmt: skip


def spec_of(board: Board) -> dict[str, Any]:
    """What would be sent: of workspace and report the name and the spec, JSON-able."""
    view, report = workspace_of(board)._to_model(), report_of(board, "")._to_model()
    about = {"entityName": board.entity, "projectName": board.project, "displayName": board.name}
    return {
        kind: about | {"spec": model.spec.model_dump(mode="json", by_alias=True, exclude_none=True)}
        for kind, model in (("workspace", view), ("report", report))
    }


def send(board: Board, runs: Sequence[Path]) -> None:
    """Save workspace and report on W&B's server, in place of those of this name. Raises ValueError without a
    key, ConnectionError where the server does not take them."""
    again = shlex.join(["foveal", "sync", *(map(str, runs) if runs else ["results"])])
    later = (
        f"the runs are kept in their folders; send them with `{again}`, and the dashboard with this command"
    )
    try:
        check_track("online")
    except ValueError as error:
        raise ValueError(f"{error}; nothing was sent, {later}") from error
    check_server(f"nothing was sent; {later}")
    with tempfile.TemporaryDirectory() as scratch, wandb_environment(Path(scratch)):
        try:
            import wandb

            api = wandb.Api(timeout=SERVER_S)
            board = board._replace(entity=board.entity or str(api.default_entity))
            if board.project not in [project.name for project in api.projects(board.entity)]:
                api.create_project(board.project, board.entity)
            workspace, report = workspace_of(board), report_of(board, board.entity)
            # Its place in W&B's table of views, by which the next save finds it again.
            place = hashlib.sha256(f"{board.entity}/{board.project}/{board.name}".encode()).hexdigest()[:11]
            workspace._internal_name = f"nw-{place}-v"
            workspace._internal_id = view_id(board, place)
            reports = api.reports(f"{board.entity}/{board.project}")
            report.id = next((old.id for old in reports if old.display_name == board.name), "")
            workspace.save()
            report.save()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConnectionError(f"W&B did not take the dashboard ({reason}); {later}") from error
    print(f"workspace: {workspace.url}")
    print(f"report: {report.url}")
    print(f"runs that are still offline get there by `{again}`")


def view_id(board: Board, place: str) -> str:
    """Of the workspace that is there already; "" where there is none."""
    from wandb_workspaces.workspaces.internal import get_view_dict

    with contextlib.suppress(ValueError):  # what it raises where there is none
        return str(get_view_dict(board.entity, board.project, place)["id"])
    return ""
