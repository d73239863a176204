"""`foveal explain RUN`: what a trained network looks at, as pictures, and for agents as a film."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from gymnasium import spaces
from torch import Tensor, nn

from ..agents import Agent, load
from ..envs import make_vec
from ..vision import find_weights, is_image, read_weights
from ..vision.explain import METHODS, attribute, embed, first_layer_filters, grid, maximal_patches, overlay
from .fit import load_run
from .lifecycle import say
from .model_plots import embedding, filters_grid, labelled_grid
from .run import open_run
from .video import NoVideo, frames_per_second, write_mp4


@dataclass(frozen=True)
class Explain:
    """Show what a trained network looks at: attributions of its answers, its first filters, its features."""

    run: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder or weights file: of a classifier, or of an agent that sees images."""
    methods: tuple[str, ...] = METHODS
    """Of saliency, guided-backprop, integrated-gradients and occlusion (needs the explain extra)."""
    images: int = 8
    """Images to attribute: the first test images, or observations spread over an episode."""
    features: int = 1_000
    """Images whose features are drawn in the plane, by PCA and t-SNE; 0 for none."""
    patches: int = 8
    """Patches shown for each channel of the feature map that responds most; 0 for none."""
    video: bool = True
    """Of an agent: an mp4 of an episode, observations beside what the first method says of them."""
    seed: int = 100
    """Seed of the episode, and of t-SNE."""
    dataset: str | None = None
    """Of a classifier: another dataset than the run's."""
    data_dir: Path | None = None
    """Of a classifier: where the dataset's files are."""
    out: Path | None = None
    """Folder of the pictures; by default plots/explain in the run."""
    device: str = "auto"
    """cpu, cuda, ...; auto is cuda where there is one."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the run's environment or encoder comes from; a file alone imports nothing."""

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(f"methods are {', '.join(METHODS)}; got {', '.join(sorted(unknown))}")
        if self.images < 1:
            raise ValueError(f"images must be 1 or more, got {self.images}")
        for name in ("features", "patches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


def explain(given: Explain) -> int:
    """Draw everything, and say where it is; the exit code."""
    file = find_weights(given.run)
    description = read_weights(file)[1]
    out = given.out
    if out is None:
        try:
            out = open_run(file).path / "plots" / "explain"
        except ValueError:
            raise ValueError(
                f"{file} lies in no run folder: name a folder for the pictures with --out"
            ) from None
    if "model" in description:
        pictures = explain_model(given, out)
    else:
        pictures = explain_agent(load(file, device=given.device), given, out)
    for what, picture in pictures:
        say(f"{what}: {picture}")
    return 0


def explain_model(given: Explain, out: Path) -> list[tuple[str, Path]]:
    model, dataset = load_run(given.run, given.dataset, given.data_dir, given.device)
    if model.name != "classifier":
        raise ValueError(f"{given.run} holds a {model.name}, which has nothing to look inside")
    images = dataset.test.images[: max(given.images, given.features, 512 if given.patches else 0)]
    labels = dataset.test.labels[: len(images)]
    answers = model.predict(images)
    names = [
        f"{model.classes[a]}" if a == t else f"{model.classes[a]} (is {model.classes[t]})"
        for a, t in zip(answers.tolist(), labels.tolist())
    ]
    out.mkdir(parents=True, exist_ok=True)
    network = model.network.eval()
    few = slice(given.images)
    pictures = attributions(network, images[few], answers[few], names[few], given.methods, model.space, out)
    pictures += insides(network, images, labels[: given.features], model.classes, model.space, given, out)
    return pictures


def explain_agent(agent: Agent, given: Explain, out: Path) -> list[tuple[str, Path]]:
    if not is_image(agent.observation_space):
        raise ValueError(
            f"explain is for agents that see images; {agent.env_spec()['env_id']} shows "
            f"{agent.observation_space}"
        )
    if not isinstance(agent.action_space, spaces.Discrete):
        raise ValueError(f"explain is for agents with Discrete actions, got {agent.action_space}")
    score = Scores(agent)
    observed, states, actions, returned = play(agent, given.seed)
    chosen = torch.linspace(0, len(observed) - 1, min(given.images, len(observed))).long()
    images, answers = observed[chosen], actions[chosen]
    names = [f"step {t}: action {a}" for t, a in zip(chosen.tolist(), answers.tolist())]
    out.mkdir(parents=True, exist_ok=True)
    score.memory = states[chosen]
    space = agent.observation_space
    pictures = attributions(score, images, answers, names, given.methods, space, out)
    shown = torch.linspace(0, len(observed) - 1, min(max(given.features, 256), len(observed))).long()
    score.memory = states[shown]
    classes = [f"action {a}" for a in range(int(agent.action_space.n))]
    pictures += insides(score, observed[shown], actions[shown][: given.features], classes, space, given, out)
    if given.video:
        path = out / "explained.mp4"
        pictures.append(("film", film(score, observed, states, actions, given.methods[0], agent, path)))
    say(f"an episode of {len(observed):,} steps, return {returned:g}")
    return pictures


class Scores(nn.Module):
    """An agent's network as a function of images alone: Q-values, or log-probabilities of actions.

    `memory` is the recurrent state that each image of the batch is met with.
    """

    def __init__(self, agent: Agent):
        super().__init__()
        self.network: Any = agent.network
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float, raw values -> (B, actions)."""
        if not hasattr(self.network, "policy_head"):
            return self.network(x)
        size = self.network.state_size
        memory = x.new_zeros(len(x), size)
        if size and self.memory is not None:
            memory = self.memory.to(x).repeat(len(x) // len(self.memory), 1)
        starts = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.network.act(x, memory, starts)[0].log_softmax(-1)


def play(agent: Agent, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """A greedy episode: observations (T, C, H, W), states before them (T, S), actions (T,) from 0, return."""
    spec = {**agent.env_spec(), "num_envs": 1, "seed": seed, "training": False}
    env = make_vec(**spec)
    start = int(agent.action_space.start)  # type: ignore[attr-defined]
    observed, states, actions, total = [], [], [], 0.0
    obs, state, first = env.reset(), None, np.ones(1, np.bool_)
    size = getattr(agent.network, "state_size", 0)
    try:
        while True:
            observed.append(torch.from_numpy(np.array(obs[0])))
            states.append(
                torch.from_numpy(np.array(state[0])) if size and state is not None else torch.zeros(size)
            )
            action, state = agent.predict(obs, state, first, deterministic=True)
            actions.append(int(action[0]) - start)
            step = env.step(action)
            obs, first = step.obs, step.reset
            total += float(step.rewards[0])
            if step.reset[0]:
                return torch.stack(observed), torch.stack(states), torch.tensor(actions), total
    finally:
        env.close()


def attributions(
    function: nn.Module,
    images: Tensor,
    targets: Tensor,
    names: Sequence[str],
    methods: Sequence[str],
    space: spaces.Space,
    out: Path,
) -> list[tuple[str, Path]]:
    """A column an image: the image itself, and what each method says of it."""
    bright = visible(images, space)
    rows, shown = [[overlay(image) for image in bright]], ["image"]
    for method in methods:
        try:
            maps = attribute(function, images.float(), targets, method).cpu()
        except ValueError as reason:  # guided backpropagation through a network without ReLU, say
            say(f"{method}: none ({reason})")
            continue
        signed = bool((maps < 0).any())  # of all images, so that colours mean the same in all
        rows.append([overlay(image, part.sum(0), signed=signed) for image, part in zip(bright, maps)])
        shown.append(method)
    return [("attributions", labelled_grid(rows, shown, names, out / "attributions.png"))]


def visible(images: Tensor, space: spaces.Space) -> Tensor:
    """uint8 images with values up to 255, whatever the space's high; binary planes as they are."""
    high = int(space.high.max())  # type: ignore[attr-defined]
    return images if high in (1, 255) else (images.float() * (255 / high)).round().to(torch.uint8)


def insides(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    space: spaces.Space,
    given: Explain,
    out: Path,
) -> list[tuple[str, Path]]:
    """First filters, features in the plane, and the patches that move single channels most."""
    pictures = []
    try:
        filters = first_layer_filters(network, tuple(images.shape[1:]))
        pictures.append(("first filters", filters_grid(filters.numpy(), out / "filters.png")))
    except ValueError as reason:
        say(f"first filters: none ({reason})")
    if len(labels) >= 3:
        features = penultimate(network, images[: len(labels)])
        points = {name: embed(features, method, given.seed) for name, method in EMBEDDINGS.items()}
        pictures.append(("features", embedding(points, labels.numpy(), classes, out / "features.png")))
    part = map_of(network)
    if given.patches and part is not None:
        with torch.no_grad():
            strongest = part(images[:256].float()).amax((2, 3)).mean(0).topk(CHANNELS).indices.tolist()
        rows = []
        for channel in strongest:
            patches, _ = maximal_patches(part, images, channel, given.patches)
            rows.append([overlay(patch) for patch in visible(patches, space)])
        names = [f"channel {channel}" for channel in strongest]
        picture = labelled_grid(rows, names, [""] * len(rows[0]), out / "patches.png")
        pictures.append(("patches that excite single channels", picture))
    return pictures


EMBEDDINGS = {"PCA": "pca", "t-SNE": "tsne"}
FASTEST = 10.0
"""Frames a second of a film at most: attributions flicker."""
CHANNELS = 8
"""Channels of the feature map whose patches are shown: those that respond most."""


def penultimate(network: nn.Module, images: Tensor) -> Tensor:
    """What goes into the last linear layer: (N, features), on the CPU."""
    seen: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0].detach().flatten(1).cpu()]

    parts = []
    hooks = [m.register_forward_pre_hook(remember) for m in network.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            for batch in images.split(256):
                network(batch.float())
                parts.append(seen[0])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(parts)


def map_of(network: Any) -> nn.Module | None:
    """The part of a network that ends in a feature map, from raw images on; None where it has none."""
    network = getattr(network, "network", network)
    encoder = getattr(network, "encoder", network)
    return FeatureMap(encoder) if hasattr(encoder, "feature_map") else None


class FeatureMap(nn.Module):
    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.feature_map(images)


def film(
    score: Scores,
    observed: Tensor,
    states: Tensor,
    actions: Tensor,
    method: str,
    agent: Agent,
    path: Path,
) -> Path:
    """An mp4 of an episode: each observation beside what `method` says of it, in one scale throughout."""
    bright = visible(observed, agent.observation_space)
    maps = []
    for begin in range(0, len(observed), 64):
        part = slice(begin, begin + 64)
        score.memory = states[part]
        maps.append(attribute(score, observed[part].float(), actions[part], method).sum(1).cpu())
    heat = torch.cat(maps)
    limit = float(heat.abs().flatten(1).amax(1).quantile(0.95)) or 1.0  # a few frames stand out
    signed = bool((heat < 0).any())
    pairs = ([overlay(image), overlay(image, part, limit, signed)] for image, part in zip(bright, heat))
    frames = (even(grid(pair, columns=2)) for pair in pairs)
    try:
        speed = min(FASTEST, frames_per_second(agent.env_spec()["env_id"]))
    except NoVideo:  # the environment draws no pictures, but its observations are some
        speed = FASTEST
    beside = path.with_name(f".{path.stem}.tmp.mp4")
    try:
        write_mp4(beside, frames, speed)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def even(picture: np.ndarray) -> np.ndarray:
    """Cut to an even number of pixels each way, as the video format wants it."""
    return np.ascontiguousarray(picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2])
