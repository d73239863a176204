"""The Encoder contract, over the whole registry, and inside Stable-Baselines3."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from foveal.agents import DQN, load
from foveal.vision import (
    ENCODERS,
    MLP,
    Impala,
    MinAtarCNN,
    NatureCNN,
    NormMLP,
    TanhMLP,
    default_encoder,
    describe_encoder,
    load_encoder,
    make_encoder,
    space_from_json,
    space_to_json,
)
from foveal.vision.weights import read_weights, write_weights

build: Any = make_encoder  # attributes of the single encoders are looked at below
IMAGE = spaces.Box(0, 255, (4, 84, 84), np.uint8)
PLANES = spaces.Box(0, 1, (4, 10, 10), np.uint8)
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "count", "feature_map"),
    [
        ("nature", (4, 84, 84), 1_684_128, (64, 7, 7)),
        ("impala", (4, 84, 84), 1_089_232, (32, 11, 11)),
        ("impala", (3, 64, 64), 622_144, (32, 8, 8)),
        # 4*9*16 + 16, and 8*8*16*128 + 128
        ("minatar", (4, 10, 10), 592 + 131_200, (16, 8, 8)),
        # and a scale and an offset a channel and a feature
        ("minatar-norm", (4, 10, 10), 592 + 131_200 + 2 * (16 + 128), (16, 8, 8)),
        ("nature-norm", (4, 84, 84), 1_684_128 + 2 * (32 + 64 + 64 + 512), (64, 7, 7)),
        ("impala-norm", (4, 84, 84), 1_089_232 + 2 * (5 * (16 + 32 + 32) + 256), (32, 11, 11)),
    ],
)
def test_parameter_counts_and_maps(name, shape, count, feature_map):
    encoder = build(name, spaces.Box(0, 255, shape, np.uint8))
    assert parameters(encoder) == count
    obs = torch.zeros(2, *shape, dtype=torch.uint8)
    assert encoder.feature_map(obs).shape == (2, *feature_map)
    assert encoder(obs).shape == (2, encoder.features_dim)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mlp", 3 * 256 + 256 + 256 * 256 + 256),
        ("mlp-norm", 3 * 256 + 256 + 256 * 256 + 256 + 2 * (256 + 256)),
        ("mlp-tanh", 3 * 64 + 64 + 64 * 64 + 64),
    ],
)
def test_parameter_counts_of_vectors(name, count):
    assert parameters(build(name, VECTOR)) == count


def test_tanh_by_hand():
    encoder = build("mlp-tanh", VECTOR)
    assert encoder.features_dim == 64
    obs = torch.randn(5, 3)
    first, second = (layer for layer in encoder.layers if isinstance(layer, torch.nn.Linear))
    expected = torch.tanh(second(torch.tanh(first(obs))))
    torch.testing.assert_close(encoder(obs), expected)
    assert expected.min() < 0, "no ReLU"


@pytest.mark.parametrize(
    ("name", "space"),
    [("mlp-norm", VECTOR), ("nature-norm", IMAGE), ("impala-norm", PLANES), ("minatar-norm", PLANES)],
)
def test_layer_norm_takes_scale_and_offset_out_of_every_layer(name, space):
    """What a layer normalises has mean 0 and variance 1 in each sample, whatever its weights' size."""
    encoder = build(name, space)
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    seen: list[Any] = []
    for module in encoder.modules():
        if isinstance(module, norms):
            module.register_forward_hook(
                lambda _module, _inputs, output: seen.append(output.detach().clone())
            )
    layers: list[Any] = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    obs = torch.as_tensor(np.stack([space.sample() for _ in range(4)]))
    features = encoder(obs)
    assert len(seen) == len(layers) > 1, "one after every layer"
    for output in seen:
        samples = output.flatten(1)
        torch.testing.assert_close(samples.mean(1), torch.zeros(4), rtol=0, atol=1e-4)
        torch.testing.assert_close(samples.var(1, correction=0), torch.ones(4), rtol=0, atol=0.02)
    assert features.min() == 0, "normalised before the ReLU, not after it"
    with torch.no_grad():
        layers[-1].weight.mul_(50.0)
        layers[-1].bias.mul_(50.0)
    torch.testing.assert_close(encoder(obs), features, rtol=0, atol=0.02)


def test_nature_layer_shapes():
    encoder = build("nature", IMAGE)
    x, shapes = torch.zeros(1, 4, 84, 84), []
    for layer in encoder.conv:
        x = layer(x)
        if isinstance(layer, torch.nn.Conv2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(32, 20, 20), (64, 9, 9), (64, 7, 7)]


@pytest.mark.parametrize("name", list(ENCODERS))
def test_scaled_once_whatever_the_dtype(name):
    """uint8, and the float 0-255 that Stable-Baselines3 casts to, give equal features."""
    torch.manual_seed(0)
    encoder = build(name, IMAGE)
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    features = encoder(obs)
    torch.testing.assert_close(features, encoder(obs.float()), rtol=0, atol=0)
    # and the same as a network that is given numbers in [0, 1] without any scaling
    unit = build(name, spaces.Box(0, 1, (4, 84, 84), np.float32))
    unit.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(features, unit(obs.float() / 255))


def test_planes_of_high_one_are_not_scaled():
    torch.manual_seed(0)
    encoder = build("mlp", PLANES)
    obs = torch.randint(0, 2, (2, 4, 10, 10), dtype=torch.uint8)
    torch.testing.assert_close(encoder(obs), encoder.layers(obs.float()))


def test_discrete_is_one_hot_given_as_integers_or_as_one():
    torch.manual_seed(0)
    space = spaces.Discrete(5, start=2)
    encoder = build("mlp", space)
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, 3]), 5).float()
    torch.testing.assert_close(encoder(torch.tensor([2, 5])), encoder(one_hot))
    assert not torch.equal(encoder(torch.tensor([2])), encoder(torch.tensor([3])))


def test_multidiscrete_is_one_hots_side_by_side():
    torch.manual_seed(0)
    encoder = build("mlp", spaces.MultiDiscrete([2, 3]))
    torch.testing.assert_close(
        encoder(torch.tensor([[1, 2]])), encoder(torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0]]))
    )


def test_multidiscrete_counts_from_its_start():
    torch.manual_seed(0)
    encoder = build("mlp", spaces.MultiDiscrete([2, 3], start=[5, 1]))
    torch.testing.assert_close(
        encoder(torch.tensor([[6, 3]])), encoder(torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0]]))
    )


def test_dict_concatenates_one_encoder_a_key():
    space = spaces.Dict({"camera": IMAGE, "speed": VECTOR})
    encoder = build("auto", space)
    assert encoder.features_dim == 512 + 256
    obs = {"camera": torch.zeros(2, 4, 84, 84, dtype=torch.uint8), "speed": torch.ones(2, 3)}
    features = encoder(obs)
    assert features.shape == (2, 768)
    torch.testing.assert_close(features[:, 512:], encoder.parts[1](obs["speed"]))


BOTH = spaces.Dict({"camera": IMAGE, "speed": VECTOR, "wheel": spaces.Discrete(3)})


@pytest.mark.parametrize(
    ("name", "space", "kinds"),
    [
        ("nature", BOTH, [NatureCNN, MLP, MLP]),
        ("nature+mlp-tanh", BOTH, [NatureCNN, TanhMLP, TanhMLP]),
        ("impala+auto", BOTH, [Impala, MLP, MLP]),
        ("auto+mlp-norm", BOTH, [NatureCNN, NormMLP, NormMLP]),
        ("mlp-tanh", spaces.Dict({"speed": VECTOR, "wheel": spaces.Discrete(3)}), [TanhMLP, TanhMLP]),
        ("auto", spaces.Dict({"speed": VECTOR}), [MLP]),
    ],
)
def test_dict_names_images_and_vectors(name, space, kinds):
    encoder = build(name, space)
    assert [type(part) for part in encoder.parts] == kinds
    assert encoder.keys == list(space.spaces)


@pytest.mark.parametrize(("space", "name"), [(VECTOR, "mlp"), (IMAGE, "nature"), (PLANES, "impala")])
def test_default_encoder(space, name):
    assert default_encoder(space) == name
    assert build("auto", space)(torch.as_tensor(space.sample()[None])).shape[0] == 1


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("natur", IMAGE, "unknown encoder 'natur'; nearest: nature"),
        ("nature", VECTOR, "NatureCNN takes images"),
        ("nature", PLANES, "36x36 pixels or more, got 10x10"),
        ("no_such_module:Thing", IMAGE, "cannot be imported"),
        ("minatar", VECTOR, "MinAtarCNN takes images"),
        ("minatar", spaces.Box(0, 1, (1, 2, 5), np.uint8), "3x3 pixels or more, got 2x5"),
        ("nature+mlp-tanh", IMAGE, r"'nature\+mlp-tanh': IMAGES\+VECTORS takes Dict observations, not Box"),
        ("nature+mlp-tan", BOTH, "unknown encoder 'mlp-tan'; nearest: mlp-tanh"),
        ("mlp-tanh+nature", BOTH, "NatureCNN takes images"),
        ("nature", spaces.Dict({"speed": VECTOR}), "NatureCNN takes images"),
    ],
)
def test_bad_encoders_are_refused_in_one_line(name, space, message):
    with pytest.raises(ValueError, match=message) as error:
        build(name, space)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "space",
    [
        IMAGE,
        VECTOR,
        spaces.Discrete(3, start=1),
        spaces.MultiDiscrete([2, 5], start=[1, 0]),
        spaces.MultiBinary(4),
        spaces.Box(np.array([-1, 0], np.float32), np.array([1, 2], np.float32)),
        spaces.Dict({"a": VECTOR, "b": spaces.Discrete(2)}),
    ],
)
def test_spaces_round_trip_as_json(space):
    import json

    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space


def test_encoder_of_a_trained_agent_loads_and_other_specs_are_refused(tmp_path):
    agent: Any = DQN("CartPole-v1", seed=3)
    path = agent.save(tmp_path / "weights.safetensors")
    encoder = build(str(path), agent.observation_space)
    for name, tensor in agent.network.encoder.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"is for .*\[4\].* these observations are .*\[3\]"):
        build(str(path), VECTOR)
    # An agent made from it keeps the architecture's name, so that its own file needs no other file.
    second = DQN("CartPole-v1", encoder=str(path))
    assert second.describe()["encoder"]["name"] == "mlp"


class WithDict(gym.Env):
    observation_space = spaces.Dict({"board": PLANES, "speed": VECTOR})
    action_space = spaces.Discrete(2)


gym.register("test/WithDict-v0", lambda **kwargs: WithDict(**kwargs))


def test_both_encoders_of_a_dict_round_trip_through_a_file(tmp_path):
    agent: Any = DQN("test/WithDict-v0", encoder="minatar+mlp-tanh", seed=3)
    path = agent.save(tmp_path / "weights.safetensors")
    again: Any = load(path)
    assert again.describe()["encoder"]["name"] == "minatar+mlp-tanh"
    encoder: Any = load_encoder(path, agent.observation_space)
    assert [type(part) for part in encoder.parts] == [MinAtarCNN, TanhMLP]
    for name, tensor in agent.network.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
        assert torch.equal(again.network.encoder.state_dict()[name], tensor)
    # A part that came from a file keeps its architecture's name, beside the name of the other.
    vectors: Any = DQN("CartPole-v1", encoder="mlp-tanh", seed=4)
    file = vectors.save(tmp_path / "vectors+more.safetensors")
    four = spaces.Dict({"board": PLANES, "speed": vectors.observation_space})
    mixed = build(f"auto+{file}", four)
    assert torch.equal(mixed.parts[1].layers[1].weight, vectors.network.encoder.layers[1].weight)
    assert describe_encoder(f"auto+{file}", mixed, four)["name"] == "auto+mlp-tanh"


def test_cut_weights_file_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(path, {"a": torch.ones(100)}, {})
    assert torch.equal(read_weights(path)[0]["a"], torch.ones(100))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a whole safetensors file"):
        read_weights(path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_weights(path, {"a": torch.ones(3)}, {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_weights(path, {"a": torch.zeros(3)}, {})
    assert torch.equal(read_weights(path)[0]["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


class TestInsideStableBaselines3:
    """Every encoder is a features_extractor_class, unchanged, and its weights are trained there."""

    @pytest.mark.parametrize(
        ("algorithm", "name", "settings"),
        [
            ("DQN", "mlp", {"learning_starts": 8, "train_freq": 4, "batch_size": 8}),
            ("PPO", "mlp", {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
            ("DQN", "nature", {"learning_starts": 8, "train_freq": 4, "batch_size": 8, "buffer_size": 100}),
            ("PPO", "nature", {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
            ("DQN", "impala", {"learning_starts": 8, "train_freq": 4, "batch_size": 8, "buffer_size": 100}),
            ("PPO", "impala", {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
            ("PPO", "mlp-tanh", {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
            ("DQN", "mlp-norm", {"learning_starts": 8, "train_freq": 4, "batch_size": 8}),
            ("PPO", "minatar", {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
            (
                "DQN",
                "nature-norm",
                {"learning_starts": 8, "train_freq": 4, "batch_size": 8, "buffer_size": 100},
            ),
            ("PPO", "impala-norm", {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
            ("PPO", "minatar-norm", {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
        ],
    )
    def test_trains(self, algorithm, name, settings):
        import stable_baselines3 as sb3
        from stable_baselines3.common.envs import FakeImageEnv

        env: object = "CartPole-v1"
        if not name.startswith("mlp"):
            env = FakeImageEnv(
                screen_height=40, screen_width=40, n_channels=3, discrete=True, channel_first=True
            )
        model = getattr(sb3, algorithm)(
            "MlpPolicy" if name.startswith("mlp") else "CnnPolicy",
            env,
            policy_kwargs={"features_extractor_class": ENCODERS[name], "normalize_images": False},
            device="cpu",
            seed=0,
            **settings,
        )
        extractor = (
            model.policy.q_net.features_extractor if algorithm == "DQN" else model.policy.features_extractor
        )
        assert type(extractor) is ENCODERS[name]
        before = [p.detach().clone() for p in extractor.parameters()]
        model.learn(32)
        assert any(not torch.equal(b, p) for b, p in zip(before, extractor.parameters()))
