"""`foveal explain RUN`: what a trained network looks at, as pictures, and for agents as a film."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from gymnasium import spaces
from torch import Tensor, nn

from ..agents import Agent, load
from ..agents.agent import map_tensors, to_tensors
from ..envs import make_vec
from ..vision import find_weights, is_image, read_weights
from ..vision.encoder import DictEncoder
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
    observation: str | None = None
    """Of an agent that sees several images: the key of the one to explain; by default the first."""
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
    key, space = seen_image(agent, given.observation)
    score = Scores(agent, key)
    played = play(agent, given.seed)
    images, count = score.look(played), len(played.states)
    few = torch.linspace(0, count - 1, min(given.images, count)).long()
    names = [f"step {t}: {score.names[t]}" for t in few.tolist()]
    out.mkdir(parents=True, exist_ok=True)
    pictures = attributions(score.of(few), images[few], score.targets[few], names, given.methods, space, out)
    shown = torch.linspace(0, count - 1, min(max(given.features, 256), count)).long()
    labels = score.labels[shown][: given.features]
    pictures += insides(score.of(shown), images[shown], labels, score.classes, space, given, out)
    if given.video:
        path = out / "explained.mp4"
        pictures.append(("film", film(score, images, space, given.methods[0], agent, path)))
    say(f"an episode of {count:,} steps, return {played.total:g}")
    return pictures


def seen_image(agent: Agent, wanted: str | None) -> tuple[str | None, spaces.Space]:
    """The image to explain: its key among Dict observations (None where they are images), and its space."""
    space = agent.observation_space
    parts: dict[str | None, spaces.Space] = {None: space}
    if isinstance(space, spaces.Dict):
        parts = {key: part for key, part in space.items()}  # noqa: C416 - the keys may be None elsewhere
    images = {key: part for key, part in parts.items() if is_image(part)}
    if not images:
        raise ValueError(f"explain is for agents that see images; {agent.env_spec()['env_id']} shows {space}")
    if wanted is None:
        return next(iter(images.items()))
    if wanted not in images:
        known = ", ".join(map(str, images)) if isinstance(space, spaces.Dict) else "no Dict observations"
        raise ValueError(f"observation must name an image of the agent ({known}), got {wanted!r}")
    return wanted, images[wanted]


class Played(NamedTuple):
    """An episode of T steps: observations (T, ...) or a dict of them, the memory before each (T, S), the
    return."""

    obs: Any
    states: Tensor
    total: float


class Scores(nn.Module):
    """What an agent answers, as a function of one image of each observation; all else stays as it was met.

    Of Discrete actions the Q-values, or log-probabilities (B, n). Of actions that are several choices the
    log-probability of the greedy ones (B, 1). Of Box actions the mean of each coordinate (B, A), before it is
    squashed or cut: there the log-probability has no slope at the greedy action, which is its peak.
    """

    def __init__(self, agent: Agent, key: str | None):
        super().__init__()
        self.network: Any = agent.network
        self.space, self.key, self.device = agent.action_space, key, agent.device
        self.distribution: Any = getattr(agent, "distribution", None)

    def look(self, played: Played) -> Tensor:
        """Remember an episode: the others of its observations, its greedy actions, and what of each is
        explained. Returns its images (T, C, H, W)."""
        self.played = map_tensors(lambda x: x.to(self.device), played.obs), played.states.to(self.device)
        self.index = torch.arange(len(played.states))
        with torch.no_grad():
            self.greedy = torch.empty(0)
            images = self.image(self.played[0])
            if not isinstance(self.space, spaces.Discrete | spaces.Box):
                greedy = [self.mode(self.of(part).inputs(images[part])) for part in self.index.split(256)]
                self.greedy = torch.cat(greedy)
            answers = torch.cat([self.of(part)(images[part]).cpu() for part in self.index.split(256)])
        self.of(torch.arange(len(answers)))
        match self.space:
            case spaces.Discrete():
                self.targets = self.labels = answers.argmax(1)
                self.classes = [f"action {a}" for a in range(int(self.space.n))]
                self.names = [self.classes[a] for a in self.labels.tolist()]
            case spaces.Box():  # the coordinate that is furthest from where it mostly is
                mean, std = answers.mean(0), answers.std(0, correction=0)
                self.targets = self.labels = ((answers - mean).abs() / (std + 1e-6)).argmax(1)
                self.classes = [f"coordinate {i}" for i in range(answers.shape[1])]
                values = answers.gather(1, self.targets.unsqueeze(1)).squeeze(1).tolist()
                named = zip(self.targets.tolist(), values)
                self.names = [f"coordinate {i} = {value:.2f}" for i, value in named]
            case _:
                self.targets = torch.zeros(len(answers), dtype=torch.int64)
                kinds, self.labels = torch.unique(self.greedy.long().cpu(), dim=0, return_inverse=True)
                self.classes = ["actions " + " ".join(map(str, kind)) for kind in kinds.tolist()]
                self.names = [self.classes[a] for a in self.labels.tolist()]
        return images.cpu()

    def of(self, steps: Tensor) -> Scores:
        """The same, of images that were met at these steps of the episode."""
        self.index = steps
        return self

    def image(self, obs: Any) -> Tensor:
        return obs if self.key is None else obs[self.key]

    def inputs(self, x: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Observations with images x (B, C, H, W), memory (B, S) and first steps (B,), for the network."""
        index = self.index.repeat(len(x) // len(self.index))  # methods put copies of the batch in a row
        obs, memory = self.played
        if self.key is not None:
            x = {**map_tensors(lambda part: part[index], obs), self.key: x}  # type: ignore[assignment]
        return x, memory[index], torch.zeros(len(index), dtype=torch.bool, device=self.device)

    def mode(self, inputs: tuple[Any, Tensor, Tensor]) -> Tensor:
        if self.distribution is not None:
            return self.distribution.mode(self.network.act(*inputs)[0])
        return self.network.online.get_distribution(inputs[0]).mode()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float, raw values -> scores (B, K)."""
        inputs = self.inputs(x)
        index = self.index.repeat(len(x) // len(self.index))
        if self.distribution is not None:
            params = self.network.act(*inputs)[0]
            match self.space:
                case spaces.Discrete():
                    return params.log_softmax(-1)
                case spaces.Box():
                    return self.distribution.mode(params)
            return self.distribution.log_prob_entropy(params, self.greedy[index])[0].unsqueeze(1)
        online = getattr(self.network, "online", self.network)  # Stable-Baselines3's, or ours
        if not hasattr(online, "get_distribution"):
            q = online(inputs[0])
            return q.mean(1) if q.ndim == 3 else q  # quantiles (B, quantiles, n)
        distribution = online.get_distribution(inputs[0])
        match self.space:
            case spaces.Discrete():
                return distribution.distribution.logits
            case spaces.Box():
                return distribution.mode()
        return distribution.log_prob(self.greedy[index]).unsqueeze(1)


def play(agent: Agent, seed: int) -> Played:
    """A greedy episode."""
    spec = {**agent.env_spec(), "num_envs": 1, "seed": seed, "training": False}
    env = make_vec(**spec)
    observed, states, total = [], [], 0.0
    obs, state, first = env.reset(), None, np.ones(1, np.bool_)
    size = getattr(agent.network, "state_size", 0)
    try:
        while True:
            observed.append(map_tensors(torch.clone, to_tensors(obs, agent.observation_space, CPU)))
            states.append(torch.zeros(1, size) if state is None or not size else torch.tensor(state))
            action, state = agent.predict(obs, state, first, deterministic=True)
            step = env.step(action)
            obs, first = step.obs, step.reset
            total += float(step.rewards[0])
            if step.reset[0]:
                return Played(cat(observed), torch.cat(states), total)
    finally:
        env.close()


def cat(observed: Sequence[Any]) -> Any:
    """Observations (1, ...) of T steps as one (T, ...)."""
    if isinstance(observed[0], dict):
        return {key: torch.cat([obs[key] for obs in observed]) for key in observed[0]}
    return torch.cat(list(observed))


CPU = torch.device("cpu")


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
        filters = first_layer_filters(eye_of(network), tuple(images.shape[1:]))
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


def eye_of(network: Any) -> Any:
    """The part of a network that reads the images: its encoder, of several the one of the image explained."""
    key = getattr(network, "key", None)
    network = getattr(network, "network", network)
    encoder = getattr(network, "encoder", network)
    return encoder.parts[encoder.keys.index(str(key))] if isinstance(encoder, DictEncoder) else encoder


def map_of(network: Any) -> nn.Module | None:
    """The part of a network that ends in a feature map, from raw images on; None where it has none."""
    encoder = eye_of(network)
    return FeatureMap(encoder) if hasattr(encoder, "feature_map") else None


class FeatureMap(nn.Module):
    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.feature_map(images)


def film(
    score: Scores,
    images: Tensor,
    space: spaces.Space,
    method: str,
    agent: Agent,
    path: Path,
) -> Path:
    """An mp4 of an episode: each observation beside what `method` says of it, in one scale throughout."""
    bright = visible(images, space)
    heat = torch.cat(
        [
            attribute(score.of(part), images[part].float(), score.targets[part], method).sum(1).cpu()
            for part in torch.arange(len(images)).split(64)
        ]
    )
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
