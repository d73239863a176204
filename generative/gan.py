"""Generative adversarial networks: one trainer, the loss, the networks and the conditioning are choices.

Goodfellow et al. 2014 (1406.2661): minimax and non-saturating losses. Mao et al. 2016 (1611.04076):
least squares. Arjovsky et al. 2017 (1701.07875): Wasserstein, weights clipped. Gulrajani et al. 2017
(1704.00028): gradient penalty. Lim and Ye 2017 (1705.02894): hinge, with Miyato's spectral
normalisation (1802.05957). The average of the generator's weights: Yazici et al. 2018 (1806.04498).
Growing networks: Karras et al. 2017 (1710.10196).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vision import Dataset
from .gan_networks import Architecture, Conditional, CriticNorm, make_critic, make_generator
from .growing import faded, stage_of
from .metrics import Extractor, class_accuracy, class_shares, compare, fid, memorised, nearest
from .model import Generative, Learner, Moment

Loss = Literal["minimax", "non-saturating", "lsgan", "wgan", "wgan-gp", "hinge"]


@dataclass(frozen=True)
class GANConfig:
    """Hyper-parameters. A gradient step is one of the critic's; an epoch is one pass of the critic over the
    training images."""

    loss: Loss = "non-saturating"
    """minimax, non-saturating, lsgan (least squares), wgan (clipped weights), wgan-gp (gradient penalty) or
    hinge."""
    architecture: Architecture = "dcgan"
    """mlp, dcgan or resnet."""
    conditional: Conditional | None = None
    """What labels do, if anything: the generator gets a label's embedding beside the noise. embedding: the
    critic sees another one as a channel. projection: its score has a product of the label's embedding with
    its features. acgan: it also classifies, and both networks learn from that."""
    latent_size: int = 64
    """Numbers of noise, normally distributed."""
    width: int = 32
    """Channels next to the image, twice as many at each halving (dcgan), or everywhere (resnet); an eighth of
    the units of mlp."""
    critic_norm: CriticNorm = "batch"
    """Normalisation layers of a convolutional critic: batch, layer, or none. wgan-gp refuses batch, which
    makes an image's gradient depend on the others'."""
    spectral_norm: bool = False
    """Divide each of the critic's weights by its largest singular value."""
    growing: float = 0.0
    """Share of the training over which both networks of dcgan grow from the smallest map to whole images, in
    [0, 1), each size trained for as long as the next one fades in; 0: whole from the start."""
    batch_size: int = 64
    """Real images, and as many made ones, in one step."""
    n_critic: int = 1
    """Steps of the critic for each of the generator."""
    learning_rate: float = 2e-4
    """Adam's step size for the generator, before the schedule."""
    critic_learning_rate: float | None = None
    """The same for the critic; None for the generator's."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How both step sizes fall to 0 over the training."""
    beta1: float = 0.5
    """Adam's decay of the mean gradient, in [0, 1)."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient, in [0, 1)."""
    gradient_penalty: float = 10.0
    """Weight of wgan-gp's penalty."""
    clip: float = 0.01
    """Largest size of a weight of wgan's critic."""
    auxiliary: float = 1.0
    """Weight of acgan's classification in both losses."""
    ema: float = 0.999
    """Decay, a step of the generator, of the average of its weights that samples are made with;
    0 for none."""
    validate_every: int = 1
    """Epochs between two validations, each with its FID on the validation images."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward passes; losses, weights and the gradient penalty stay float32."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        for name in ("latent_size", "width", "batch_size", "n_critic", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "critic_learning_rate", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("gradient_penalty", "auxiliary"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema", "growing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.growing and self.architecture != "dcgan":
            raise ValueError(f"growing takes architecture dcgan, got {self.architecture}")
        if self.loss == "wgan-gp" and self.critic_norm == "batch" and self.architecture != "mlp":
            raise ValueError(
                "critic_norm must be layer or none with loss wgan-gp, got batch: "
                "each image's gradient would depend on the others in its batch"
            )


# What a loss is known to work with. The paper of wgan-gp has five steps of the critic for one of the
# generator; two cost less. Step sizes of 5e-4 get as far as the papers' 2e-4 in half of the steps.
ADAM: dict[str, Any] = {"learning_rate": 5e-4, "beta1": 0.0, "beta2": 0.9}
RECIPES: dict[str, dict[str, Any]] = {
    "minimax": {},
    "non-saturating": {"learning_rate": 5e-4},
    "lsgan": {},
    "wgan": {**ADAM, "learning_rate": 1e-4, "critic_norm": "none", "n_critic": 5},
    "wgan-gp": {**ADAM, "critic_norm": "none", "n_critic": 2},
    "hinge": {**ADAM, "critic_norm": "none", "spectral_norm": True},
}  # fmt: skip


def recipe(loss: str | None = None, dataset: str | None = None, **changes: Any) -> GANConfig:
    """The settings known to work for a loss, with `changes` made."""
    name = loss or GANConfig.loss
    return GANConfig(**{"loss": name, **RECIPES.get(name, {}), **changes})


# Losses: the critic's, of its scores of real and of made images (B,), and the generator's, of the latter.
# Each network minimises its own. Scores of the first two are logits.


class Losses(NamedTuple):
    """Both sides of one game."""

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) (Goodfellow et al., eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """E f(G(z)) - E f(x) (Arjovsky et al., eq. 3)."""
    return fake.mean() - real.mean()


LOSSES: dict[str, Losses] = {
    "minimax": Losses(cross_entropy, lambda fake: -F.softplus(fake).mean()),  # E log(1 - D(G(z)))
    "non-saturating": Losses(cross_entropy, lambda fake: F.softplus(-fake).mean()),  # -E log D(G(z))
    "lsgan": Losses(
        lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
        lambda fake: 0.5 * (fake - 1).square().mean(),
    ),
    "wgan": Losses(wasserstein, lambda fake: -fake.mean()),
    "wgan-gp": Losses(wasserstein, lambda fake: -fake.mean()),
    "hinge": Losses(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()
    ),
}


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """E (|grad f(x)| - 1)^2 at x = mix real + (1 - mix) fake (Gulrajani et al., eq. 3): a scalar, in the
    images' dtype whatever autocast says.

    Args:
        score: images (B, ...) -> scores (B,), each of its own image alone.
        real: images (B, ...).
        fake: images (B, ...), without a gradient.
        mix: (B,) in [0, 1).
    """
    with torch.autocast(real.device.type, enabled=False):
        mix = mix.view(-1, *[1] * (real.ndim - 1))
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slopes,) = torch.autograd.grad(score(between).sum(), between, create_graph=True)
        return (slopes.flatten(1).norm(dim=1) - 1).square().mean()


def diversity(images: Tensor, others: Tensor) -> Tensor:
    """Mean distance between two of `images` (B, ...), as a share of that between two of `others`: a scalar, 0
    where all are one. Neighbours in the batch are the pairs."""

    def spread(x: Tensor) -> Tensor:
        return (x - x.roll(1, 0)).flatten(1).norm(dim=1).mean()

    return spread(images) / spread(others).clamp(min=1e-12)


class GAN(Generative):
    """Two networks that learn from each other: one makes images, one tells them from real ones.

    >>> from foveal.vision import load_dataset
    >>> digits = load_dataset("digits", train_size=100)
    >>> gan = GAN(digits.space, digits.classes, GAN.recipe("hinge", width=8)).fit(digits, epochs=1)
    >>> gan.sample(3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3, 1, 8, 8])
    """

    name: ClassVar[str] = "gan"
    Config: ClassVar[type] = GANConfig
    recipe = staticmethod(recipe)
    run_options = staticmethod(lambda dataset: {"epochs": 80.0 if dataset == "digits" else 10.0})
    recipe_choices: ClassVar[tuple[str, ...]] = ("loss",)
    chosen_by: ClassVar[str] = "validation/closeness"
    headline: ClassVar[str] = "test/fid"
    config: GANConfig

    def build(self) -> nn.Module:
        config = self.config
        channels, height, width = self.space.shape
        shape = channels, height, width
        if self.conditional and len(self.classes) < 2:
            raise ValueError(
                f"conditional {config.conditional} needs two classes or more, got {len(self.classes)}"
            )
        classes = len(self.classes) if self.conditional else 0
        generator = make_generator(
            config.architecture, shape, classes, config.latent_size, config.width,
            config.growing > 0,
        )  # fmt: skip
        critic = make_critic(
            config.architecture, shape, classes, config.conditional, config.width, config.critic_norm,
            config.spectral_norm, config.growing > 0,
        )  # fmt: skip
        self.extractor: Extractor | None = None
        """What samples are measured with, where that is wanted."""
        self.measures = (*MEASURES, *(() if config.loss != "wgan-gp" else ("gradient_penalty",)))
        if config.conditional == "acgan":
            self.measures += ("critic_accuracy",)
        networks = nn.ModuleDict({"generator": generator, "critic": critic})
        return networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def make_learners(self) -> dict[str, Learner]:
        betas = self.config.beta1, self.config.beta2
        self.generator, self.critic = self.network["generator"], self.network["critic"]  # type: ignore[index]
        self.buffers = {name: buffer.clone() for name, buffer in self.generator.named_buffers()}
        """The generator's batch statistics, averaged as its weights are."""
        self.last = torch.zeros(2, device=self.device)
        """Loss of the generator at its last step, and the norm of its gradient."""
        self.wrong = torch.zeros((), device=self.device)
        """0, or the number of the network in NETWORKS that was the first to be no longer finite."""
        return {
            "generator": Learner(self.generator, self.config.ema, betas),
            "critic": Learner(self.critic, betas=betas),
        }

    def update(self, images: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        real = (images.float() * (2 / self.high) - 1).contiguous(memory_format=torch.channels_last)
        if self.config.growing:
            real = self.grow(real, moment.progress)
        rate = self.rate_at(moment.progress)
        measured, fake = self.critic_step(real, labels, rate)
        if (moment.step + 1) % self.config.n_critic == 0:
            self.generator_step(labels, rate)
        if self.conditional:  # neighbours are of one class, so that a single image for each is no diversity
            order = labels.argsort()
            fake, real = fake[order], real[order]
        return torch.stack([*measured[:3], *self.last, diversity(fake, real), *measured[3:]])

    def grow(self, real: Tensor, progress: float) -> Tensor:
        """Put both networks where they are to be by now; real images as fine as made ones can be there."""
        bodies: Any = self.generator.body, self.critic.body
        for body in bodies:
            body.stage.fill_(stage_of(progress, self.config.growing, body.count))
        return faded(real, bodies[0].count, *bodies[0].at())

    def critic_step(self, real: Tensor, labels: Tensor, rate: float) -> tuple[list[Tensor], Tensor]:
        """One step of the critic on images (B, C, H, W) in [-1, 1] and labels (B,): what was measured, and
        the images that were made for it."""
        config, given = self.config, labels if self.conditional else None
        with torch.no_grad(), self.autocast():
            fake = self.generator(self.draw(len(real)), given).float()
        with self.autocast():
            real_scores, real_logits = self.critic(real, given)
            fake_scores, _ = self.critic(fake, given)
        real_scores, fake_scores = real_scores.float(), fake_scores.float()
        loss = LOSSES[config.loss].critic(real_scores, fake_scores)
        measured = [loss.detach(), *self.opinions(real_scores, fake_scores)]
        if config.loss == "wgan-gp":
            mix = torch.rand(len(real), device=self.device)
            penalty = gradient_penalty(lambda x: self.critic(x, given)[0], real, fake, mix)
            loss = loss + config.gradient_penalty * penalty
            measured.append(penalty.detach())
        if real_logits is not None:
            loss = loss + config.auxiliary * F.cross_entropy(real_logits.float(), labels)
            measured.append((real_logits.argmax(1) == labels).float().mean())
        self.watch(fake, loss)
        learner = self.learners["critic"]
        learner.step(
            loss, rate * (config.critic_learning_rate or config.learning_rate) / config.learning_rate
        )
        if config.loss == "wgan":
            learner.weights.clamp_(-config.clip, config.clip)
        return measured, fake

    def generator_step(self, labels: Tensor, rate: float) -> None:
        """One step of the generator, which makes an image of each label (B,)."""
        config, given = self.config, labels if self.conditional else None
        with self.autocast():
            fake = self.generator(self.draw(len(labels)), given)
            scores, logits = self.critic(fake, given)
        loss = LOSSES[config.loss].generator(scores.float())
        self.last[0] = loss.detach()
        if logits is not None:
            loss = loss + config.auxiliary * F.cross_entropy(logits.float(), labels)
        self.watch(fake, loss)
        learner = self.learners["generator"]
        self.last[1] = learner.step(loss, rate)
        with torch.no_grad():
            steps = learner.adam.steps
            share = 1 - ((1 + steps) / (10 + steps)).clamp(max=config.ema)  # as the weights are averaged
            for name, buffer in self.generator.named_buffers():
                if buffer.is_floating_point():
                    self.buffers[name].lerp_(buffer, share)
                else:
                    self.buffers[name].copy_(buffer)

    def opinions(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """What the critic thinks of both, on average: probabilities where scores are logits, else scores."""
        real, fake = real.detach(), fake.detach()
        if self.config.loss in ("minimax", "non-saturating"):
            real, fake = real.sigmoid(), fake.sigmoid()
        return real.mean(), fake.mean()

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise (n, latent_size)."""
        return torch.randn(n, self.config.latent_size, generator=generator, device=self.device)

    # Images and scores of every step tell which network went wrong first: it soon spoils the other.

    def watch(self, fake: Tensor, loss: Tensor) -> None:
        """Note the network to blame where made images, or else a critic's loss of them, are not finite."""
        code = torch.where(
            fake.detach().sum().isfinite(), torch.where(loss.detach().isfinite(), 0.0, 2.0), 1.0
        )
        self.wrong = torch.where(self.wrong == 0, code, self.wrong)

    def check_finite(self, measured: dict[str, float]) -> None:
        broken = int(self.wrong)
        for number, name in enumerate(NETWORKS):
            if number and not broken and not bool(self.learners[name].weights.isfinite().all()):
                broken = number
        if broken:
            rate = "critic_learning_rate" if broken == 2 else "learning_rate"
            raise FloatingPointError(
                f"the {NETWORKS[broken]} is no longer finite at grad_step {self.grad_step}; "
                f"a smaller {rate} may help"
            )
        super().check_finite(measured)

    @property
    def latent_dim(self) -> int:
        return self.config.latent_size

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noise (N, latent_dim), and labels (N,) of a conditional model -> images (N, C, H, W) float32 in
        [0, 1], by the averaged generator. ValueError for labels that are missing, wrong, or not taken."""
        labels = self.check_labels(labels, len(z))
        parts = []
        with self.averaged(), self.autocast():
            for start in range(0, len(z), 500):
                part = slice(start, start + 500)
                given = None if labels is None else labels[part]
                parts.append((self.generator(z[part].to(self.device), given).float() + 1) / 2)
        return torch.cat(parts).contiguous()

    def sample(
        self, n: int, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """New images (n, C, H, W) uint8 of noise that `generator`, on the model's device, draws; of the
        labels (n,) where the model is conditional."""
        return (self.decode(self.draw(n, generator), labels) * self.high).round().byte()

    def validate(self, dataset: Dataset) -> dict[str, float]:
        """FID on as many samples as there are validation images, and its negative, which is highest at the
        best; neither without an extractor, or with too few images for its features."""
        real = dataset.validation
        if self.extractor is None or len(real) <= self.extractor.size:
            return {}
        fake = self.sample(len(real), self.fixed_noise(1), real.labels if self.conditional else None)
        distance = fid(self.extractor(real.images), self.extractor(fake))
        return {"fid": distance, "closeness": -distance}

    def test(self, dataset: Dataset) -> dict[str, Any]:
        """Samples against the test images, as many of both: what `metrics.compare` measures, which classes
        the extractor takes samples for, and whether they are copies. Without an extractor only the last.

        Raises ValueError where there are too few test images for its features.
        """
        real = dataset.test
        labels = real.labels if self.conditional else None
        fake = self.sample(len(real), self.fixed_noise(2), labels).cpu()
        measured: dict[str, Any] = memorised(fake, real, dataset.train)
        if self.extractor is None:
            return measured
        measured |= compare(real.images, fake, self.extractor, "test")
        if (judge := self.extractor.classifier) is not None:
            shares = class_shares(fake, judge)
            measured |= {"class_share_min": shares.min().item(), "class_share_max": shares.max().item()}
            if labels is not None:
                measured["class_accuracy"] = class_accuracy(fake, labels, judge)
        return measured

    def baseline(self, dataset: Dataset) -> dict[str, float]:
        """The FID that training images have: what a perfect generator would get."""
        if self.extractor is None:
            return {}
        order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
        real = dataset.train.images[order[: len(dataset.test)]]
        return {"fid_of_training_images": fid(self.extractor(real), self.extractor(dataset.test.images))}

    def pictures(self, dataset: Dataset) -> dict[str, Tensor]:
        """New images, and under each of ten the training image that is nearest to it."""
        drawn = super().pictures(dataset)
        shown = (drawn["samples"].flatten(0, 1)[:10] * self.high).round()
        copies = dataset.train.images[nearest(shown, dataset.train.images.cpu())[1]].cpu()
        return {**drawn, "nearest": torch.stack([shown, copies.float()]) / self.high}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        with super().averaged():
            mine = {name: buffer.clone() for name, buffer in self.generator.named_buffers()}
            self.put_buffers(self.buffers if self.config.ema else mine)
            try:
                yield
            finally:
                self.put_buffers(mine)

    def put_buffers(self, buffers: dict[str, Tensor]) -> None:
        for name, buffer in self.generator.named_buffers():
            buffer.copy_(buffers[name])

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        super().load_weights(tensors)
        self.buffers = {name: buffer.clone() for name, buffer in self.generator.named_buffers()}

    def extra_state(self) -> dict[str, Tensor]:
        mine = {f"buffer.{name}": buffer for name, buffer in self.network.named_buffers()}
        averaged = {f"average.{name}": buffer for name, buffer in self.buffers.items()}
        return {"last": self.last, **mine, **averaged}

    def restore_extra(self, tensors: dict[str, Tensor]) -> None:
        self.last.copy_(tensors["last"])
        for name, buffer in self.network.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[f"average.{name}"])


NETWORKS = ("", "generator", "critic")
MEASURES = ("critic_loss", "critic_real", "critic_fake", "generator_loss", "generator_gradient", "diversity")
