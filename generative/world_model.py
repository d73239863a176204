"""World Models (Ha and Schmidhuber 2018, 1803.10122): what comes next, told from latents of what is seen.

A VAE, trained before and kept as it is, turns each frame into a latent z. A recurrent network takes z, the
action and its own state, and its new state h gives a mixture density of the next z (Bishop 1994; a mixture
for each dimension, as in the paper), the reward, and whether the episode ends. An agent then sees z and the h
of the steps before it (`runs/latent_env.py`); and from a first frame on the model can dream, its own draws of
z in place of frames. Training, reading along with a real episode and dreaming all go through
`Network.forward`.

Where the code deviates from the paper: rewards are predicted too, and the state starts from zero wherever a
window of training does.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import Dataset, Split
from ..vision.encoder import preprocess
from ..vision.model import Row
from .model import Generative, Moment
from .vae import VAE, VAEConfig

WINDOW = 32
"""Steps that are learned from at once, and that gradients go back through."""


# What is learned from.


class Steps(NamedTuple):
    """T steps of N environments, in order: what was seen, what was done, what came of it.

    After a step that ended an episode the next frame is the first of another one.
    """

    frames: Tensor
    """(T, N, C, H, W) uint8."""
    actions: Tensor
    """(T, N) int64, from 0."""
    rewards: Tensor
    """(T, N) float32, true ones."""
    terminated: Tensor
    """(T, N) bool."""
    truncated: Tensor
    """(T, N) bool."""

    @property
    def ended(self) -> Tensor:
        """(T, N) bool: the next frame is of another episode."""
        return self.terminated | self.truncated

    @property
    def starts(self) -> Tensor:
        """(T, N) bool: the frame is the first of an episode, or of what is known."""
        return torch.cat([torch.ones_like(self.ended[:1]), self.ended[:-1]])


@dataclass(frozen=True, eq=False)
class Experience(Dataset):
    """What `foveal collect` wrote, as steps in order; its classes are the actions.

    A split's items are windows of `WINDOW` steps, one after the other: of each the first frame, and as its
    label t * N + n, where it begins.
    """

    steps: dict[str, Steps] = field(default_factory=dict)
    """Of `train`, `validation` and `test`."""

    @property
    def digest(self) -> str:
        """sha256 of all steps, in hex."""
        digest = hashlib.sha256()
        for name, steps in self.steps.items():
            for tensor in steps:
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


PARTS = {"train": "", "validation": "val_", "test": "test_"}
"""Split -> what the names of its arrays begin with."""


def read_experience(dataset: Dataset, path: str | Path) -> Experience:
    """The steps in an .npz of `foveal collect`, whose frames were read (and perhaps binarised) as `dataset`.

    ValueError where it holds no steps, or too few of them, or where the dataset is but a part of the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name.rpartition("_")[2] != "images"}
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset: a world model takes an .npz of foveal collect, got {path}") from error
    names = ("actions", "rewards", "terminated", "truncated")
    lacking = [name for name in ("num_actions", "num_envs", *names) if name not in arrays]
    if lacking:
        raise ValueError(
            f"dataset: {path} has no {lacking[0]}; foveal collect writes them, with --every 1 and where "
            "actions are Discrete"
        )
    envs, steps = int(arrays["num_envs"]), {}
    for part, prefix in PARTS.items():
        images = getattr(dataset, part).images
        count = len(arrays[f"{prefix}actions"])
        if len(images) != count:
            raise ValueError(
                f"dataset: a world model takes all {count:,} {part} frames of {path}, in order, got "
                f"{len(images):,} (no validation, folds, train_size or test_size)"
            )
        whole = count // envs
        if whole <= WINDOW:
            raise ValueError(
                f"dataset: {path} has {whole} {part} steps of {envs} environments; a world model takes more "
                f"than {WINDOW}"
            )
        rest = [
            torch.from_numpy(arrays[prefix + name][: whole * envs]).unflatten(0, (-1, envs)) for name in names
        ]
        steps[part] = Steps(images[: whole * envs].unflatten(0, (-1, envs)), *rest)
    windows = {name: _windows(part) for name, part in steps.items()}
    return Experience(
        dataset.name,
        windows["train"],
        windows["validation"],
        windows["test"],
        classes=tuple(map(str, range(int(arrays["num_actions"])))),
        high=dataset.high,
        grey=dataset.grey,
        steps=steps,
    )


def _windows(steps: Steps) -> Split:
    time, envs = steps.actions.shape
    first = torch.arange(0, time - WINDOW, WINDOW)
    begin = (first[:, None] * envs + torch.arange(envs)).flatten()
    return Split(steps.frames.flatten(0, 1)[begin], begin)


# The model.


@dataclass(frozen=True)
class WorldModelConfig:
    """Hyper-parameters. An epoch is one pass over the training frames, in windows of 32 steps."""

    vae: str = ""
    """Run, checkpoint or weights file of a VAE that was trained on such frames; it is kept as it is."""
    hidden_size: int = 128
    """Width of the LSTM: of h, which an agent sees beside z."""
    mixtures: int = 5
    """Gaussians in the density of each dimension of the next z."""
    event_weight: float = 10.0
    """Weight of the losses of reward and ending, which are rare, beside that of the next z."""
    batch_size: int = 32
    """Windows in one gradient step; as many as there are, at most."""
    learning_rate: float = 2e-3
    """Adam's step size before the schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the step size falls over the training: not, or to 0 by half a cosine, or linearly."""
    max_grad_norm: float | None = 1.0
    """L2 norm that gradients are clipped to; None for no limit."""
    ema: float = 0.0
    """Decay a step of an average of the weights, which is then what is validated and saved; 0 for none."""
    validate_every: int = 5
    """Epochs between two validations."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "mixtures", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.event_weight >= 0:
            raise ValueError(f"event_weight must be 0 or more, got {self.event_weight}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {self.ema}")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")


def recipe(
    backbone: str | None = None, dataset: str | None = None, encoder: str | None = None, **changes: Any
) -> WorldModelConfig:
    """The defaults, with `changes` made. ValueError for an encoder: it is the VAE's."""
    if encoder is not None:
        raise ValueError(f"encoder: a world model sees with its VAE's, got {encoder!r}")
    return WorldModelConfig(**changes)


def run_options(dataset: str) -> dict[str, Any]:
    """Defaults of `foveal train world-model`."""
    return {"epochs": 60.0, "pictures_every": 20.0}


class Prediction(NamedTuple):
    """What is said of the next step; any leading axes (...), float32."""

    log_weights: Tensor
    """(..., D, K), log of the mixtures' weights, which sum to one over K."""
    means: Tensor
    """(..., D, K)"""
    log_sigmas: Tensor
    """(..., D, K), log of standard deviations."""
    reward: Tensor
    """(...), the mean of the reward."""
    ending: Tensor
    """(...), the logit of that the step terminates the episode."""


LEAST_LOG_SIGMA = -5.0
"""Of a predicted z, whose own noise is not much smaller; keeps densities finite where z does not change."""


def mixture_log_prob(prediction: Prediction, z: Tensor) -> Tensor:
    """Log-density of the next z (..., D), in nats, a mixture for each dimension: (...)."""
    log_sigmas = prediction.log_sigmas
    standard = (z.unsqueeze(-1) - prediction.means) * (-log_sigmas).exp()  # (..., D, K)
    log_normal = -0.5 * standard.square() - log_sigmas - 0.5 * math.log(2 * math.pi)
    return (prediction.log_weights + log_normal).logsumexp(-1).sum(-1)


def mixture_mean(prediction: Prediction) -> Tensor:
    """Expectation of the next z: (..., D)."""
    return (prediction.log_weights.exp() * prediction.means).sum(-1)


def mixture_draw(
    prediction: Prediction, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """A next z, (..., D). The temperature divides the logits of the weights and multiplies variances, as in
    the paper."""
    logits, means, log_sigmas = prediction[:3]
    uniform = torch.rand(logits.shape, device=logits.device, generator=generator).clamp(1e-9, 1 - 1e-7)
    # The largest of logits with Gumbel noise is a draw of the softmax.
    chosen = (logits / temperature - (-uniform.log()).log()).argmax(-1, keepdim=True)
    mean, log_sigma = (part.gather(-1, chosen).squeeze(-1) for part in (means, log_sigmas))
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    return mean + math.sqrt(temperature) * log_sigma.exp() * noise


class Network(nn.Module):
    """The VAE's network, which is not trained, and the recurrent one."""

    def __init__(self, vae: nn.Module, latent_dim: int, actions: int, config: WorldModelConfig):
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.latent_dim, self.actions, self.mixtures = latent_dim, actions, config.mixtures
        self.core = nn.LSTMCell(latent_dim + actions, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 3 * latent_dim * config.mixtures + 2)
        self.register_buffer("first", torch.zeros(FIRST, latent_dim))
        self.first: Tensor
        """Latents of frames that episodes began with, for dreams to begin with."""

    def forward(self, z: Tensor, actions: Tensor, state: Tensor, starts: Tensor) -> Tensor:
        """One step: z (B, D), actions (B,) int64, the state before (B, 2H), and where z is the first of an
        episode, whose state before is zero, (B,) bool -> the state after it, h and c (B, 2H)."""
        one_hot = (actions.unsqueeze(1) == torch.arange(self.actions, device=z.device)).to(z.dtype)
        kept = state * ~starts.unsqueeze(1)
        return torch.cat(self.core(torch.cat([z, one_hot], 1), tuple(kept.chunk(2, 1))), 1)

    def predict(self, state: Tensor) -> Prediction:
        """States (..., 2H) -> what comes next, from their h."""
        out = self.head(state[..., : self.core.hidden_size]).float()
        mixture, rest = out.split([out.shape[-1] - 2, 2], -1)
        logits, means, log_sigmas = mixture.unflatten(-1, (3, self.latent_dim, self.mixtures)).unbind(-3)
        return Prediction(
            logits.log_softmax(-1), means, log_sigmas.clamp(LEAST_LOG_SIGMA), rest[..., 0], rest[..., 1]
        )


FIRST = 256
"""First frames that dreams choose from."""


class Dream(NamedTuple):
    """n episodes of T steps that nothing but the model plays."""

    z: Tensor
    """(T, n, D); after an ending the last one stays."""
    actions: Tensor
    """(T - 1, n) int64, random ones."""
    over: Tensor
    """(T, n) bool, True from the step on that an ending led to."""


class Codes(NamedTuple):
    """Steps, whose frames are q(z | frame) by now: on the model's device."""

    mean: Tensor
    """(T, N, D)"""
    sigma: Tensor
    """(T, N, D)"""
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    ended: Tensor
    starts: Tensor


class WorldModel(Generative):
    """Predicts what an agent will see, get, and when it is over; see the module's page."""

    name: ClassVar[str] = "world-model"
    Config: ClassVar[type] = WorldModelConfig
    recipe = staticmethod(recipe)
    run_options = staticmethod(run_options)
    measures: tuple[str, ...] = ("loss", "nats", "reward_error", "ending_nats", "grad_norm")
    chosen_by: ClassVar[str] = "validation/log_prob"
    headline: ClassVar[str] = "test/nats"
    config: WorldModelConfig
    network: Network

    def __init__(
        self,
        space: spaces.Box,
        classes: Sequence[str],
        config: WorldModelConfig | None = None,
        seed: int = 0,
        device: str = "auto",
        vae: VAE | None = None,
    ):
        """`vae` is taken in place of the run that the config names."""
        config = config or WorldModelConfig()
        if vae is None:
            if not config.vae:
                raise ValueError("vae must be the run of a VAE that was trained on such frames (--vae RUN)")
            vae = VAE.load(config.vae, device="cpu")
        if vae.space != space:
            raise ValueError(f"vae: {config.vae} sees {vae.space}, these frames are {space}")
        if vae.conditional:
            raise ValueError(f"vae: {config.vae} takes labels (--conditional), which frames have none of")
        for learner in vae.learners.values():
            learner.average = None  # what was loaded is the average already
        self.vae = vae
        self.codes: Codes | None = None
        super().__init__(space, classes, config, seed, device)

    def build(self) -> nn.Module:
        network = Network(self.vae.network, self.vae.latent_dim, len(self.classes), self.config)
        self.vae.device = self.device  # the network moves there as a part of ours
        return network

    # A file is whole without the VAE's own.

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"vae": self.vae.describe()}

    @classmethod
    def rebuild(cls, description: dict[str, Any], config: Any, device: str) -> Self:
        space, classes, seed = cls.described(description)
        of_vae = description["vae"]
        vae = VAE(
            VAE.described(of_vae)[0], of_vae["classes"], VAEConfig(**of_vae["config"]), of_vae["seed"], "cpu"
        )
        return cls(space, classes, config, seed, device, vae)

    # Learning.

    @torch.no_grad()
    def encoded(self, steps: Steps) -> Codes:
        q = self.vae.posterior(steps.frames.flatten(0, 1))
        mean, sigma = q.mean, (0.5 * q.log_var).exp()
        time_envs = steps.actions.shape
        rest = (steps.actions, steps.rewards, steps.terminated, steps.ended, steps.starts)
        return Codes(
            mean.unflatten(0, time_envs), sigma.unflatten(0, time_envs), *(x.to(self.device) for x in rest)
        )

    def training(self, dataset: Dataset, epochs: float, log_every: int = 100) -> Iterator[Row]:
        self.codes = self.encoded(steps_of(dataset, "train"))
        first = self.codes.mean[self.codes.starts]
        self.network.first.copy_(first[torch.arange(FIRST) % len(first)])
        yield from super().training(dataset, epochs, log_every)

    def update(self, images: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        """One step on windows, which begin anywhere within WINDOW steps of where `labels` say."""
        assert self.codes is not None
        time, envs = self.codes.actions.shape
        shift = torch.randint(WINDOW, labels.shape, device=self.device)
        begin = (labels // envs + shift).clamp(max=time - 1 - WINDOW)
        at = (begin + torch.arange(WINDOW + 1, device=self.device)[:, None], labels % envs)  # (W + 1, B)
        window = Codes(*(part[at] for part in self.codes))
        # Of the codes themselves a network learns by heart where each sigma says that they may lie anywhere.
        z = window.mean + window.sigma * torch.randn_like(window.mean)
        nats, reward_error, ending_nats = self.losses(z, window)
        loss = nats + self.config.event_weight * (0.5 * reward_error + ending_nats)
        rate = self.rate_at(moment.progress)
        norm = self.learners["network"].step(loss, rate, self.config.max_grad_norm)
        return torch.stack([loss, nats, reward_error, ending_nats, norm]).detach()

    def losses(self, z: Tensor, codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
        """Of all steps but the last of z (T, B, D), means: nats of the next z where the episode goes on, the
        reward's squared error, nats of endings."""
        prediction = self.network.predict(self.states(z[:-1], codes.actions, codes.starts))
        on = ~codes.ended[:-1]
        nats = -(mixture_log_prob(prediction, z[1:]) * on).sum() / on.sum().clamp(min=1)
        reward_error = (prediction.reward - codes.rewards[:-1]).square().mean()
        ending_nats = F.binary_cross_entropy_with_logits(
            prediction.ending, codes.terminated[:-1].to(prediction.ending.dtype)
        )
        return nats, reward_error, ending_nats

    def states(self, z: Tensor, actions: Tensor, starts: Tensor) -> Tensor:
        """States after each step of z (T, B, D), from zeros before the first: (T, B, 2H). `actions` and
        `starts` may go further than z."""
        state, states = self.no_state(z.shape[1]), []
        for step in range(len(z)):
            state = self.network(z[step], actions[step], state, starts[step])
            states.append(state)
        return torch.stack(states)

    def no_state(self, n: int) -> Tensor:
        """The state before a first step: (n, 2H)."""
        return torch.zeros(n, 2 * self.config.hidden_size, device=self.device)

    # Measuring.

    @torch.no_grad()
    def measure(self, steps: Steps, number: int) -> dict[str, float]:
        """Of a whole stretch, its states carried on from step to step; z is drawn, always alike."""
        codes = self.encoded(steps)
        noise = torch.randn(codes.mean.shape, device=self.device, generator=self.fixed_noise(number))
        with self.averaged():
            nats, reward_error, ending_nats = self.losses(codes.mean + codes.sigma * noise, codes)
        return {
            "nats": nats.item(),
            "reward_error": reward_error.item(),
            "ending_nats": ending_nats.item(),
        }

    def validate(self, dataset: Dataset) -> dict[str, float]:
        """Of the next z, in nats, and of rewards and endings."""
        measured = self.measure(steps_of(dataset, "validation"), 1)
        return {"log_prob": -measured["nats"], **measured}

    @torch.no_grad()
    def test(self, dataset: Dataset) -> dict[str, float]:
        """The same of the test steps, and `frame_error`: of what the next frame is expected to be, the
        squared error, a sum over pixels in [0, 1]."""
        steps = steps_of(dataset, "test")
        x, expected, on = self.next_frames(steps)
        error = (x[1:] - expected).square().flatten(2).sum(2)[on].mean().item()
        return self.measure(steps, 2) | {"frame_error": error}

    @torch.no_grad()
    def next_frames(self, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled frames (T, N, C, H, W), what was expected in place of all but the first (T - 1, N, ...), and
        which of these are of the same episode as the frame before them (T - 1, N) bool."""
        codes = self.encoded(steps)
        with self.averaged():
            states = self.states(codes.mean[:-1], codes.actions, codes.starts)
            expected = self.vae.decode(mixture_mean(self.network.predict(states)).flatten(0, 1))
        x = preprocess(steps.frames.to(self.device), self.space)
        return x, expected.unflatten(0, states.shape[:2]), ~codes.ended[:-1]

    def baseline(self, dataset: Dataset) -> dict[str, float]:
        """What needs no model: the next z as Gaussians of the training latents, the mean reward, the share of
        endings; and of frames the last one again, and its reconstruction."""
        train, test = (self.encoded(steps_of(dataset, part)) for part in ("train", "test"))
        on = ~test.ended[:-1]
        variance = train.mean.flatten(0, 1).var(0) + train.sigma.flatten(0, 1).square().mean(0)
        away = test.mean - train.mean.flatten(0, 1).mean(0)
        nats = 0.5 * ((away.square() + test.sigma.square()) / variance + (2 * math.pi * variance).log()).sum(
            2
        )
        x = preprocess(steps_of(dataset, "test").frames.to(self.device), self.space)
        again = self.vae.decode(test.mean.flatten(0, 1)).unflatten(0, test.mean.shape[:2])
        share = train.terminated.double().mean().clamp(1e-6, 1 - 1e-6)
        ends = test.terminated[:-1].double().mean()

        def error(frames: Tensor, of: Tensor) -> float:
            return (frames - of).square().flatten(2).sum(2)[on].mean().item()

        return {
            "gaussian_nats": nats[1:][on].mean().item(),
            "mean_reward_error": (test.rewards[:-1] - train.rewards.mean()).square().mean().item(),
            "ending_share_nats": -(ends * share.log() + (1 - ends) * (1 - share).log()).item(),
            "same_frame_error": error(x[:-1], x[1:]),
            "reconstruction_error": error(again[1:], x[1:]),
        }

    # Dreaming.

    @torch.no_grad()
    def dream(
        self, n: int, steps: int, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Dream:
        """Episodes of random actions, from first frames of the training on."""
        device = self.device
        z = self.network.first[torch.randint(FIRST, (n,), device=device, generator=generator)]
        state, over = self.no_state(n), torch.zeros(n, dtype=torch.bool, device=device)
        seen, done, ended = [z], [], [over]
        with self.averaged():
            for step in range(steps - 1):
                action = torch.randint(len(self.classes), (n,), device=device, generator=generator)
                state = self.network(z, action, state, torch.full_like(over, step == 0))
                prediction = self.network.predict(state)
                drawn = mixture_draw(prediction, temperature, generator)
                chance = torch.rand(n, device=device, generator=generator)
                over = over | (chance < prediction.ending.sigmoid())
                z = torch.where(over.unsqueeze(1), z, drawn)
                seen.append(z)
                done.append(action)
                ended.append(over)
        return Dream(torch.stack(seen), torch.stack(done), torch.stack(ended))

    def sample(
        self, n: int, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Frames (n, C, H, W) uint8 of dreams of eight steps each, in order; likeliest pixels."""
        self.check_labels(labels, n)
        z = self.dream(math.ceil(n / 8), 8, generator).z.transpose(0, 1)
        return (self.vae.decode(z.flatten(0, 1)[:n]) * self.high).round().to(torch.uint8)

    def pictures(self, dataset: Dataset) -> dict[str, Tensor]:
        """Dreams, a row each, black where they are over; and test frames over what was expected there."""
        z, _, over = self.dream(8, 12, self.fixed_noise())
        dreams = self.vae.decode(z.transpose(0, 1).flatten(0, 1)).unflatten(0, (8, 12))
        test = steps_of(dataset, "test")
        few = Steps(*(part[:13, :4] for part in test))
        x, expected, _ = self.next_frames(few)
        pairs = torch.stack([x[1:], expected], 1).transpose(0, 2)  # (N, 2, T, C, H, W)
        return {
            "dreams": (dreams * ~over.T[..., None, None, None]).cpu(),
            "predictions": pairs.flatten(0, 1).cpu(),
        }


def steps_of(dataset: Dataset, part: str) -> Steps:
    """ValueError for a dataset of images without order."""
    if not isinstance(dataset, Experience):
        raise ValueError("dataset: a world model takes an .npz of foveal collect")
    return dataset.steps[part]
