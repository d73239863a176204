"""foveal export: what onnxruntime gives for an exported file is what the library gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from foveal.agents import AGENTS, DQN, PPO, PQN, RAM, REINFORCE
from foveal.agents.sb3 import SB3A2C, SB3DQN, SB3PPO
from foveal.agents.sb3_settings import A2CConfig, DQNConfig, PPOConfig
from foveal.envs import make_vec
from foveal.generative import GAN, VAE, Autoencoder, PixelCNN
from foveal.runs.cli import main
from foveal.runs.export import check, describe, load_trained, trace, write_onnx
from foveal.runs.graphs import make_graph
from foveal.runs.run import create_run
from foveal.vision import KNN, Classifier, binarize, load_dataset

DIGITS = load_dataset("digits")
BINARY = binarize(DIGITS, 8)


def signs(actions: str, images: bool = False) -> Any:
    import toys

    assert toys
    return make_vec("toys/Signs-v0", num_envs=2, env_kwargs={"actions": actions, "images": images})


def exported(trained: Any, tmp_path: Path, part: str = "auto") -> tuple[Any, onnxruntime.InferenceSession]:
    """The trained thing loaded again from its file, and a session of what was exported of it."""
    file = trained.save(tmp_path / "weights.safetensors")
    loaded = load_trained(file)
    graph, name = make_graph(loaded, part)
    out = tmp_path / f"{name}.onnx"
    differences = write_onnx(graph, out, describe(file, loaded, name, graph), 1e-4)
    assert differences.keys() == graph.outputs.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return loaded, onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])


def ppo(**settings: Any) -> Any:
    return PPO.Config(num_envs=2, num_steps=4, minibatch_size=8, **settings)


def moved(agent: Any) -> Any:
    """An agent whose statistics of observations are not those of the start."""
    agent.network.normalizer.update(torch.randn(50, 2, *agent.observation_space.shape) * 3 + 1)
    return agent


AGENT_CASES: dict[str, Any] = {
    "dqn": lambda: DQN("CartPole-v1"),
    "dqn, image": lambda: DQN("MinAtar/Breakout-v1", encoder="minatar"),
    "dqn, an integer": lambda: DQN("FrozenLake-v1"),
    "pqn": lambda: PQN("MinAtar/Breakout-v1", PQN.Config(num_envs=2)),
    "ppo, normalised": lambda: moved(PPO("CartPole-v1", ppo(normalize_observations=True))),
    "ppo, squashed": lambda: PPO("Pendulum-v1", ppo(squash=True, log_std_init=0.5)),
    "reinforce, actions from 3": lambda: REINFORCE(signs("discrete")),
    "reinforce, several choices": lambda: REINFORCE(signs("multi-discrete", images=True)),
    "reinforce, bits": lambda: REINFORCE(signs("multi-binary")),
    "reinforce, box": lambda: REINFORCE(signs("box")),
    "sb3 dqn": lambda: SB3DQN("CartPole-v1", DQNConfig(net_arch=(16,))),
    "sb3 a2c, normalised": lambda: SB3A2C("Pendulum-v1", A2CConfig(num_envs=2, normalize=True, use_sde=True)),
    "sb3 ppo, dict": lambda: SB3PPO(signs("box", images=True), PPOConfig(n_steps=8, batch_size=4)),
}


@pytest.mark.parametrize("case", AGENT_CASES)
def test_a_policy_acts_as_predict_does(case: str, tmp_path: Path) -> None:
    agent, session = exported(AGENT_CASES[case](), tmp_path)
    obs = agent.env.reset()
    for batch in (1, 2):
        flat = obs if isinstance(obs, dict) else {"": obs}
        given = {f"obs.{key}" if key else "obs": part[:batch] for key, part in flat.items()}
        part = {key: value[:batch] for key, value in obs.items()} if isinstance(obs, dict) else obs[:batch]
        right = agent.predict(part, deterministic=True)[0]
        action = session.run(["action"], given)[0]
        assert action.dtype == right.dtype
        np.testing.assert_allclose(action, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("core", ["lstm", "gru"])
def test_a_memory_goes_in_and_out(core: str, tmp_path: Path) -> None:
    made = PPO("CartPole-v1", ppo(recurrent=core, recurrent_size=5))
    with torch.no_grad():
        made.network.policy_head.weight.mul_(100)  # else all actions are near one another
    agent, session = exported(made, tmp_path)
    rng = np.random.default_rng(0)
    size = session.get_inputs()[1].shape[1]
    state, theirs = np.zeros((3, size), np.float32), None
    seen = set()
    for step in range(12):
        obs = rng.normal(size=(3, 4)).astype(np.float32)
        starts = np.array([step == 0, step == 5, False])
        given = {"obs": obs, "state": state, "episode_start": starts}
        action, state = session.run(["action", "next_state"], given)
        right, theirs = agent.predict(obs, theirs, starts, deterministic=True)
        np.testing.assert_array_equal(action, right)
        np.testing.assert_allclose(state, theirs[:, :size], atol=1e-5)
        seen |= set(action.tolist())
    assert seen == {0, 1}


def test_what_an_agent_sees(tmp_path: Path) -> None:
    agent, session = exported(DQN("MinAtar/Breakout-v1", encoder="minatar"), tmp_path, "encoder")
    obs = (np.random.default_rng(0).random((5, 4, 10, 10)) < 0.2).astype(np.uint8)
    (features,) = session.run(None, {"obs": obs})
    assert features.shape == (5, 128)
    with torch.no_grad():
        np.testing.assert_allclose(
            features, agent.network.encoder(torch.as_tensor(obs)).numpy(), atol=1e-5, rtol=1e-4
        )


def test_ram_looks_and_answers(tmp_path: Path) -> None:
    ram, session = exported(RAM(DIGITS.space, DIGITS.classes, RAM.Config(glimpses=3, patch=4)), tmp_path)
    rng = np.random.default_rng(0)
    obs = {"glimpse": rng.random((2, 1, 4, 4)), "location": rng.uniform(-1, 1, (2, 2))}
    obs["time"] = np.array([[1 / 3], [2 / 3]])
    obs = {key: value.astype(np.float32) for key, value in obs.items()}
    state = np.zeros((2, session.get_inputs()[2].shape[1]), np.float32)
    answer, look = session.run(["answer", "look"], obs | {"state": state})
    actions, _ = ram.predict(obs, deterministic=True)
    np.testing.assert_array_equal(answer, actions["answer"])
    np.testing.assert_allclose(look, actions["look"], atol=1e-6)


def digits(model: Any, /, **settings: Any) -> Any:
    data = BINARY if settings.get("likelihood") == "bernoulli" else DIGITS
    return model(data.space, data.classes, model.recipe(**settings))


@pytest.mark.parametrize("backbone", ["resnet20", "linear", None])
def test_a_classifier_answers_as_predict_does(backbone: str | None, tmp_path: Path) -> None:
    settings = {"backbone": backbone} if backbone else {"encoder": "minatar"}
    model, session = exported(digits(Classifier, **settings), tmp_path)
    images = DIGITS.test.images[:7]
    label, scores = session.run(["label", "scores"], {"image": images.numpy()})
    np.testing.assert_array_equal(label, model.predict(images))
    np.testing.assert_allclose(scores, model.scores(images), atol=1e-4)


VAES: list[dict[str, Any]] = [
    {"likelihood": "bernoulli"},
    {"likelihood": "logistic", "conditional": True, "encoder": "impala"},
    {"likelihood": "gaussian", "encoder": "minatar"},
    {"likelihood": "continuous-bernoulli", "precision": "bfloat16", "ema": 0.9},
]


@pytest.mark.parametrize("settings", VAES, ids=lambda s: s["likelihood"])
def test_a_vae_encodes_and_decodes(settings: dict[str, Any], tmp_path: Path) -> None:
    made = digits(VAE, latent_dim=3, **settings)
    model, session = exported(made, tmp_path, "encoder")
    images, labels = made_of(made)
    given = {"image": images.numpy()} | ({"label": labels.numpy()} if labels is not None else {})
    mean, _ = session.run(None, given)
    loose = 2e-2 if settings.get("precision") else 1e-4  # the library's own answer is bfloat16's there
    np.testing.assert_allclose(mean, model.encode(images, labels), atol=loose)
    model, session = exported(made, tmp_path)
    given = {"z": mean} | ({"label": labels.numpy()} if labels is not None else {})
    image = session.run(["image"], given)[0]
    assert image.shape == (6, 1, 8, 8)
    np.testing.assert_allclose(image, model.decode(torch.as_tensor(mean), labels), atol=loose)


def made_of(model: VAE) -> tuple[torch.Tensor, torch.Tensor | None]:
    data = BINARY if model.high == 1 else DIGITS
    return data.test.images[:6], data.test.labels[:6] if model.conditional else None


@pytest.mark.parametrize("kind", ["sparse-kl", "sparse-l1"])
def test_an_autoencoder_encodes_and_decodes(kind: str, tmp_path: Path) -> None:
    made = digits(Autoencoder, kind=kind, latent_dim=4)
    model, session = exported(made, tmp_path, "encoder")
    (code,) = session.run(None, {"image": DIGITS.test.images[:5].numpy()})
    np.testing.assert_allclose(code, model.encode(DIGITS.test.images[:5]), atol=1e-5)
    model, session = exported(made, tmp_path)
    (image,) = session.run(None, {"z": code})
    np.testing.assert_allclose(image, model.decode(torch.as_tensor(code)), atol=1e-5)


@pytest.mark.parametrize("architecture", ["mlp", "dcgan", "resnet"])
def test_a_generator_makes_what_decode_makes(architecture: str, tmp_path: Path) -> None:
    conditional = "projection" if architecture == "resnet" else None
    made = digits(GAN, architecture=architecture, width=8, latent_size=5, conditional=conditional)
    with torch.no_grad():  # as after a training: batch statistics that are not those of the start
        for name, buffer in made.generator.named_buffers():
            if "running" in name:
                made.buffers[name].add_(torch.rand(buffer.shape))
    model, session = exported(made, tmp_path)
    z, labels = torch.randn(4, 5), torch.tensor([0, 3, 9, 3])
    given = {"z": z.numpy()} | ({"label": labels.numpy()} if conditional else {})
    (image,) = session.run(None, given)
    np.testing.assert_allclose(image, model.decode(z, labels if conditional else None), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: AGENTS["q-learning"]("foveal/GridWorld-v0"), "q-learning is not exported: it is a table"),
        (lambda: digits(PixelCNN), "pixelcnn is not exported: it draws one pixel after the other"),
        (lambda: digits(KNN), "knn is not exported: it has no network"),
    ],
)
def test_what_cannot_be_exported_says_so(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_graph(make())


def test_a_file_that_differs_is_not_written(tmp_path: Path) -> None:
    agent: Any = DQN("CartPole-v1")
    graph, _ = make_graph(agent)
    content = trace(graph)
    assert max(check(content, graph, 1e-4).values()) < 1e-4
    with torch.no_grad():
        agent.network.head.bias.add_(torch.tensor([0.0, 1e-3]))
    with pytest.raises(ValueError, match="scores differs from foveal's answer by .*, more than 0.0001"):
        check(content, graph, 1e-4)
    right = graph.answer
    wrong = graph._replace(answer=lambda given: {"action": 1 - right(given)["action"]})
    about: dict[str, Any] = {"inputs": [], "outputs": []}
    with pytest.raises(ValueError, match="action differs"):
        write_onnx(wrong, tmp_path / "policy.onnx", about, 1e-4)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_became_a_constant_is_found() -> None:
    graph, _ = make_graph(DQN("CartPole-v1"))
    inner = graph.module.function
    graph.module.function = lambda obs: tuple(out[:2] for out in inner(obs))
    with pytest.raises(ValueError, match="came out of onnxruntime as"):
        check(trace(graph), graph, 1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"agent": "ppo", "env_id": "CartPole-v1", "seed": 1}
    results = tmp_path_factory.mktemp("results")
    run = create_run(results, group="ppo", name="seed1", config=config, track="off")
    best = run.path / "checkpoints" / "best"
    best.mkdir(parents=True)
    PPO("CartPole-v1", ppo(normalize_observations=True)).save(best / "weights.safetensors")
    run.summarize({"eval/return_mean": 12.0, "wall_s": 1.0})
    run.finish("finished")
    return run.path


def test_the_command_writes_a_file_that_says_what_it_is(run: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert main(["export", str(run), "--onnx"]) == 0
    said = capsys.readouterr().out
    assert "policy of ppo on CartPole-v1, weights of step 0" in said
    assert "differs by at most" in said
    model = onnx.load(run / "policy.onnx")
    assert {file.name for file in run.glob("*.onnx*")} == {"policy.onnx"}  # nothing lies beside it
    (entry,) = [entry for entry in model.metadata_props if entry.key == "foveal"]
    about = json.loads(entry.value)
    assert about["agent"] == "ppo"
    assert about["env_id"] == "CartPole-v1"
    assert about["score"] == {"eval/return_mean": 12.0}
    assert about["run"]["name"] == "seed1"
    assert [value["name"] for value in about["inputs"]] == ["obs"]
    assert about["inputs"][0]["shape"] == [4]
    assert [(v["name"], v["dtype"], v["shape"]) for v in about["outputs"]] == [
        ("action", "int64", []),
        ("logits", "float32", [2]),
    ]
    assert str(run) not in str(model)


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    def refused(*arguments: Any) -> str:
        capsys.readouterr()
        assert main(["export", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "part: ppo has policy and encoder, got 'decoder'" in refused(run, "--part", "decoder")
    assert "out takes a file" in refused(run, "--out", tmp_path)
    assert "no weights file or run at" in refused(tmp_path / "none")
    for wrong in ("--tolerance=-1", "--no-onnx", "--part=head"):
        with pytest.raises(SystemExit):  # the parser's own
            main(["export", str(run), wrong])
