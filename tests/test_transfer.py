"""Encoders that move: from backbones and classifiers into agents, frozen, fine-tuned, or shared."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from toys import GREY

from foveal.agents import (
    A2C,
    DQN,
    PPO,
    PQN,
    REINFORCE,
    Agent,
    load,
    load_checkpoint,
    newest_first,
    save_checkpoint,
)
from foveal.envs import make_vec
from foveal.vision import (
    BackboneEncoder,
    Classifier,
    ClassifierConfig,
    Dataset,
    Split,
    describe_encoder,
    make_encoder,
)


def images(count: int = 4, space: spaces.Box = GREY, seed: int = 0) -> Tensor:
    pixels = np.random.default_rng(seed).integers(int(space.high.max()) + 1, size=(count, *space.shape))
    return torch.from_numpy(pixels.astype(np.uint8))


# Encoders from backbones.


@pytest.mark.parametrize(
    ("shape", "high", "name", "stage", "size"),
    [
        ((4, 84, 84), 255, "resnet18", "layer3", (256, 6, 6)),
        ((3, 64, 64), 255, "resnet18", "layer3", (256, 4, 4)),
        ((1, 28, 28), 255, "resnet20", "layer3", (64, 7, 7)),
        ((1, 28, 28), 255, "lenet5", "conv2", (16, 5, 5)),
        ((4, 10, 10), 1, "resnet20", "layer2", (32, 5, 5)),
    ],
)
def test_default_cut_is_the_deepest_map_of_4x4_or_more(shape, high, name, stage, size):
    space = spaces.Box(0, high, shape, np.uint8)
    encoder = make_encoder(name, space)
    assert isinstance(encoder, BackboneEncoder)
    assert encoder.stage == stage
    x = images(2, space)
    assert encoder.feature_map(x).shape == (2, *size)
    features = encoder(x)
    assert features.shape == (2, 256)
    assert features.mean(1).abs().max() < 1e-5  # LayerNorm comes last
    torch.testing.assert_close(encoder(x.float()), features)
    flat = encoder.feature_map(x).flatten(1)
    torch.testing.assert_close(encoder.project[1:](flat), features)


def test_names_say_stage_norm_and_width():
    encoder: Any = make_encoder("resnet20@layer1,norm=frozen,features_dim=32", GREY)
    assert (encoder.stage, encoder.features_dim) == ("layer1", 32)
    assert encoder(images()).shape == (4, 32)
    kinds = {type(module).__name__ for module in encoder.modules() if "Norm" in type(module).__name__}
    assert kinds == {"FrozenBatchNorm2d", "LayerNorm"}
    assert not any(name.startswith(("layer2", "fc")) for name in encoder.backbone.state_dict())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in make_encoder("resnet20", GREY).modules())
    original = make_encoder("resnet20,norm=original", GREY)
    assert any(isinstance(m, nn.BatchNorm2d) for m in original.modules())


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("resnet20@layer9", GREY, r"stage of resnet20 must be one of .*layer3, got 'layer9'"),
        ("resnet20,depth=3", GREY, "options are norm, features_dim, pretrained, got 'depth=3'"),
        ("resnet20,features_dim=x", GREY, "features_dim takes a whole number, got 'x'"),
        ("resnet20,norm=odd", GREY, "norm must be .*batch, group, frozen, none, got 'odd'"),
        (
            "resnet20",
            spaces.Box(-1, 1, (4,)),
            r"resnet20 takes images \(a Box of shape \(C, H, W\)\), got Box",
        ),
        (
            "alexnet",
            spaces.Box(0, 255, (3, 5, 5), np.uint8),
            "alexnet.* too deep for images of 5x5 pixels: it takes",
        ),
        ("resnet200", GREY, "unknown encoder 'resnet200'; nearest: resnet20"),
    ],
)
def test_names_that_are_refused(name, space, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(name, space)


# Classifiers' encoders.


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Grey images that are bright on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(100, (60, *GREY.shape), generator=generator).to(torch.uint8)
    labels = torch.arange(60) % 2
    for image, label in zip(pixels, labels):
        image[:, :, 10 * label : 10 * label + 10] += 120
    train, validation, test = (Split(pixels[i : i + 20], labels[i : i + 20]) for i in (0, 20, 40))
    return Dataset("sides", train, validation, test, ("left", "right"), 255)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> tuple[Classifier, str]:
    config = ClassifierConfig(backbone="resnet20", batch_size=10)
    model = Classifier(dataset.space, dataset.classes, config, device="cpu").fit(dataset, 2)
    return model, str(model.save(tmp_path_factory.mktemp("classifier") / "weights.safetensors"))


def test_backbone_of_a_classifier_becomes_an_encoder_with_frozen_statistics(trained):
    model, file = trained
    encoder: Any = make_encoder(f"{file}@layer2", GREY)
    assert encoder.loaded_as == "resnet20@layer2,norm=frozen"
    x = images()
    expected = model.network.backbone.feature_map(x / 255, "layer2")
    torch.testing.assert_close(encoder.feature_map(x), expected)
    encoder.train()
    torch.testing.assert_close(encoder.feature_map(x), expected)  # nor does training mode change a statistic
    assert make_encoder(file, GREY).stage == "layer3"


def test_other_observations_than_the_classifiers_are_refused(trained):
    for space in (spaces.Box(0, 255, (1, 20, 21), np.uint8), spaces.Box(0, 1, (1, 20, 20), np.uint8)):
        with pytest.raises(ValueError, match=r"the encoder of .* is for .*20, 20.*; these observations are"):
            make_encoder(trained[1], space)


AGENTS_AND_SETTINGS: list[tuple[type[Agent], dict[str, Any]]] = [
    (DQN, {"learning_starts": 8, "batch_size": 4, "train_every": 4, "num_envs": 2}),
    (PQN, {"num_envs": 2, "num_steps": 4, "minibatches": 1, "epochs": 1}),
    (A2C, {"num_envs": 2, "num_steps": 4}),
    (PPO, {"num_envs": 2, "num_steps": 4, "minibatch_size": 8, "epochs": 1}),
    (REINFORCE, {"num_envs": 2}),
]
NAMES = [agent.name for agent, _ in AGENTS_AND_SETTINGS]


def make_agent(kind: type[Agent], settings: dict[str, Any], encoder: Any, **more: Any) -> Agent:
    env = make_vec("toys/Sides-v0", num_envs=2, seed=1)
    return kind(env, kind.Config(**settings, **more), encoder=encoder, seed=2, device="cpu")


def train(agent: Agent, steps: int = 16) -> Agent:
    for _ in agent.training(steps, log_every=8):
        pass
    assert agent.grad_step > 0
    return agent


def encoders(agent: Agent) -> list[Any]:
    network: Any = agent.network
    return [e for e in (network.encoder, getattr(network, "value_encoder", None)) if e is not None]


@pytest.mark.parametrize(("kind", "settings"), AGENTS_AND_SETTINGS, ids=NAMES)
def test_a_trained_encoder_is_what_every_agent_starts_from_and_frozen_it_stays(
    kind, settings, trained, tmp_path
):
    model, file = trained
    agent = make_agent(kind, settings, file, encoder_learning_rate=0.0)
    theirs: Any = model.network.backbone
    mine = encoders(agent)
    for encoder in mine:
        for name, tensor in encoder.backbone.state_dict().items():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=0, atol=0)
    before = [{k: v.clone() for k, v in e.state_dict().items()} for e in mine]
    train(agent)
    for encoder, old in zip(mine, before):
        for name, tensor in encoder.state_dict().items():
            same = torch.equal(tensor, old[name])
            assert same == name.startswith("backbone."), name
    # What was saved is built again without the classifier's file, frozen still, and acts alike.
    again = load(agent.save(tmp_path / "weights.safetensors"), device="cpu")
    assert again.config.encoder_learning_rate == 0.0
    assert len(again.weights) == len(agent.weights)
    x = images(16).numpy()
    assert np.array_equal(again.predict(x, deterministic=True)[0], agent.predict(x, deterministic=True)[0])


@pytest.mark.parametrize(("kind", "settings"), AGENTS_AND_SETTINGS, ids=NAMES)
def test_encoder_takes_its_own_step_size(kind, settings, trained):
    """After one gradient step the encoder has moved by a tenth of what it moves by otherwise, all else by the
    same."""
    moved: dict[float | None, dict[str, Tensor]] = {}
    for rate in (None, 0.1):
        config = kind.Config(**settings)
        share = None if rate is None else rate * config.learning_rate
        agent = make_agent(kind, settings, trained[1], encoder_learning_rate=share)
        before = {k: v.detach().clone() for k, v in agent.network.named_parameters()}
        for row in agent.training(10_000, log_every=1):
            if row["grad_step"] == 1:
                break
        assert agent.grad_step == 1
        moved[rate] = {k: v.detach() - before[k] for k, v in agent.network.named_parameters()}
    compared = 0
    for name, full in moved[None].items():
        share = 0.1 if ".backbone." in f".{name}" else 1.0
        torch.testing.assert_close(moved[0.1][name], share * full, rtol=2e-2, atol=1e-7)
        compared += bool(full.abs().max() > 1e-5)
    assert compared > 10


@pytest.mark.parametrize("rate", [0.0, 1e-4])
def test_frozen_and_slow_encoders_resume_bit_for_bit(rate, trained, tmp_path):
    kind, settings = AGENTS_AND_SETTINGS[3]
    whole = train(make_agent(kind, settings, trained[1], encoder_learning_rate=rate), 32)
    agent = train(make_agent(kind, settings, trained[1], encoder_learning_rate=rate), 16)
    # The step size does not depend on the length of the training here, so stopping early is the same.
    save_checkpoint(agent, tmp_path)
    folder = newest_first(tmp_path)[0]
    resumed = load(folder, device="cpu")
    assert load_checkpoint(folder, resumed)
    train(resumed, 32)
    assert torch.equal(resumed.weights, whole.weights)


def test_negative_step_sizes_are_refused():
    for kind, settings in AGENTS_AND_SETTINGS:
        with pytest.raises(ValueError, match=r"encoder_learning_rate must be 0 or more, got -0\.1"):
            kind.Config(**settings, encoder_learning_rate=-0.1)


# One encoder, several heads.


def test_gradients_of_every_head_reach_a_shared_encoder_and_no_other():
    torch.manual_seed(0)
    shared, alone = make_encoder("resnet20@layer1", GREY), make_encoder("resnet20@layer1", GREY)
    first, second, third = nn.Linear(256, 2), nn.Linear(256, 3), nn.Linear(256, 2)
    x = images()
    features = shared(x)
    (first(features).square().sum() + second(features).square().sum()).backward()
    both = [p.grad.clone() for p in shared.parameters() if p.grad is not None]
    assert len(both) == len(list(shared.parameters()))
    assert all(p.grad is None for p in [*alone.parameters(), *third.parameters()])
    parts = []
    for head in (first, second):
        shared.zero_grad()
        head(shared(x)).square().sum().backward()
        parts.append([p.grad.clone() for p in shared.parameters() if p.grad is not None])
    for total, one, other in zip(both, *parts):
        torch.testing.assert_close(total, one + other, rtol=1e-3, atol=1e-4)
    shared.zero_grad()
    third(shared(x).detach()).square().sum().backward()  # a head that only looks
    assert all(p.grad is None or not p.grad.any() for p in shared.parameters())


def test_one_encoder_object_serves_two_agents():
    """Handed over as an object it is shared: what one agent learns the other sees."""
    encoder = make_encoder("minatar", GREY)
    describe = describe_encoder(None, encoder, GREY)
    assert describe["name"] is None
    agent = make_agent(*AGENTS_AND_SETTINGS[1], encoder)
    assert agent.network.encoder is encoder
    before = {k: v.detach().clone() for k, v in encoder.named_parameters()}
    train(agent)
    assert any(not torch.equal(v, before[k]) for k, v in encoder.named_parameters())
