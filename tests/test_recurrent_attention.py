"""RAM: each known bug of public versions breaks a property here; the estimator is exact; training resumes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from foveal.agents import RAM, load
from foveal.agents.checkpoint import load_checkpoint, save_checkpoint
from foveal.agents.recurrent import RNN
from foveal.agents.recurrent import unroll as unroll_core
from foveal.agents.recurrent_attention import (
    Episodes,
    RAMConfig,
    RAMNetwork,
    log_density,
    ram_losses,
    unroll,
)
from foveal.vision import Classifier, Dataset, Split, load_dataset
from foveal.vision.glimpse import framed, glimpse

TINY = RAMConfig(glimpses=3, patch=3, scales=2, hidden=6, glimpse_hidden=5, std=0.4)


def small(config: RAMConfig = TINY, images: int = 16, seed: int = 0):
    """A network in float64, frames, first looks, noise and labels."""
    torch.manual_seed(seed)
    assert config.patch
    assert config.scales
    network = RAMNetwork(config.scales * config.patch**2, 4, config).double()
    for head in (network.locator, network.baseline, network.classifier):
        torch.nn.init.normal_(head.weight, std=0.5)
    frames = framed(
        torch.randint(0, 256, (images, 1, 12, 12), dtype=torch.uint8), config.patch, config.scales
    )
    first = 2 * torch.rand(images, 2, dtype=torch.float64) - 1
    noise = torch.randn(config.glimpses - 1, images, 2, dtype=torch.float64)
    return network, frames, first, noise, torch.randint(0, 4, (images,))


def play(network, frames, first, noise, config=TINY, see=None) -> Episodes:
    return unroll(network, frames, first, noise, config, 255.0, see)


def gradients(loss, module) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, materialize_grads=True)
    )


# Which loss trains what.


def test_each_loss_trains_its_own_parts_and_nothing_else():
    network, frames, first, noise, labels = small()
    losses = ram_losses(network, play(network, frames, first, noise), labels, TINY)
    core = [network.encoder, network.core]
    trains = {
        losses.classifier_loss: ([*core, network.classifier], [network.locator, network.baseline]),
        losses.baseline_loss: ([network.baseline], [*core, network.classifier, network.locator]),
        losses.look_loss: ([network.locator], [*core, network.classifier, network.baseline]),
    }
    for loss, (own, others) in trains.items():
        for module in own:
            assert all(gradient.abs().max() > 0 for gradient in gradients(loss, module))
        for module in others:
            assert all(
                torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(loss, module)
            )


def test_where_looks_go_before_anything_is_learned_is_trained_as_the_locator_is():
    network, frames, first, noise, labels = small()
    losses = ram_losses(network, play(network, frames, first, noise), labels, TINY)
    for loss, trained in zip(losses[:3], (False, False, True)):
        (gradient,) = torch.autograd.grad(loss, network.scan, retain_graph=True, materialize_grads=True)
        assert (gradient.abs() > 0).all() if trained else not gradient.any()
    begun = RAMNetwork(9, 4, RAMConfig(glimpses=5)).means(torch.zeros(4, 256), torch.arange(1, 5))
    expected = torch.tensor([[0.45, 0.0], [0.0, 0.45], [-0.45, 0.0], [0.0, -0.45]])
    torch.testing.assert_close(begun, expected)


def test_log_density_is_the_gaussians_and_takes_samples_as_given():
    means = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    samples = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    density = log_density(samples, means, 0.3)
    expected = torch.distributions.Normal(means, 0.3).log_prob(samples.detach()).sum(-1)
    torch.testing.assert_close(density, expected)
    # The reparametrised sample would cancel the gradient: means + std * noise less the means.
    drawn = means + 0.3 * torch.randn(5, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(log_density(drawn, means, 0.3).sum(), means)
    torch.testing.assert_close(gradient, ((drawn - means) / 0.09).detach())
    assert gradient.abs().min() > 0
    (into_samples,) = torch.autograd.grad(density.sum(), samples, allow_unused=True)
    assert into_samples is None


def test_the_score_is_of_the_sample_before_it_is_cut_so_that_its_mean_is_zero():
    config = replace(TINY, glimpses=2, std=0.6)
    network, frames, first, _, _ = small(config, images=1)
    torch.nn.init.constant_(network.locator.bias, 0.9)  # near the border: nearly half is cut
    count = 20_000
    noise = torch.randn(1, count, 2, dtype=torch.float64)
    episodes = play(
        network, frames.expand(count, -1, -1, -1).contiguous(), first.expand(count, 2), noise, config
    )
    cut = (episodes.locations[1] != episodes.samples[0]).double().mean()
    assert cut > 0.3
    means = network.means(episodes.hidden[0], 1)

    def mean_score(samples: torch.Tensor) -> torch.Tensor:
        """In standard errors."""
        scores = (samples - means).detach() / config.std**2
        return scores.mean(0) * math.sqrt(count) / scores.std(0)

    assert mean_score(episodes.samples[0]).abs().max() < 4
    assert mean_score(episodes.locations[1]).abs().max() > 40  # the bug that this would find
    (ours,) = torch.autograd.grad(
        log_density(episodes.samples[0], means, config.std).mean(), network.locator.bias
    )
    slope = 1 - means[0].detach().square()
    assert (ours.abs() / slope).max() < 4 / (config.std * math.sqrt(count))


def test_the_estimator_is_the_exact_gradient_and_a_baseline_lowers_its_variance():
    """One image, one look: the expected reward is an integral over where it goes, which a grid gives."""
    config = replace(TINY, glimpses=2, patch=2, scales=1, std=0.35)
    torch.manual_seed(19)
    network = RAMNetwork(4, 3, config).double()
    torch.nn.init.normal_(network.classifier.weight)
    torch.nn.init.normal_(network.locator.weight, std=0.2)
    image = torch.randint(0, 256, (1, 1, 10, 10), dtype=torch.uint8)
    frame, first = framed(image, 2), torch.zeros(1, 2, dtype=torch.float64)

    def rewards_of(samples: torch.Tensor, label: int) -> torch.Tensor:
        """Of looks (N, 2), not cut."""
        noise = (samples - mean) / config.std
        episodes = play(network, frame.expand(len(samples), -1, -1, -1).contiguous(),
                        first.expand(len(samples), 2), noise[None], config)  # fmt: skip
        return (network.classifier(episodes.hidden[-1]).argmax(-1) == label).double()

    start = play(network, frame, first, torch.zeros(1, 1, 2, dtype=torch.float64), config)
    mean = network.means(start.hidden[0], 1)[0].detach()
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    weights = (-0.5 * points.square().sum(-1)).exp()
    weights /= weights.sum()
    with torch.no_grad():
        answers = [rewards_of(mean + config.std * points, label) for label in range(3)]
    label = min(range(3), key=lambda k: abs(float((weights * answers[k]).sum()) - 0.6))
    reward = answers[label]
    expected_reward = float((weights * reward).sum())
    assert 0.2 < expected_reward < 0.9
    # d E[R] / d mean = E[R (l - mean)] / std^2, through tanh to the locator's bias
    exact = (weights * reward) @ points / config.std * (1 - mean.square())
    assert exact.abs().max() > 0.05

    count, chunk = 30_000, 100

    def estimates(baseline: float) -> torch.Tensor:
        """The gradient of -look_loss by the locator's bias, from chunks of episodes: (chunks, 2)."""
        torch.nn.init.zeros_(network.baseline.weight)
        torch.nn.init.constant_(network.baseline.bias, baseline)
        noise = torch.randn(1, count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            episodes = play(network, frame.expand(count, -1, -1, -1).contiguous(), first.expand(count, 2),
                            noise, config)  # fmt: skip
        parts = []
        for i in range(0, count, chunk):
            part = Episodes(*(tensor[:, i : i + chunk] for tensor in episodes))
            loss = ram_losses(network, part, torch.full((chunk,), label), config).look_loss
            parts.append(-torch.autograd.grad(loss, network.locator.bias)[0])
        return torch.stack(parts)

    without, with_baseline = estimates(0.0), estimates(expected_reward)
    for found in (without, with_baseline):
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - exact).abs() < 4 * error).all()
        assert error.max() < 0.1 * exact.abs().max() or error.max() < 0.02
    assert (with_baseline.var(0) < 0.8 * without.var(0)).all()


def test_losses_by_hand():
    """Sums over time, means over images, the reward of the last answer alone."""
    network, frames, first, noise, labels = small(images=5)
    episodes = play(network, frames, first, noise)
    losses = ram_losses(network, episodes, labels, TINY)
    right, ce, mse, reinforce = 0, 0.0, 0.0, 0.0
    for n in range(5):
        logits = network.classifier(episodes.hidden[-1, n])
        reward = float(logits.argmax() == labels[n])
        right += int(reward)
        ce -= float(logits.log_softmax(-1)[labels[n]])
        for t in range(2):
            hidden = episodes.hidden[t, n]
            baseline = float(network.baseline(hidden))
            mean = (network.locator(hidden) + network.scan[t]).tanh().detach()
            exponent = float(((episodes.samples[t, n] - mean) / 0.4).square().sum())
            log_p = -0.5 * exponent - 2 * math.log(0.4 * math.sqrt(2 * math.pi))
            mse += (baseline - reward) ** 2
            reinforce -= log_p * (reward - baseline)
    expected = [ce / 5, mse / 5, reinforce / 5, float(right)]
    torch.testing.assert_close([float(x) for x in losses], expected)
    every = ram_losses(network, episodes, labels, replace(TINY, answers="every")).classifier_loss
    all_logits = network.classifier(episodes.hidden).log_softmax(-1)
    torch.testing.assert_close(every, -all_logits.gather(-1, labels.expand(3, -1).unsqueeze(-1)).mean())


def test_where_bends_all_over_the_canvas():
    """The lines along which its units bend: every quarter of the canvas has some, and slopes are of length
    1."""
    torch.manual_seed(0)
    where = RAMNetwork(9, 4, RAMConfig(glimpse_hidden=400)).encoder.where
    torch.testing.assert_close(where.weight.norm(dim=1), torch.ones(400))
    nearest = -where.bias.unsqueeze(1) * where.weight  # the point of each line next to the centre
    angle = torch.atan2(nearest[:, 1], nearest[:, 0])
    assert torch.histogram(angle.detach(), 4, range=(-math.pi, math.pi)).hist.min() > 70
    assert torch.histogram(nearest.norm(dim=1).detach(), 4, range=(0.0, 1.0)).hist.min() > 70


# Episodes.


def test_glimpses_seen_are_those_at_the_locations_told():
    network, frames, first, noise, _ = small()
    seen: list[torch.Tensor] = []
    episodes = play(network, frames, first, noise, see=seen.append)
    images = frames[:, :, 3:-3, 3:-3]
    assert episodes.locations.shape == (3, 16, 2)
    assert torch.equal(episodes.locations[0], first)
    assert torch.equal(episodes.locations[1:], episodes.samples.clamp(-1, 1))
    for t in range(3):
        torch.testing.assert_close(seen[t], glimpse(images, episodes.locations[t], 3, 2).double() / 255,
                                   rtol=1e-6, atol=1e-7)  # fmt: skip
        if t < 2:
            means = network.means(episodes.hidden[t], t + 1)
            torch.testing.assert_close(episodes.samples[t], means + 0.4 * noise[t])


def test_one_image_is_played_as_it_is_among_others():
    network, frames, first, noise, labels = small()
    together = play(network, frames, first, noise)
    alone = play(network, frames[3:4], first[3:4], noise[:, 3:4])
    for one, many in zip(alone, together):
        torch.testing.assert_close(one[:, 0], many[:, 3])
    assert all(torch.isfinite(part) for part in ram_losses(network, alone, labels[3:4], TINY))


@pytest.mark.parametrize("core", ["rnn", "lstm", "gru"])
def test_any_number_of_glimpses_with_any_core(core):
    for glimpses in (1, 2, 5):
        config = replace(TINY, glimpses=glimpses, core=core)
        network, frames, first, noise, labels = small(config)
        losses = ram_losses(network, play(network, frames, first, noise, config), labels, config)
        assert all(torch.isfinite(part) for part in losses)
        assert float(losses.look_loss) == 0 if glimpses == 1 else float(losses.look_loss) != 0


def test_the_rectified_core_is_torchs():
    core, reference = RNN(3, 4).double(), torch.nn.RNN(3, 4, nonlinearity="relu").double()
    torch.nn.init.normal_(core.weight_hh, std=0.5)
    torch.nn.init.normal_(core.bias)
    with torch.no_grad():
        mine = (core.weight_ih, core.weight_hh, core.bias, torch.zeros(4))
        for theirs, value in zip(reference.parameters(), mine):
            theirs.copy_(value)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    starts = torch.zeros(6, 2, dtype=torch.bool)
    outputs, _ = unroll_core(core, x, torch.zeros(2, 4, dtype=torch.float64), starts)  # type: ignore[arg-type]
    torch.testing.assert_close(outputs, reference(x)[0])


def test_random_looking_looks_everywhere_and_its_locator_learns_nothing():
    digits = load_dataset("digits", train_size=200)
    config = RAM.Config(glimpses=3, patch=4, looking="random", batch_size=50)
    ram = RAM(digits.space, digits.classes, config, seed=1, device="cpu")
    before = [ram.network.locator.weight.clone(), ram.network.scan.clone()]
    ram.learn(digits, 2)
    assert torch.equal(ram.network.locator.weight, before[0])
    assert torch.equal(ram.network.scan, before[1])
    first, *others = ram.watch(digits.test.images).locations
    assert not first.any()  # the centre
    where = torch.cat(others)
    counts = torch.histogram(where.flatten(), 4, range=(-1.0, 1.0)).hist
    assert (counts / counts.sum() - 0.25).abs().max() < 0.04


# The trainer.


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", seed=1, train_size=300)


def quick(digits: Dataset, **changes) -> RAM:
    settings = {"glimpses": 3, "patch": 4, "hidden": 32, "glimpse_hidden": 16, "batch_size": 40, **changes}
    return RAM(digits.space, digits.classes, RAM.Config(**settings), seed=2, device="cpu")


def rows_of(model: RAM, dataset: Dataset, epochs: float, log_every: int = 3) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith("speed/")}
        for row in model.training(dataset, epochs, log_every)
    ]


def test_rows_say_what_happened(digits):
    model = quick(digits)
    rows = rows_of(model, digits, 2)
    assert [row["grad_step"] for row in rows] == [3, 6, 8, 9, 12, 15, 16]
    assert ["validation/accuracy" in row for row in rows] == [False, False, True, False, False, False, True]
    assert rows[-1]["validation/accuracy"] == 1 - model.evaluate(digits.validation).error
    rates = [row["train/learning_rate"] for row in rows]
    assert rates == [2e-3 * 0.5 * (1 + math.cos(math.pi * (row["grad_step"] - 1) / 16)) for row in rows]
    constant = rows_of(quick(digits, schedule="constant"), digits, 1)
    assert {row["train/learning_rate"] for row in constant} == {2e-3}


def test_looks_narrow_over_the_training_and_are_drawn_at_last_with_what_is_left(digits, monkeypatch):
    model = quick(digits, std=0.4, std_final=0.1)
    drawn = []

    def unrolled(network, frames, first, noise, config, high):
        episodes = unroll(network, frames, first, noise, config, high)
        means = network.means(episodes.hidden[0], 1)
        if noise[0].any():
            drawn.append(((episodes.samples[0] - means) / noise[0]).mean().item())
        return episodes

    monkeypatch.setattr("foveal.agents.recurrent_attention.unroll", unrolled)
    rows_of(model, digits, 2)
    assert drawn == pytest.approx([0.4 - 0.3 * step / 16 for step in range(16)], rel=1e-3)
    model.watch(digits.test.images, sampled=True)
    assert drawn[16:] == pytest.approx([0.1], rel=1e-3)


def test_one_seed_one_training_and_the_global_generator_is_left_alone(digits):
    torch.manual_seed(3)
    first = rows_of(quick(digits), digits, 1)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert rows_of(quick(digits), digits, 1) == first


def test_an_update_is_adam_on_the_sum_of_the_losses(digits):
    """The flat, fused step is torch.optim.Adam's on the same graph, with a rate of its own for the
    locator."""
    model, reference = quick(digits, locator_rate=0.2), quick(digits)
    images, labels = digits.train.images[:7], digits.train.labels[:7]
    locator = [reference.network.scan, *reference.network.locator.parameters()]
    others = [p for p in reference.network.parameters() if all(p is not own for own in locator)]
    groups: list[dict] = [{"params": locator, "lr": 0.002}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    for _ in range(3):
        model.update(images, labels, 0.01, model.config.std)
        first, noise = reference.draw(7, reference.noise_rng)
        episodes = unroll(
            reference.network, reference.frame(images), first, noise, reference.config, reference.high
        )
        losses = ram_losses(reference.network, episodes, labels, reference.config)
        optimizer.zero_grad()
        (losses.classifier_loss + losses.baseline_loss + losses.look_loss).backward()
        optimizer.step()
    for mine, theirs in zip(model.network.parameters(), reference.network.parameters()):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("changes", [{}, {"core": "lstm", "augment": ("shift:1",), "looking": "random"}])
def test_resumed_is_the_training_that_was_never_stopped(digits, tmp_path, changes):
    whole = quick(digits, **changes)
    rows = rows_of(whole, digits, 3)
    stopped = quick(digits, **changes)
    training = stopped.training(digits, 3, 3)
    begun = [next(training) for _ in range(4)]
    checkpoint = save_checkpoint(stopped, tmp_path)
    resumed = RAM.load(checkpoint, device="cpu")
    assert load_checkpoint(checkpoint, resumed)
    assert resumed.config == stopped.config
    assert rows_of(resumed, digits, 3) == rows[len(begun) :]
    for mine, theirs in zip(resumed.network.parameters(), whole.network.parameters()):
        assert torch.equal(mine, theirs)


def test_saved_and_loaded_it_answers_the_same(digits, tmp_path):
    model = quick(digits).learn(digits, 1)
    path = model.save(tmp_path / "ram.safetensors")
    for loaded in (RAM.load(path, device="cpu"), load(path, device="cpu")):
        assert isinstance(loaded, RAM)
        mine, theirs = (m.watch(digits.test.images, sampled=True, seed=4) for m in (loaded, model))
        assert torch.equal(mine.locations, theirs.locations)
        assert torch.equal(mine.probabilities, theirs.probabilities)
    with pytest.raises(ValueError, match="holds a 'ram', not a 'classifier'"):
        Classifier.load(path)


def test_evaluation_is_one_pass_and_averaging_is_asked_for(digits):
    model = quick(digits, std=0.8).learn(digits, 2)
    images, labels = digits.test.images, digits.test.labels
    looks = model.watch(images)
    error = (looks.probabilities[-1].argmax(-1) != labels).double().mean().item()
    assert model.evaluate(digits.test).error == error
    assert torch.equal(looks.probabilities[-1].argmax(-1), model.classify(images))
    # Mean looks: the locations follow from what was seen.
    with torch.no_grad():
        frames = model.frame(images)
        episodes = unroll(model.network, frames, looks.locations[0], torch.zeros(2, len(images), 2),
                          model.config, model.high)  # fmt: skip
    torch.testing.assert_close(episodes.locations, looks.locations)
    one, two = (model.watch(images, sampled=True, seed=seed).probabilities[-1] for seed in (0, 1))
    averaged = model.evaluate(digits.test, sampled=True, passes=2)
    assert torch.equal(averaged.predictions, (one + two).argmax(-1))
    drawn = model.evaluate(digits.test, sampled=True)
    assert torch.equal(drawn.predictions, one.argmax(-1))
    assert not torch.equal(averaged.predictions, drawn.predictions)


def cue(count: int, seed: int) -> Split:
    """Stripes, lying or upright, at the left and at the right, and a mark in the middle that says which of
    them are meant."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 1, 8, 20), np.uint8)
    meant, upright = rng.integers(2, size=count), rng.integers(2, size=(count, 2))
    stripes = np.zeros((2, 6, 6), np.uint8)
    stripes[0, ::2], stripes[1, :, ::2] = 255, 255
    for image, side, both in zip(images[:, 0], meant, upright):
        image[1:7, :6], image[1:7, 14:] = stripes[both[0]], stripes[both[1]]
        image[2:6, 8 + 2 * side : 10 + 2 * side] = 255
    return Split(torch.from_numpy(images), torch.from_numpy(upright[np.arange(count), meant]))


def test_it_learns_to_look_where_a_mark_tells_it_to():
    data = Dataset("cue", cue(1_000, 0), cue(100, 1), cue(500, 2), ("lying", "upright"), 255)
    config = RAM.Config(glimpses=2, patch=6, first="centre", std=0.4, hidden=32, glimpse_hidden=32,
                        batch_size=100, learning_rate=3e-3)  # fmt: skip
    ram = RAM(data.space, data.classes, config, seed=0, device="cpu").learn(data, 20)
    blind = RAM(data.space, data.classes, replace(config, looking="random"), seed=0, device="cpu")
    assert blind.learn(data, 10).evaluate(data.test).error > 0.2
    assert ram.evaluate(data.test).error < 0.02
    # It goes left where the mark is on the left, and right where it is on the right: beyond 0.15 the patch
    # reaches the stripes.
    x = ram.watch(data.test.images).locations[1, :, 0]
    left = data.test.images[:, 0, 3, 8] > 0
    assert (x[left] < -0.2).all()
    assert (x[~left] > 0.2).all()


@pytest.mark.slow
def test_it_learns_to_find_digits_twice_as_well_as_by_chance():
    """The task that needs no download: doubled digits on a canvas of 40x40, 6 glimpses of 8x8."""
    from foveal.vision.canvas import on_canvas

    data = on_canvas(load_dataset("digits", seed=1, size=16), 40, seed=1)
    config = RAM.recipe(dataset="digits", glimpses=6, batch_size=256)
    errors = [
        RAM(data.space, data.classes, replace(config, looking=looking), seed=1, device="cpu")
        .learn(data, 12)
        .evaluate(data.test)
        .error
        for looking in ("learned", "random")
    ]
    assert errors[0] <= errors[1] / 2


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"glimpses": 0}, "glimpses must be 1 or more, got 0"),
        ({"std": 0.0}, "std must be greater than 0, got 0.0"),
        ({"std_final": -0.1}, "std_final must be greater than 0, got -0.1"),
        ({"std": math.nan}, "std must be greater than 0, got nan"),
        ({"locator_rate": 0.0}, "locator_rate must be greater than 0, got 0.0"),
        ({"scales": 0}, "scales must be 1 or more, got 0"),
        ({"core": "brain"}, "core must be one of rnn, lstm, gru, got 'brain'"),
        ({"looking": "away"}, "looking must be one of learned, random, got 'away'"),
        ({"patch": 9}, "patch must be from 1 to the shorter side of the 8x8 canvas, got 9"),
        ({"background": 17}, "background must be from 0 to 16, got 17"),
        ({"augment": ("blur",)}, "blur"),
    ],
)
def test_settings_that_are_refused(digits, settings, message):
    with pytest.raises(ValueError, match=message):
        RAM(digits.space, digits.classes, RAM.Config(**settings))


def test_no_images_and_other_images_are_refused(digits):
    model = quick(digits)
    empty = Split(digits.train.images[:0], digits.train.labels[:0])
    with pytest.raises(ValueError, match="digits has no training images"):
        next(model.training(replace(digits, train=empty), 1))
    with pytest.raises(ValueError, match="images must be one or more, got none"):
        model.watch(empty.images)
    other = replace(digits, high=255)
    with pytest.raises(ValueError, match="the model takes"):
        next(model.training(other, 1))


def test_the_recipe_is_a_datasets_and_can_be_changed():
    assert RAM.recipe(dataset="mnist").augment == ("crop:1",)
    assert RAM.recipe(dataset="digits").augment == ()
    changed = RAM.recipe(dataset="mnist", augment=(), std_final=None, glimpses=2)
    assert changed == RAMConfig(glimpses=2)


def test_patch_and_scales_are_the_papers_where_none_are_given(digits):
    from gymnasium import spaces

    settled = {}
    for side in (28, 60, 100):
        config = RAM(spaces.Box(0, 255, (1, side, side), np.uint8), ("a", "b")).config
        settled[side] = (config.patch, config.scales)
    assert settled == {28: (8, 1), 60: (12, 3), 100: (12, 4)}


def test_nan_stops_the_training(digits):
    with pytest.raises(FloatingPointError, match="grad_step"):
        quick(digits, learning_rate=1e30).learn(digits, 5)
