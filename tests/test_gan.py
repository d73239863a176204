"""GANs: what the theory says of the losses, what every choice must do, and going on as if never stopped."""

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import integrate, special, stats  # type: ignore[import-untyped]
from torch import Tensor, nn

from foveal.agents import load_checkpoint, newest_first, save_checkpoint
from foveal.generative import GAN, gan
from foveal.generative.gan import LOSSES, GANConfig, diversity, gradient_penalty
from foveal.generative.gan_networks import (
    Conditional,
    CriticBlock,
    GeneratorBlock,
    doublings,
    halvings,
    make_critic,
    make_generator,
)
from foveal.generative.growing import WHOLE, GrowingCritic, faded, stage_of
from foveal.vision import Dataset, load_dataset

TINY = {"width": 4, "latent_size": 8, "batch_size": 16}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_size=80)


def made(digits: Dataset, loss: str = "hinge", **changes) -> GAN:
    return GAN(digits.space, digits.classes, GAN.recipe(loss, **{**TINY, **changes}), seed=3, device="cpu")


def quantiles(distribution, n: int = 20_000) -> Tensor:
    return torch.from_numpy(distribution.ppf((torch.arange(n).double() + 0.5) / n))


# Losses


@pytest.mark.parametrize("loss", ["minimax", "non-saturating"])
def test_the_best_critic_of_two_normal_distributions_is_their_ratio(loss: str) -> None:
    p, q = stats.norm(0, 1), stats.norm(1.5, 0.7)
    real, fake = quantiles(p), quantiles(q)

    # The log ratio of two normal densities is a polynomial of degree 2, so this critic can be the best one.
    def score(x: Tensor, weights: Tensor) -> Tensor:
        return torch.stack((torch.ones_like(x), x, x**2), 1) @ weights

    def value(weights: Tensor) -> Tensor:
        return LOSSES[loss].critic(score(real, weights), score(fake, weights))

    weights = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):  # Newton's method; the loss is convex
        weights.requires_grad_()
        (slopes,) = torch.autograd.grad(value(weights), weights, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(s, weights, retain_graph=True)[0] for s in slopes])
        weights = (weights - torch.linalg.solve(hessian, slopes)).detach()
    assert slopes.norm() < 1e-9
    x = torch.linspace(-2, 3, 11, dtype=torch.float64)
    best = torch.from_numpy(p.pdf(x) / (p.pdf(x) + q.pdf(x)))
    torch.testing.assert_close(score(x, weights).sigmoid(), best, atol=2e-3, rtol=0)

    def divergence(x: float) -> float:
        middle = 0.5 * (p.pdf(x) + q.pdf(x))
        return 0.5 * float(special.rel_entr(p.pdf(x), middle) + special.rel_entr(q.pdf(x), middle))

    jsd = integrate.quad(divergence, -12, 12)[0]
    assert value(weights).item() == pytest.approx(2 * math.log(2) - 2 * jsd, abs=1e-3)


def slope(loss: str, score: float) -> float:
    x = torch.tensor([score], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(LOSSES[loss].generator(x), x)[0].item()


def test_only_the_saturating_loss_teaches_nothing_where_the_critic_is_sure() -> None:
    slopes = [slope("non-saturating", score) for score in (0, -5, -30)]
    assert slopes == pytest.approx([-0.5, -1 / (1 + math.exp(-5)), -1], abs=1e-9)
    assert slope("minimax", -30) == pytest.approx(0, abs=1e-12)
    assert slope("minimax", 0) == -0.5


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 1.0])
    expected = {
        "lsgan": (0.5 * ((1 + 0.25) / 2 + (4 + 1) / 2), 0.5 * (9 + 0) / 2),
        "wgan": (-0.5 - 1.25, 0.5),
        "wgan-gp": (-0.5 - 1.25, 0.5),
        "hinge": ((0 + 0.5) / 2 + (0 + 2) / 2, 0.5),
        "minimax": (
            sum(math.log1p(math.exp(-x)) for x in (2, 0.5)) / 2
            + sum(math.log1p(math.exp(x)) for x in (-2, 1)) / 2,
            sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in (-2, 1)) / 2,
        ),
    }
    for name, (critic, generator) in expected.items():
        assert LOSSES[name].critic(real, fake).item() == pytest.approx(critic), name
        assert LOSSES[name].generator(fake).item() == pytest.approx(generator), name


def test_every_loss_moves_scores_apart_and_the_generator_upwards() -> None:
    for name, losses in LOSSES.items():
        real, fake = torch.tensor([0.1], requires_grad=True), torch.tensor([0.3], requires_grad=True)
        up, down = torch.autograd.grad(losses.critic(real, fake), (real, fake))
        assert up < 0 < down, name
        assert slope(name, 0.3) < 0, name


# Gradient penalty


def test_the_penalty_of_a_linear_critic_is_exact() -> None:
    direction = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64, requires_grad=True)
    real, fake, mix = torch.randn(5, 1, 2, 2).double(), torch.randn(5, 1, 2, 2).double(), torch.rand(5)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ direction, real, fake, mix)
    assert penalty.item() == pytest.approx((5 - 1) ** 2)
    # d (c - 1)^2 / d w = 2 (c - 1) w / c: it can be learned from.
    (slopes,) = torch.autograd.grad(penalty, direction)
    assert slopes.tolist() == pytest.approx([2 * 4 * 0.6, 0, 2 * 4 * 0.8, 0])


def test_the_penalty_is_an_images_own_at_its_own_mixture() -> None:
    # f(x) = |x|^2 / 2 has the gradient x.
    real, fake = torch.full((3, 1, 1, 1), 3.0), torch.full((3, 1, 1, 1), 1.0)
    mix = torch.tensor([0.0, 0.5, 1.0])
    penalty = gradient_penalty(lambda x: 0.5 * x.flatten(1).square().sum(1), real, fake, mix)
    assert penalty.item() == pytest.approx((0 + 1 + 4) / 3)


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("architecture", ["mlp", "dcgan", "resnet"])
def test_scores_of_a_critic_that_may_be_penalised_are_each_of_one_image(architecture, norm) -> None:
    critic = make_critic(architecture, (1, 8, 8), 0, None, 4, norm, False).double().train()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    for index in range(4):
        (slopes,) = torch.autograd.grad(critic(images)[0][index], images)
        others = [i for i in range(4) if i != index]
        assert slopes[index].abs().sum() > 0
        assert slopes[others].abs().sum() == 0


def test_batch_normalisation_under_a_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="critic_norm must be layer or none with loss wgan-gp, got batch"):
        GANConfig(loss="wgan-gp", critic_norm="batch")


def test_the_penalty_is_float32_in_mixed_precision(digits: Dataset) -> None:
    seen = []

    def score(x: Tensor) -> Tensor:
        seen.append((x.dtype, (x.flatten(1) @ weight).dtype))
        return (x.flatten(1) @ weight).squeeze(1)

    weight = torch.randn(64, 1, requires_grad=True)
    images = torch.randn(3, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = gradient_penalty(score, images, images + 1, torch.rand(3))
    assert seen == [(torch.float32, torch.float32)]
    assert penalty.dtype == torch.float32
    model = made(digits, "wgan-gp", precision="bfloat16").fit(digits, 1)
    assert all(p.dtype == torch.float32 for p in model.network.parameters())


# Networks


def test_sides_that_convolutions_make() -> None:
    expected = {8: (2, 2), 12: (2, 3), 16: (2, 4), 28: (2, 7), 32: (3, 4), 64: (4, 4), 84: (2, 21), 6: (1, 3)}
    assert {side: doublings(side, side)[:2] for side in expected} == expected
    assert doublings(28, 56) == (2, 7, 14)
    for height, width in ((27, 27), (28, 27), (250, 250), (2, 2), (1, 8)):
        with pytest.raises(ValueError, match=f"got {height}x{width}; dcgan and mlp make any"):
            doublings(height, width)


def test_dcgan_halves_to_a_map_that_sees_the_whole_image() -> None:
    sides = {8: [4, 2], 28: [14, 7, 4], 32: [16, 8, 4], 64: [32, 16, 8, 4], 84: [42, 21, 11, 6], 3: [2]}
    assert {side: [h for h, _ in halvings(side, side)] for side in sides} == sides
    assert halvings(27, 56) == [(14, 28), (7, 14), (4, 7)]
    with pytest.raises(ValueError, match="3 pixels a side or more, got 2x9"):
        halvings(2, 9)
    torch.manual_seed(0)
    for shape in ((1, 28, 28), (2, 27, 14), (1, 5, 7)):
        images = make_generator("dcgan", shape, 0, 6, 4)(torch.randn(2, 6))
        assert images.shape == (2, *shape)
        critic = make_critic("dcgan", shape, 0, None, 4, "none", False)
        x = images.detach().requires_grad_()
        critic(x)[0].sum().backward()
        assert x.grad is not None
        assert (x.grad != 0).all()  # every pixel is looked at
    seen, critic = 1, make_critic("dcgan", (1, 28, 28), 0, None, 4, "none", False)
    for layer in reversed(list(critic.body.children())):
        if isinstance(layer, nn.Conv2d):
            seen = (seen - 1) * 2 + layer.kernel_size[0]
    assert seen == 18  # pixels a side that a feature depends on


@pytest.mark.parametrize("architecture", ["mlp", "dcgan", "resnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 28, 28)])
def test_shapes_and_ranges(architecture, shape) -> None:
    generator = make_generator(architecture, shape, 5, 6, 4)
    labels = torch.arange(5)
    images = generator(torch.randn(5, 6), labels)
    assert images.shape == (5, *shape)
    assert images.abs().max() <= 1
    for conditional in (None, "embedding", "projection", "acgan"):
        critic = make_critic(architecture, shape, 5, conditional, 4, "batch", True)
        scores, logits = critic(images, labels)
        assert scores.shape == (5,)
        assert (logits is None) == (conditional != "acgan")
        assert logits is None or logits.shape == (5, 5)


def test_an_mlp_makes_what_others_cannot() -> None:
    assert make_generator("mlp", (1, 7, 5), 0, 6, 2)(torch.randn(2, 6)).shape == (2, 1, 7, 5)


@pytest.mark.parametrize("conditional", ["embedding", "projection"])
@pytest.mark.parametrize("architecture", ["mlp", "dcgan", "resnet"])
def test_a_conditional_critic_looks_at_labels(architecture, conditional) -> None:
    torch.manual_seed(0)
    critic = make_critic(architecture, (1, 8, 8), 3, conditional, 4, "none", False)
    image = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    scores = critic(image, torch.arange(3))[0]
    assert len(set(scores.tolist())) == 3


def test_projection_is_the_product_of_embedding_and_features() -> None:
    critic = make_critic("dcgan", (1, 8, 8), 3, "projection", 4, "none", False)
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([2, 0, 2])
    features = critic.body(images)
    assert critic.projection is not None
    expected = features @ critic.score.weight[0] + critic.score.bias
    expected = expected + (critic.projection(labels) * features).sum(1)
    torch.testing.assert_close(critic(images, labels)[0], expected)


@pytest.mark.parametrize("architecture", ["mlp", "dcgan", "resnet"])
def test_spectral_normalisation_makes_every_layer_of_norm_1(architecture) -> None:
    torch.manual_seed(0)
    critic = make_critic(architecture, (1, 8, 8), 3, "projection", 4, "none", True).train()
    for _ in range(100):  # power iterations, one a pass
        critic(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    critic.eval()
    layers = [m for m in critic.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(layers) >= 4
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert largest == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("side", [16, 128])
def test_activations_do_not_grow_with_depth(side: int) -> None:
    """A skip that is added twice doubles them at every block."""
    torch.manual_seed(0)
    generator = make_generator("resnet", (1, side, side), 0, 16, 16).train()
    critic = make_critic("resnet", (1, side, side), 0, None, 16, "none", False).train()
    sizes: dict[str, list[float]] = {"generator": [], "critic": []}
    for name, network in (("generator", generator), ("critic", critic)):
        for module in network.modules():
            if isinstance(module, GeneratorBlock | CriticBlock):
                module.register_forward_hook(lambda _, __, out, n=name: sizes[n].append(out.std().item()))
    critic(generator(torch.randn(16, 16)))
    assert len(sizes["generator"]) == len(sizes["critic"]) - 1 == (2 if side == 16 else 5)
    for name, growth in ((n, b / a) for n, s in sizes.items() for a, b in itertools.pairwise(s)):
        assert growth < 1.75, (name, sizes)


def test_a_block_adds_its_skip_once() -> None:
    x = torch.randn(2, 3, 4, 4)
    up, down = GeneratorBlock(3, 5).eval(), CriticBlock(3, 5, "none")
    for block in (up, down):
        for parameter in block.conv2.parameters():
            nn.init.zeros_(parameter)
    torch.testing.assert_close(up(x), up.skip(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    torch.testing.assert_close(down(x), nn.functional.avg_pool2d(down.skip(x), 2))


# Training


@pytest.mark.parametrize("conditional", [None, "embedding", "projection", "acgan"])
@pytest.mark.parametrize(("loss", "architecture"), [
    ("minimax", "mlp"), ("non-saturating", "dcgan"), ("lsgan", "dcgan"), ("wgan", "mlp"),
    ("wgan-gp", "resnet"), ("hinge", "resnet"),
])  # fmt: skip
def test_every_choice_trains_and_samples(digits: Dataset, loss, architecture, conditional) -> None:
    model = made(digits, loss, architecture=architecture, conditional=conditional)
    before = {name: learner.weights.clone() for name, learner in model.learners.items()}
    rows = list(model.training(digits, 1, log_every=2))
    assert model.grad_step == 5
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {"train/critic_real", "train/critic_fake", "train/diversity"} <= set(rows[0])
    assert ("train/gradient_penalty" in rows[0]) == (loss == "wgan-gp")
    assert ("train/critic_accuracy" in rows[0]) == (conditional == "acgan")
    for name, learner in model.learners.items():
        assert not torch.equal(learner.weights, before[name]), name
    labels = torch.tensor([1, 2, 3]) if conditional else None
    images = model.sample(3, torch.Generator().manual_seed(0), labels)
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert images.max() <= 16
    assert torch.equal(images, model.sample(3, torch.Generator().manual_seed(0), labels))


def test_labels_change_what_is_made(digits: Dataset) -> None:
    model = made(digits, conditional="projection").fit(digits, 1)
    z = torch.randn(1, 8).expand(2, -1)
    a, b = model.decode(z, torch.tensor([0, 1]))
    assert not torch.equal(a, b)


def test_the_generator_steps_once_for_several_of_the_critic(digits: Dataset) -> None:
    model = made(digits, n_critic=3)
    model.fit(digits, 1)  # 5 steps of the critic
    assert model.learners["critic"].adam.steps == 5
    assert model.learners["generator"].adam.steps == 1


def test_weights_are_clipped(digits: Dataset) -> None:
    model = made(digits, "wgan", clip=0.02).fit(digits, 1)
    assert model.learners["critic"].weights.abs().max().item() == pytest.approx(0.02)
    assert model.learners["generator"].weights.abs().max() > 0.05


def test_a_steps_gradient_leaves_the_other_network_alone(digits: Dataset) -> None:
    model = made(digits, loss="non-saturating")
    real, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.zeros(6, dtype=torch.int64)
    generator, critic = (model.learners[name].weights for name in ("generator", "critic"))
    before = generator.clone(), critic.clone()
    model.network.train()
    model.critic_step(real, labels, 1e-3)
    assert torch.equal(generator, before[0])
    after = critic.clone()
    assert not torch.equal(after, before[1])
    model.generator_step(labels, 1e-3)
    assert torch.equal(critic, after)
    assert not torch.equal(generator, before[0])


def test_diversity_of_one_image_is_0_and_of_the_same_images_1() -> None:
    images = torch.randn(20, 1, 4, 4)
    assert diversity(images[:1].expand(20, -1, -1, -1), images) == 0
    assert diversity(images, images) == 1
    assert diversity(0.5 * images, images).item() == pytest.approx(0.5)


def test_one_image_a_class_is_no_diversity(digits: Dataset, monkeypatch) -> None:
    def logged(conditional: Conditional | None) -> float:
        model = made(digits, conditional=conditional, batch_size=80)

        def step(real: Tensor, labels: Tensor, rate: float) -> tuple[list[Tensor], Tensor]:
            return [torch.zeros(())] * 3, torch.randn(10, 1, 8, 8, generator=generator)[labels]

        generator = torch.Generator().manual_seed(0)
        monkeypatch.setattr(model, "critic_step", step)
        return next(model.training(digits, 1))["train/diversity"]

    assert logged("projection") < 0.4
    assert logged(None) > 1


def test_samples_come_from_the_averaged_generator(digits: Dataset) -> None:
    plain, averaged = made(digits, ema=0.0).fit(digits, 4), made(digits, ema=0.999).fit(digits, 4)
    z = torch.randn(4, 8)
    # What is trained is the same, what is looked at is not.
    assert torch.equal(plain.learners["generator"].weights, averaged.learners["generator"].weights)
    assert not torch.equal(plain.decode(z), averaged.decode(z))
    plain.generator.eval()
    torch.testing.assert_close(plain.decode(z), (plain.generator(z).detach() + 1) / 2)


def test_looking_at_samples_changes_nothing(digits: Dataset) -> None:
    looked, left = made(digits), made(digits)
    for _ in looked.training(digits, 3, log_every=1):
        looked.sample(2, torch.Generator().manual_seed(1))
        looked.weights()
    list(left.training(digits, 3, log_every=7))
    assert looked.grad_step == 15
    for name, tensor in left.network.state_dict().items():
        assert torch.equal(tensor, looked.network.state_dict()[name]), name


def test_the_noise_is_not_drowned_by_the_label() -> None:
    """Within a class images vary far more than between classes at the start, or each stays one image."""
    torch.manual_seed(0)
    generator = make_generator("dcgan", (1, 16, 16), 10, 64, 8)
    labels = torch.arange(200) % 10
    with torch.no_grad():
        images = generator(torch.randn(200, 64), labels).flatten(1)
    within = torch.stack([images[labels == k].var(0).sum() for k in range(10)]).mean()
    between = torch.stack([images[labels == k].mean(0) for k in range(10)]).var(0).sum()
    assert within > 10 * between


# Going on


@pytest.mark.parametrize(("loss", "architecture", "conditional"), [
    ("wgan-gp", "dcgan", None), ("hinge", "resnet", "projection"), ("non-saturating", "dcgan", "acgan"),
    ("hinge", "growing", None),
])  # fmt: skip
def test_a_resumed_training_is_the_one_that_never_stopped(digits, tmp_path, loss, architecture, conditional):
    growing = 0.9 if architecture == "growing" else 0.0  # so that it stops in the middle of a fade
    choices = {
        "architecture": "dcgan" if growing else architecture,
        "conditional": conditional,
        "n_critic": 2,
    }
    choices |= {"growing": growing}
    whole = made(digits, loss, **choices)
    rows = list(whole.training(digits, 4, log_every=3))
    stopped = made(digits, loss, **choices)
    first = []
    for row in stopped.training(digits, 4, log_every=3):
        first.append(row)
        if row["grad_step"] == 9:  # in the middle of an epoch
            break
    save_checkpoint(stopped, tmp_path)
    folder = newest_first(tmp_path)[0]
    resumed = GAN.load(folder, device="cpu")
    assert load_checkpoint(folder, resumed)
    rest = list(resumed.training(digits, 4, log_every=3))

    def plain(rows):
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]

    assert plain([*first, *rest]) == plain(rows)
    for before, after in ((whole.weights(), resumed.weights()), (whole.state()[0], resumed.state()[0])):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name


def test_a_saved_model_makes_the_same_images(digits: Dataset, tmp_path) -> None:
    model = made(digits, conditional="embedding").fit(digits, 2)
    loaded = GAN.load(model.save(tmp_path / "gan.safetensors"), device="cpu")
    z, labels = torch.randn(4, 8), torch.tensor([0, 3, 3, 9])
    assert torch.equal(loaded.decode(z, labels), model.decode(z, labels))
    assert loaded.config == model.config


# What goes wrong


@pytest.mark.parametrize("broken", ["generator", "critic"])
def test_a_network_that_is_not_finite_is_named(digits: Dataset, broken: str) -> None:
    model = made(digits)
    training = model.training(digits, 4, log_every=2)
    assert [next(training)["grad_step"], next(training)["grad_step"]] == [2, 4]
    model.learners[broken].weights[3] = math.nan
    with pytest.raises(FloatingPointError, match=f"the {broken} is no longer finite at grad_step 5"):
        next(training)  # the end of the epoch


@pytest.mark.parametrize("broken", ["generator", "critic"])
def test_a_step_that_breaks_a_network_is_its_own(digits: Dataset, broken: str, monkeypatch) -> None:
    """At the last step before a row, so that no later one could show it: such a row would be saved."""
    model = made(digits)
    step = model.learners[broken].step

    def bad(loss, rate, *rest):
        norm = step(loss, rate, *rest)
        if model.grad_step == 3:
            model.learners[broken].weights[0] = math.inf
        return norm

    monkeypatch.setattr(model.learners[broken], "step", bad)
    with pytest.raises(FloatingPointError, match=f"the {broken} is no longer finite at grad_step 4"):
        list(model.training(digits, 4, log_every=4))


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss": "hing"}, "loss must be one of minimax, non-saturating, .* got 'hing'"),
    ({"n_critic": 0}, "n_critic must be 1 or more, got 0"),
    ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
    ({"critic_learning_rate": -1.0}, "critic_learning_rate must be greater than 0"),
    ({"gradient_penalty": -1.0}, "gradient_penalty must be 0 or more"),
    ({"ema": 1.0}, "ema must be at least 0 and less than 1"),
    ({"beta1": math.nan}, "beta1 must be at least 0 and less than 1"),
])  # fmt: skip
def test_settings_out_of_range(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        GAN.recipe(**{"loss": "hinge", **changes})


def test_wrong_labels_and_sizes(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="without labels"):
        made(digits).sample(2, labels=torch.tensor([0, 1]))
    conditional = made(digits, conditional="acgan")
    with pytest.raises(ValueError, match="labels"):
        conditional.sample(2)
    with pytest.raises(ValueError, match="from 0 to 9, got 10"):
        conditional.sample(2, labels=torch.tensor([0, 10]))
    odd = load_dataset("digits", size=9)
    with pytest.raises(ValueError, match="got 9x9; dcgan and mlp make any"):
        made(odd, architecture="resnet")
    for architecture in ("dcgan", "mlp"):
        assert made(odd, architecture=architecture).sample(1).shape == (1, 1, 9, 9)


def test_recipes_are_of_every_loss() -> None:
    assert set(gan.RECIPES) == set(LOSSES)
    for loss in LOSSES:
        assert GAN.recipe(loss).loss == loss


# Growing


GROWN: dict[str, Any] = {"growing": 0.5, "width": 8}


@pytest.fixture(scope="module")
def growing() -> GAN:
    data = load_dataset("digits", train_size=80, size=16)  # 4, 8 and 16 pixels
    return made(data, "wgan-gp", **GROWN).fit(data, 2)


@pytest.mark.parametrize("level", [1, 2])
def test_a_block_that_has_not_faded_in_leaves_the_smaller_network(growing: GAN, level: int) -> None:
    body, critic = growing.generator.body.double(), growing.critic.body.double()
    noise, images = torch.randn(3, 8).double(), torch.randn(3, 1, 16, 16).double()
    with torch.no_grad():
        smaller = body.draw(noise, level - 1, 1.0)
        assert torch.equal(body.draw(noise, level, 0.0), smaller)
        blocks = smaller.unflatten(2, (-1, 2 ** (3 - level))).unflatten(4, (-1, 2 ** (3 - level)))
        assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))  # enlarged
        grown, half = body.draw(noise, level, 1.0), body.draw(noise, level, 0.5)
        assert torch.allclose(half, (smaller + grown) / 2)
        assert not torch.allclose(smaller, grown)
        assert torch.allclose(critic.look(images, level, 0.0), critic.look(images, level - 1, 1.0))
        assert not torch.allclose(critic.look(images, level, 1.0), critic.look(images, level - 1, 1.0))
    growing.generator.body.float(), growing.critic.body.float()


def test_the_end_of_a_fade_is_the_grown_network(growing: GAN) -> None:
    body = growing.generator.body
    noise = torch.randn(3, 8)
    with torch.no_grad():
        body.stage.fill_(2 * WHOLE - 1)
        almost = body(noise)
        body.stage.fill_(2 * WHOLE)
        assert torch.equal(body(noise), body.draw(noise, 2, 1.0))
        assert (body(noise) - almost).abs().max() < 3 / WHOLE


def test_each_size_is_trained_for_as_long_as_the_next_one_fades_in() -> None:
    stages = [
        stage_of(progress, 0.8, 2) / WHOLE for progress in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.99)
    ]
    assert stages == pytest.approx([0, 0, 0, 0.5, 1, 1, 1, 1.5, 2, 2], abs=2 / WHOLE)
    body = GrowingCritic(1, [4, 4, 4], [nn.Identity(), nn.Identity()])
    for stage, (level, alpha) in ((0, (0, 1)), (1, (1, 1 / WHOLE)), (WHOLE, (1, 1)), (1.5 * WHOLE, (2, 0.5))):
        body.stage.fill_(int(stage))
        assert body.at() == (level, alpha)


def test_real_images_are_no_finer_than_made_ones() -> None:
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(faded(x, 2, 2, 1.0), x)
    coarse = faded(x, 2, 1, 1.0)
    assert torch.allclose(
        coarse, torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    assert torch.allclose(faded(x, 2, 2, 0.25), 0.25 * x + 0.75 * coarse)


def test_a_growing_gan_is_saved_at_the_size_that_it_has(tmp_path) -> None:
    data = load_dataset("digits", train_size=80, size=16)
    gan = made(data, **GROWN)
    seen = []
    for row in gan.training(data, 4, log_every=2):
        seen.append(gan.generator.body.at())
        if row["grad_step"] == 4:
            break
    assert seen[0][0] == 0
    assert 0 < seen[-1][1] < 1
    again = GAN.load(gan.save(tmp_path / "growing.safetensors"), device="cpu")
    assert again.generator.body.at() == seen[-1]
    assert torch.equal(again.sample(4, again.fixed_noise()), gan.sample(4, gan.fixed_noise()))
    gan.fit(data, 4)
    assert gan.generator.body.at() == (2, 1.0)
    with pytest.raises(ValueError, match="growing takes architecture dcgan, got mlp"):
        made(data, growing=0.5, architecture="mlp")
