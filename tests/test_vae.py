"""VAE and autoencoders: their numbers against closed forms, and that they learn."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from foveal.generative import (
    LIKELIHOODS,
    VAE,
    Autoencoder,
    Moment,
    bits_per_dim,
    discretized_logistic_log_prob,
    independent_pixels,
    make_decoder,
)
from foveal.generative.autoencoder import bernoulli_kl, jacobian_norm
from foveal.generative.latent import class_sum, line, traverse
from foveal.generative.vae import Posterior, draw_latent, kl_divergence, log_ratio
from foveal.vision import ENCODERS, Dataset, Split, binarize, load_dataset, make_encoder

SPACE = spaces.Box(0, 1, (1, 4, 4), np.uint8)
CLASSES = ("a", "b", "c")
MOMENT = Moment(0, 10.0, 0.5)


def tiny(
    config: Any = None, space: spaces.Box = SPACE, seed: int = 0, kind: Any = VAE, **changes: Any
) -> Any:
    return kind(space, CLASSES, config or kind.Config(latent_dim=3, **changes), seed=seed, device="cpu")


def images(n: int, space: spaces.Box = SPACE, seed: int = 0) -> torch.Tensor:
    high = int(space.high.max())
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(high + 1, size=(n, *space.shape), dtype=np.uint8))


def dataset_of(pixels: torch.Tensor, high: int, test: torch.Tensor | None = None) -> Dataset:
    parts = [
        Split(x, torch.arange(len(x)) % 3) for x in (pixels, pixels[:9], pixels if test is None else test)
    ]
    return Dataset("made", parts[0], parts[1], parts[2], CLASSES, high)


# Likelihoods.


@pytest.mark.parametrize("mean", [-40.0, -1.0, 0.013, 1.0, 40.0])
@pytest.mark.parametrize("log_scale", [-50.0, -7.0, -2.0, 3.0, 30.0])
def test_a_discretized_logistic_sums_to_one_and_has_finite_gradients(mean, log_scale):
    x = (torch.arange(256) / 127.5 - 1).double()
    location = torch.tensor(mean, requires_grad=True)
    scale = torch.tensor(log_scale, requires_grad=True)
    log_p = discretized_logistic_log_prob(location, scale, x, 255)
    assert log_p.dtype == torch.float32
    assert log_p.exp().sum().item() == pytest.approx(1, abs=2e-5)
    assert log_p.isfinite().all()
    for pixel in (0, 255, 128):
        gradients = torch.autograd.grad(log_p[pixel], [location, scale], retain_graph=True)
        assert all(gradient.isfinite() for gradient in gradients)


def test_a_discretized_logistic_by_hand():
    """Middle, lowest and highest of five levels, in float64."""
    x = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)
    location = torch.tensor(0.1, dtype=torch.float64)
    log_p = discretized_logistic_log_prob(location, torch.tensor(-1.0, dtype=torch.float64), x, 4)
    below = [1 / (1 + math.exp(-math.e * (edge - 0.1))) for edge in (-0.75, -0.25, 0.25, 0.75)]
    assert log_p.exp().tolist() == pytest.approx([below[2] - below[1], below[0], 1 - below[3]], rel=1e-12)


def test_uniform_pixels_cost_eight_bits_whatever_the_batch():
    scale = torch.full((1, 2, 4, 4), 30.0)  # a logistic so wide that all its mass is in the outer bins
    assert LIKELIHOODS["logistic"].log_prob(scale, torch.zeros(1, 1, 4, 4), 255).mean() == pytest.approx(
        math.log(0.5), abs=1e-5
    )
    ramp = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    for part in (ramp, ramp[:37]):
        nats = independent_pixels(dataset_of(ramp, 255, part))
        assert bits_per_dim(nats, 4) == pytest.approx(8, abs=1e-9)


@pytest.mark.parametrize("logit", [-30.0, -2.0, -0.06, -0.04, 0.0, 0.04, 0.06, 3.0, 30.0])
def test_a_continuous_bernoulli_integrates_to_one_and_has_its_mean(logit):
    one = LIKELIHOODS["continuous-bernoulli"]
    at = torch.tensor([logit], dtype=torch.float64)

    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = one.log_prob(at, x, 1).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=2e-6)
    mean = torch.trapezoid(x * density, x).item()
    assert one.mean(at).item() == pytest.approx(mean, abs=2e-6)
    generator = torch.Generator().manual_seed(0)
    drawn = one.draw(at.float().expand(40_000), 1, generator)
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * 0.3 / 200)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_have_the_mean_that_is_shown(name):
    """Where draws are not cut off at 0 and 1."""
    kind = LIKELIHOODS[name]
    parameters = torch.full((1, kind.parameters, 150, 150), 0.4)
    parameters[:, 1:] = -4.0
    drawn = kind.draw(parameters, 255 if name == "logistic" else 1, torch.Generator().manual_seed(0))
    assert drawn.shape == (1, 1, 150, 150)
    assert drawn.mean().item() == pytest.approx(kind.mean(parameters).mean().item(), abs=0.015)
    assert 0 <= drawn.min() < drawn.max() <= 1


def test_gaussian_log_density_by_hand():
    parameters = torch.tensor([0.3, -1.0]).reshape(1, 2, 1, 1)
    log_p = LIKELIHOODS["gaussian"].log_prob(parameters, torch.full((1, 1, 1, 1), 0.5), 1).item()
    sigma = math.exp(-1)
    wanted = -0.5 * (0.2 / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
    assert log_p == pytest.approx(wanted, abs=1e-6)


# The bound.


def test_kl_in_closed_form_is_that_of_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    q = Posterior(
        torch.randn(4, 3, generator=generator).double(), torch.randn(4, 3, generator=generator).double()
    )
    wide = Posterior(*(part.repeat_interleave(50_000, 0) for part in q))
    z, noise = draw_latent(wide, generator)
    each = -log_ratio(z, noise, wide).unflatten(0, (4, -1))
    error = each.std(1) / 50_000**0.5
    assert ((each.mean(1) - kl_divergence(q).sum(1)).abs() < 4 * error).all()
    assert (error < 0.02).all()
    normal = torch.distributions.Normal(q.mean, (0.5 * q.log_var).exp())
    exact = torch.distributions.kl_divergence(
        normal, torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    )
    assert torch.allclose(kl_divergence(q), exact)


def test_a_repeated_batch_has_the_same_loss_and_the_reconstruction_is_a_sum_over_pixels(monkeypatch):
    """Noise is switched off: it would be another for each copy."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    x = images(6)
    one, twice = (
        tiny(seed=1).update(part, torch.zeros(len(part)), MOMENT) for part in (x, x.repeat(2, 1, 1, 1))
    )
    assert torch.allclose(one, twice, atol=1e-5)
    # A model that says 1/2 everywhere costs ln 2 a pixel, a quarter as many pixels a quarter.
    for side in (4, 8):
        space = spaces.Box(0, 1, (1, side, side), np.uint8)
        model = tiny(space=space)
        model.learners["network"].weights.zero_()
        loss, reconstruction, kl, _ = model.update(images(5, space), torch.zeros(5), MOMENT).tolist()
        assert reconstruction == pytest.approx(side * side * math.log(2), rel=1e-6)
        assert (loss, kl) == (pytest.approx(reconstruction), pytest.approx(0))


def test_beta_warm_up_and_free_bits_weigh_the_kl(monkeypatch):
    x = images(8)

    def terms(epoch: float = 10.0, **config: Any) -> tuple[float, float, float]:
        torch.manual_seed(0)
        loss, reconstruction, kl, _ = tiny(seed=2, **config).update(x, x, Moment(0, epoch, 0.5)).tolist()
        return loss, reconstruction, kl

    _, reconstruction, kl = terms()
    assert kl > 0.01
    assert terms(beta=4.0)[0] == pytest.approx(reconstruction + 4 * kl, rel=1e-5)
    assert terms(kl_warmup=40.0)[0] == pytest.approx(reconstruction + kl / 4, rel=1e-5)
    assert terms(kl_warmup=40.0, epoch=0.0)[0] == pytest.approx(reconstruction, rel=1e-5)
    assert terms(free_bits=5.0)[0] == pytest.approx(reconstruction + 3 * 5.0, rel=1e-5)
    with pytest.raises(ValueError, match="importance_samples above 1 takes no free_bits"):
        VAE.Config(importance_samples=2, free_bits=2.0)


def exact_log_prob(model: Any, x: torch.Tensor, grid: int = 201) -> torch.Tensor:
    """log p(x) of a model with one latent, by the trapezoidal rule over z."""
    z = torch.linspace(-8, 8, grid).unsqueeze(1)
    with torch.no_grad():
        logits = model.network.decode(z, None)  # (G, 1, 4, 4)
    log_p = -torch.nn.functional.binary_cross_entropy_with_logits(
        logits.unsqueeze(0).expand(len(x), -1, -1, -1, -1),
        x.float().unsqueeze(1).expand(-1, grid, -1, -1, -1),
        reduction="none",
    )
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z.squeeze(1)) + math.log(16 / (grid - 1))
    return (log_p.flatten(2).sum(2) + prior).logsumexp(1)


def test_the_bounds_order_and_reach_the_likelihood():
    x = images(12, seed=3)
    model = tiny(VAE.Config(latent_dim=1, learning_rate=0.01, batch_size=12))
    model.fit(dataset_of(x, 1), 60)
    exact = exact_log_prob(model, x)
    rng = torch.Generator().manual_seed(0)
    bounds = [
        torch.stack([model.iwae(x, k, generator=rng) for _ in range(400 // k)]).mean(0) for k in (1, 4, 40)
    ]
    elbo = model.elbo(x, generator=rng, samples=2000)
    assert (bounds[0] - elbo).abs().max() < 0.3  # both estimate the same
    assert bounds[0].mean() < bounds[1].mean() < bounds[2].mean() < exact.mean() + 0.02
    assert (elbo <= exact + 0.05).all()
    far = model.iwae(x, 20_000, generator=rng)
    assert (far - exact).abs().max() < 0.05
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        model.iwae(x, 0)


def test_probabilities_of_all_images_sum_to_one():
    """Of 2x2 pixels, by the bound of many samples."""
    space = spaces.Box(0, 1, (1, 2, 2), np.uint8)
    every = torch.tensor([[(i >> bit) & 1 for bit in range(4)] for i in range(16)], dtype=torch.uint8)
    model = tiny(VAE.Config(latent_dim=1), space=space, seed=4)
    total = (
        model.iwae(every.reshape(16, 1, 2, 2), 4000, generator=torch.Generator().manual_seed(0)).exp().sum()
    )
    assert total.item() == pytest.approx(1, abs=0.01)


def ppca_log_likelihood(x: np.ndarray, latents: int) -> float:
    """Mean log-density of data where PPCA's is greatest (Tipping and Bishop 1999, eq. 8 and 12)."""
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))[::-1]
    rest = values[latents:].mean()
    log_det = np.log(values[:latents]).sum() + (len(values) - latents) * np.log(rest)
    return -0.5 * (len(values) * math.log(2 * math.pi) + log_det + len(values))


def test_a_linear_vae_reaches_the_likelihood_of_probabilistic_pca():
    rng = np.random.default_rng(0)
    space = spaces.Box(0, 255, (1, 3, 3), np.uint8)
    hidden = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 9)) + 0.5 * rng.normal(size=(400, 9))
    pixels = np.clip(128 + 22 * hidden, 0, 255).astype(np.uint8).reshape(-1, 1, 3, 3)
    wanted = ppca_log_likelihood(pixels.reshape(-1, 9) / 255.0, 2)
    config = VAE.Config(
        encoder="linear", likelihood="gaussian", latent_dim=2, batch_size=400, learning_rate=0.03,
        importance_samples=4, validate_every=10_000,
    )  # fmt: skip
    model = tiny(config, space=space)
    x = torch.from_numpy(pixels)
    model.fit(dataset_of(x, 255), 1200, log_every=10_000)
    found = model.iwae(x, 200, generator=torch.Generator().manual_seed(0)).mean().item()
    assert found == pytest.approx(wanted, abs=1e-3)
    assert model.elbo(
        x, generator=torch.Generator().manual_seed(0), samples=200
    ).mean().item() == pytest.approx(wanted, abs=5e-3)


# What is refused.


def test_values_outside_of_the_likelihood_are_refused():
    grey = spaces.Box(0, 255, (1, 4, 4), np.uint8)
    with pytest.raises(
        ValueError, match="likelihood bernoulli takes images of 0 and 1, these have values up to"
    ):
        tiny(space=grey, likelihood="bernoulli")
    with pytest.raises(ValueError, match="loss cross-entropy takes images of 0 and 1"):
        tiny(space=grey, kind=Autoencoder, loss="cross-entropy")
    half = torch.full((2, 1, 4, 4), 0.5)
    for model in (tiny(), tiny(space=grey)):
        for method in (model.elbo, lambda x, m=model: m.iwae(x, 2), model.encode):
            with pytest.raises(ValueError, match="images must have whole values from 0 to"):
                method(half)
    assert tiny(likelihood="continuous-bernoulli").elbo(half).isfinite().all()
    with pytest.raises(ValueError, match="images must have values from 0 to 1, got 0 to 2"):
        tiny().elbo(torch.tensor([0.0, 2.0]).repeat(8).reshape(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"images must be \(N, 1, 4, 4\), got \(2, 1, 5, 5\)"):
        tiny().encode(torch.zeros(2, 1, 5, 5))
    nan = torch.full((1, 1, 4, 4), math.nan)
    with pytest.raises(ValueError, match="images must have values from 0 to 1, got nan"):
        tiny(likelihood="continuous-bernoulli").elbo(nan)


def test_labels_are_asked_for_and_refused():
    x = images(3)
    with pytest.raises(ValueError, match="labels: this vae was trained without labels"):
        tiny().sample(3, labels=torch.zeros(3, dtype=torch.int64))
    model = tiny(conditional=True)
    with pytest.raises(ValueError, match="labels: this vae is conditional, it takes a label for each image"):
        model.elbo(x)
    with pytest.raises(ValueError, match="labels must be from 0 to 2, got 3"):
        model.sample(1, labels=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"labels must be \(3,\) integers, got \(2,\)"):
        model.elbo(x, torch.tensor([0, 1]))


# Networks.


@pytest.mark.parametrize(
    ("name", "shape"),
    [*itertools.product(ENCODERS, [(1, 37, 41), (3, 36, 36)]), ("resnet20,norm=group", (3, 9, 18))],
)
def test_every_encoder_has_a_decoder_that_makes_images_of_its_size(name, shape):
    space = spaces.Box(0, 255, shape, np.uint8)
    decoder = make_decoder(make_encoder(name, space), 5, space, 2)
    made = decoder(torch.randn(2, 5))
    assert made.shape == (2, 2 * shape[0], *shape[1:])
    every = torch.autograd.grad(made.square().sum(), list(decoder.parameters()), allow_unused=True)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in every)


def test_convolutions_are_mirrored():
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    decoder = make_decoder(make_encoder("nature", space), 5, space, 1)
    turned = [layer for layer in decoder if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert [layer.kernel_size[0] for layer in turned] == [3, 4, 8]
    assert [(layer.in_channels, layer.out_channels) for layer in turned] == [(64, 64), (64, 32), (32, 4)]


# What is made.


def test_a_conditional_model_makes_images_of_the_class():
    """Each class is one picture."""
    pictures = images(3, seed=5)
    model = tiny(conditional=True, batch_size=30, learning_rate=0.01)
    model.fit(dataset_of(pictures.repeat(30, 1, 1, 1), 1), 60)
    labels = torch.tensor([2, 0, 1, 1])
    drawn = model.sample(4, torch.Generator().manual_seed(0), labels)
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn, pictures[labels])


def test_samples_of_every_likelihood_are_images():
    grey = spaces.Box(0, 15, (1, 4, 4), np.uint8)
    for name in ("continuous-bernoulli", "gaussian", "logistic"):
        model = tiny(space=grey, likelihood=name)
        x = images(8, grey)
        model.fit(dataset_of(x, 15), 2)
        drawn = model.sample(50, torch.Generator().manual_seed(0))
        assert drawn.shape == (50, 1, 4, 4)
        assert drawn.max() <= 15
        assert (model.elbo(x) <= model.iwae(x, 200) + 2).all()
        assert ("independent_pixels_nats" in model.baseline(dataset_of(x, 15))) == (name == "logistic")


def test_lines_between_latents():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    straight, circle = line(a, b, 3), line(a, b, 3, spherical=True)
    assert torch.allclose(straight[:, 1], (a + b) / 2)
    for ways in (straight, circle):
        assert torch.allclose(ways[:, 0], a)
        assert torch.allclose(ways[:, 2], b)
    assert torch.allclose(circle[0, 1], torch.tensor([2.0, 2.0]) / 2**0.5)
    assert torch.allclose(circle[1, 1], torch.zeros(2))  # opposite ways: no one circle
    with pytest.raises(ValueError, match="steps must be 2 or more, got 1"):
        line(a, b, 1)


def test_traversals_and_class_sums():
    moved = traverse(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]), 3, 2.0)
    assert moved.tolist() == [[[0.0, 2.0], [1.0, 2.0], [2.0, 2.0]], [[1.0, 0.0], [1.0, 2.0], [1.0, 4.0]]]
    codes, labels = torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 1])
    assert class_sum(codes, labels, [(1, 0), (-1, 1)]).tolist() == [-8.0]
    with pytest.raises(ValueError, match="none is of class 2"):
        class_sum(codes, labels, [(1, 2)])


# Autoencoders.


def test_the_sparse_and_contractive_terms():
    on = torch.tensor([[0.2, 0.5], [0.4, 0.5]], dtype=torch.float64)
    wanted = 0.3 * math.log(0.3 / 0.5) + 0.7 * math.log(0.7 / 0.5)
    assert bernoulli_kl(0.3, on).item() == pytest.approx(wanted)
    matrix = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixels = torch.zeros(40_000, 5, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(40_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = jacobian_norm(pixels @ matrix.T, pixels, probe).item()
    assert found == pytest.approx(matrix.square().sum().item(), rel=0.03)


def test_each_kind_of_autoencoder_learns_what_it_is_for():
    digits = load_dataset("digits", train_size=300)

    def trained(kind: str, **config: Any) -> Autoencoder:
        given = {"latent_dim": 32, "batch_size": 50, "learning_rate": 3e-3, "validate_every": 99, **config}
        settings = Autoencoder.Config(kind=kind, encoder="mlp-tanh", **given)
        return Autoencoder(digits.space, digits.classes, settings, device="cpu").fit(digits, 60)

    def sizes(model: Autoencoder) -> torch.Tensor:
        return model.encode(digits.test.images).abs()

    plain = trained("undercomplete")
    assert plain.test(digits)["squared_error"] < 0.45 * plain.baseline(digits)["mean_image"]
    loose, tight = (trained("sparse-l1", penalty=penalty) for penalty in (0.0, 1.0))
    assert sizes(tight).mean() < 0.5 * sizes(loose).mean()
    sparse = trained("sparse-kl", sparsity=0.1, penalty=2.0)
    assert sizes(sparse).mean().item() == pytest.approx(0.1, abs=0.05)
    noisy = digits.test.images * (torch.rand(digits.test.images.shape) > 0.3)
    denoising = trained("denoising")

    def error(model: Autoencoder) -> float:
        made = model.decode(model.encode(noisy))
        return (made - digits.test.images / 16).square().flatten(1).sum(1).mean().item()

    assert error(denoising) < 0.8 * error(plain)

    def moved(model: Autoencoder) -> float:
        nudged = (digits.test.images.float() + 0.5 * torch.randn(digits.test.images.shape)).clamp(0, 16)
        return (model.encode(nudged) - model.encode(digits.test.images)).norm(dim=1).mean().item()

    assert moved(trained("contractive", penalty=1.0)) < 0.5 * moved(plain)


def test_an_encoder_moves_into_another_model(tmp_path):
    """By its path, without the head: mean and variance stay behind."""
    digits = binarize(load_dataset("digits", train_size=100), 8)
    vae = VAE(digits.space, digits.classes, VAE.Config(encoder="minatar"), device="cpu").fit(digits, 1)
    path = vae.save(tmp_path / "vae.safetensors")
    encoder = make_encoder(str(path), digits.space)
    x = digits.test.images[:5]
    torch.testing.assert_close(encoder(x), vae.network.encoder(x))
    # Equal where the weights lie in memory as the VAE's do, which decides how convolutions round.
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(encoder(x), vae.network.encoder(x))
    with pytest.raises(ValueError, match="the encoder of .* is for"):
        make_encoder(str(path), load_dataset("digits").space)


# By the chain rule.


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_chain_rule_gives_the_gradient_of_autograd(dropout):
    model = tiny(dropout=dropout, beta=0.7, kl_warmup=20.0, learning_rate=1e-9)
    learner, x = model.learners["network"], images(40)
    model.network.train()
    results: list[Any] = []
    for chain in (model.chain, None):
        assert (chain is None) == bool(results)
        model.chain = chain
        torch.manual_seed(3)
        results.append((model.update(x, None, MOMENT), learner.gradient.clone()))
    (measured, gradient), (expected, autograd) = results
    assert autograd.abs().max() > 0.1
    assert torch.allclose(gradient, autograd, atol=2e-6)
    assert torch.allclose(measured, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"conditional": True},
        {"free_bits": 0.1},
        {"importance_samples": 2},
        {"likelihood": "continuous-bernoulli"},
        {"encoder": "mlp-norm"},
        {"encoder": "mlp-tanh"},
    ],
)
def test_autograd_is_kept_where_the_chain_rule_is_not_written_down(changes):
    assert tiny(**changes).chain is None
