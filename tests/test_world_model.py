"""World models: densities by hand, states that the ends of episodes cut, dreams, and what agents see."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import Sides

from foveal.envs import make_vec
from foveal.generative import VAE, WorldModel
from foveal.generative.world_model import (
    FIRST,
    WINDOW,
    Experience,
    Prediction,
    mixture_draw,
    mixture_log_prob,
    mixture_mean,
    read_experience,
)
from foveal.runs.cli import main
from foveal.runs.collect import Collect, play, write
from foveal.runs.latent_env import LatentEnv, Latents
from foveal.vision import load_dataset

FRAMES = 2000
"""Of four environments: 350 steps to train, 50 to validate, 100 to test."""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Frames of Sides (seen.npz) and a VAE of them."""
    path = tmp_path_factory.mktemp("world")
    write(path / "seen.npz", play(Collect(env_id="toys/Sides-v0", frames=FRAMES, num_envs=4)))
    data = load_dataset(path / "seen.npz")
    settings = {"latent_dim": 3, "likelihood": "gaussian", "kl_warmup": 2.0, "ema": 0.9, "batch_size": 32}
    config = VAE.Config(**settings)
    VAE(data.space, data.classes, config, device="cpu").fit(data, 4).save(path / "eye.safetensors")
    return path


@pytest.fixture(scope="module")
def data(folder) -> Experience:
    return read_experience(load_dataset(folder / "seen.npz"), folder / "seen.npz")


def model_of(folder: Path, data: Experience, seed: int = 0, **changes: Any) -> WorldModel:
    settings = {"vae": str(folder / "eye.safetensors"), "hidden_size": 16, "mixtures": 2, **changes}
    config = WorldModel.Config(**settings)
    return WorldModel(data.space, data.classes, config, seed, "cpu")


@pytest.fixture(scope="module")
def trained(folder, data) -> WorldModel:
    return model_of(folder, data, learning_rate=1e-2, hidden_size=32, batch_size=8).fit(data, 25)


def random_prediction(*shape: int, dims: int = 3, mixtures: int = 4) -> Prediction:
    generator = torch.Generator().manual_seed(1)
    weights, means, log_sigmas = torch.randn(3, *shape, dims, mixtures, generator=generator).double()
    return Prediction(weights.log_softmax(-1), means, log_sigmas, *torch.randn(2, *shape).double())


# Densities.


def test_the_density_is_what_it_is_by_hand():
    prediction = random_prediction(5)
    z = torch.randn(5, 3).double()
    for row in range(5):
        expected = 0.0
        for dim in range(3):
            density = 0.0
            for k in range(4):
                weight, mean, log_sigma = (part[row, dim, k].item() for part in prediction[:3])
                sigma = math.exp(log_sigma)
                away = (z[row, dim].item() - mean) / sigma
                density += math.exp(weight) * math.exp(-away * away / 2) / (sigma * math.sqrt(2 * math.pi))
            expected += math.log(density)
        assert mixture_log_prob(prediction, z)[row].item() == pytest.approx(expected, rel=1e-10)


def test_the_density_integrates_to_one_and_has_the_mean_and_the_draws():
    one = random_prediction(1, dims=1)
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64).unsqueeze(1)  # (G, 1)
    wide = Prediction(*(part.expand(len(grid), *part.shape[1:]) for part in one))
    density = mixture_log_prob(wide, grid).exp()
    assert density.sum().item() * 1e-3 == pytest.approx(1, abs=1e-6)
    mean = (density * grid[:, 0]).sum().item() * 1e-3
    assert mixture_mean(one).item() == pytest.approx(mean, abs=1e-6)
    second = (density * grid[:, 0].square()).sum().item() * 1e-3
    drawn = mixture_draw(wide, generator=torch.Generator().manual_seed(0))
    error = math.sqrt((second - mean**2) / len(grid))
    assert abs(drawn.mean().item() - mean) < 4 * error
    assert drawn.square().mean().item() == pytest.approx(second, rel=0.05)


def test_no_temperature_is_the_likeliest_mean():
    prediction = random_prediction(50)
    likeliest = prediction.log_weights.argmax(-1, keepdim=True)
    expected = prediction.means.gather(-1, likeliest).squeeze(-1)
    assert torch.allclose(mixture_draw(prediction, 1e-9).double(), expected, atol=1e-3)


# Experience.


def test_steps_are_what_the_environment_gives_when_it_is_played_again(folder, data):
    steps = {name: torch.cat([getattr(data.steps[part], name) for part in data.steps]) for name in ("frames",
             "actions", "rewards", "terminated", "truncated", "ended")}  # fmt: skip
    env = make_vec("toys/Sides-v0", 4, 0, training=False)
    obs = env.reset()
    for step in range(40):
        assert np.array_equal(obs, steps["frames"][step].numpy())
        taken = env.step(steps["actions"][step].numpy())
        for name in ("rewards", "terminated", "truncated"):
            assert np.array_equal(getattr(taken, name), steps[name][step].numpy()), name
        obs = taken.obs
    assert [len(data.steps[part].actions) for part in data.steps] == [350, 50, 100]
    assert steps["ended"].double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert data.classes == ("0", "1")


def test_windows_begin_where_their_labels_say(data):
    steps = data.steps["train"]
    assert len(data.train) == 4 * ((350 - 1) // WINDOW)
    for image, label in zip(data.train.images, data.train.labels.tolist()):
        assert torch.equal(image, steps.frames[label // 4, label % 4])
        assert label // 4 + WINDOW < 350


def test_frames_that_were_thinned_have_no_steps():
    write(Path("thin.npz"), play(Collect(env_id="toys/Sides-v0", frames=80, every=2)))
    with pytest.raises(ValueError, match="has no num_actions; foveal collect writes them, with --every 1"):
        read_experience(load_dataset("thin.npz"), "thin.npz")


# States.


def test_an_episode_does_not_know_of_the_one_before(folder, data):
    model = model_of(folder, data)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(9, 2, 3, generator=generator)
    actions = torch.randint(2, (9, 2), generator=generator)
    starts = torch.zeros(9, 2, dtype=torch.bool)
    starts[4, 0] = True
    with torch.no_grad():
        states = model.states(z, actions, starts)
        alone = model.states(z[4:], actions[4:], starts[4:])
    assert torch.equal(states[4:, 0], alone[:, 0])
    assert not torch.allclose(states[4:, 1], alone[:, 1])


def test_what_comes_after_an_ending_is_no_part_of_the_loss(folder, data):
    model = model_of(folder, data)
    codes = model.encoded(data.steps["validation"])
    z = codes.mean.clone()
    with torch.no_grad():
        before = model.losses(z, codes)[0]
    first = codes.starts[1:].nonzero()[0] + torch.tensor([1, 0])
    z[tuple(first)] += 100.0
    actions = codes.actions[:-1]
    with torch.no_grad():
        prediction = model.network.predict(model.states(codes.mean[:-1], actions, codes.starts))
    changed = -mixture_log_prob(prediction, z[1:])
    on = ~codes.ended[:-1]
    assert (changed * on).sum() / on.sum() == pytest.approx(before.item(), rel=1e-5)
    assert (changed[~on] > 1000).any()


# Learning.


def test_it_learns_endings_by_memory_and_rewards_by_action(trained, data):
    """The fourth step ends an episode, and no frame shows which one it is."""
    measured, trivial = trained.test(data), trained.baseline(data)
    assert trivial["ending_share_nats"] == pytest.approx(0.562, abs=0.01)
    assert measured["ending_nats"] < 0.2
    assert trivial["mean_reward_error"] == pytest.approx(0.25, abs=0.01)
    assert measured["reward_error"] < 0.1
    assert measured["nats"] < trivial["gaussian_nats"] + 0.2  # sides are drawn anew: nothing to tell


def test_the_vae_is_kept_and_the_file_is_whole_without_it(folder, data, trained, tmp_path):
    eye = VAE.load(folder / "eye.safetensors", device="cpu")
    for name, tensor in eye.network.state_dict().items():
        assert torch.equal(trained.network.vae.state_dict()[name], tensor), name
    copy = tmp_path / "gone.safetensors"
    shutil.copy(folder / "eye.safetensors", copy)
    path = model_of(folder, data, vae=str(copy)).fit(data, 1).save(tmp_path / "world.safetensors")
    copy.unlink()
    again = WorldModel.load(path, device="cpu")
    frames = data.steps["test"].frames[:5, 0]
    assert torch.equal(again.vae.encode(frames), eye.encode(frames))
    assert again.test(data) == WorldModel.load(path, device="cpu").test(data)
    assert torch.equal(again.sample(9, again.fixed_noise()), again.sample(9, again.fixed_noise()))


def test_training_that_was_stopped_goes_on_as_if_it_had_not(folder, data):
    whole = model_of(folder, data).fit(data, 4)
    half = model_of(folder, data)
    half.fit(data, 4, callback=lambda model, row: model.grad_step < 3, log_every=1)
    assert 0 < half.grad_step < whole.grad_step
    weights, (tensors, meta) = half.weights(), half.state()
    other = model_of(folder, data, seed=5)
    other.seed, other.shuffle_seed = half.seed, half.shuffle_seed
    other.load_weights(weights)
    other.restore({k: v.clone() for k, v in tensors.items()}, meta, lambda name: {})
    other.grad_step = half.grad_step
    other.fit(data, 4)
    for name, tensor in whole.weights().items():
        assert torch.equal(other.weights()[name], tensor), name


# Dreams.


def test_a_dream_is_read_along_as_an_episode_is(trained):
    """Its actions and its z through `states`, as in training, predict the very z that it goes on with."""
    dream = trained.dream(6, 9, trained.fixed_noise(), temperature=1e-12)
    assert (dream.z.shape, dream.actions.shape) == ((9, 6, 3), (8, 6))
    assert all((trained.network.first == z).all(1).any() for z in dream.z[0])
    starts = torch.zeros(8, 6, dtype=torch.bool)
    with torch.no_grad():
        prediction = trained.network.predict(trained.states(dream.z[:-1], dream.actions, starts))
        expected = mixture_draw(prediction, 1e-12)
    on = ~dream.over[1:]
    assert on.sum() >= 12
    assert torch.allclose(dream.z[1:][on], expected[on], atol=1e-4)
    assert (dream.over.double().sum(0) == 5).double().mean() > 0.5  # four steps, as in the environment


def test_pictures_are_pictures(trained, data):
    pictures = trained.pictures(data)
    assert pictures["dreams"].shape == (8, 12, 1, 20, 20)
    assert pictures["predictions"].shape == (8, 12, 1, 20, 20)
    shown = data.steps["test"].frames[1:13, 0].float() / 255
    assert torch.allclose(pictures["predictions"][0], shown)
    assert all(image.min() >= 0 and image.max() <= 1 for image in pictures.values())
    assert trained.sample(11).shape == (11, 1, 20, 20)
    assert trained.network.first.shape == (FIRST, 3)


# What an agent sees.


def test_the_environment_shows_the_states_that_training_has(trained, tmp_path):
    path = trained.save(tmp_path / "world.safetensors")
    env: Any = LatentEnv("toys/Sides-v0", path)
    assert env.observation_space.shape == (3 + 32,)
    plain = Sides()
    actions = [1, 0, 1, 1]
    for seed in (3, 4):  # the second episode knows nothing of the first
        seen = [env.reset(seed=seed)[0], *(env.step(action)[0] for action in actions)]
        frames = [plain.reset(seed=seed)[0], *(plain.step(action)[0] for action in actions)]
        z = trained.vae.encode(torch.from_numpy(np.stack(frames)))
        with torch.no_grad():
            states = trained.states(z[:4, None], torch.tensor(actions)[:, None], torch.zeros(4, 1).bool())
        h = torch.cat([torch.zeros(1, 32), states[:, 0, :32]])
        assert np.allclose(np.stack(seen), torch.cat([z, h], 1).numpy(), atol=1e-5)
    assert LatentEnv("toys/Sides-v0", path, memory=False).reset(seed=3)[0].shape == (3,)


def test_environments_side_by_side_show_what_each_alone_does(trained, tmp_path):
    kwargs = {"env_id": "toys/Sides-v0", "world_model": str(trained.save(tmp_path / "world.safetensors"))}
    together, apart = (
        make_vec("foveal/Latent-v0", 5, 3, env_kwargs=kwargs, backend=name) for name in ("auto", "sync")
    )
    assert type(together.backend) is Latents
    assert type(apart.backend) is not Latents
    rng = np.random.default_rng(0)
    assert np.allclose(together.reset(), apart.reset(), atol=1e-5)
    for step in range(11):
        actions = rng.integers(2, size=5)
        mine, theirs = together.step(actions), apart.step(actions)
        assert np.allclose(mine.obs, theirs.obs, atol=1e-5)
        assert np.allclose(mine.next_obs, theirs.next_obs, atol=1e-5)
        assert np.array_equal(mine.rewards, theirs.rewards)
        assert np.array_equal(mine.reset, theirs.reset)
        assert mine.reset.any() == (step % 4 == 3)
    for short in (11, 12):  # in the middle of episodes, and at the start of others
        again = make_vec("foveal/Latent-v0", 5, 3, env_kwargs=kwargs)
        obs, exact = again.restore(*together.state())
        assert exact
        assert np.array_equal(obs, mine.obs)
        mine = together.step(rng.integers(2, size=5))
        assert mine.reset.all() == (short == 11)
    limited = make_vec("foveal/Latent-v0", 2, 3, env_kwargs=kwargs, max_episode_steps=2)
    limited.reset()
    limited.step(np.zeros(2))
    assert limited.step(np.zeros(2)).truncated.all()


@pytest.mark.parametrize("backend", ["auto", "sync"])
def test_what_the_environment_needs_is_said_in_a_line(backend):
    with pytest.raises(ValueError, match=r"foveal/Latent-v0 is missing 2 .*'env_id' and 'world_model'"):
        make_vec("foveal/Latent-v0", 2, backend=backend)
    with pytest.raises(ValueError, match=r"foveal/Latent-v0 is missing 1 .*'world_model'"):
        make_vec("foveal/Latent-v0", 2, env_kwargs={"env_id": "toys/Sides-v0"}, backend=backend)


def test_from_frames_to_an_agent(folder, capsys):
    train = ["train", "world-model", "--dataset", str(folder / "seen.npz"), "--epochs", "2"]
    train += ["--vae", str(folder / "eye.safetensors"), "--hidden-size", "8"]
    quiet = ["--track", "off", "--no-progress"]
    assert main([*train, *quiet]) == 0
    (run,) = Path().glob("results/*/*")
    summary = json.loads((run / "summary.json").read_text())
    assert {"test/nats", "test/frame_error", "baseline/same_frame_error"} <= summary.keys()
    assert {path.name for path in (run / "plots").iterdir()} >= {"dreams.png", "predictions.png"}
    assert main(["resume", str(run), "--epochs", "3", "--no-progress"]) == 0
    agent = ["train", "a2c", "--env-id", "foveal/Latent-v0", "--total-steps", "40", "--final-episodes", "2"]
    agent += ["--env-kwargs", "env_id=toys/Sides-v0", f"world_model={run}", "--no-video"]
    assert main([*agent, *quiet]) == 0
    (played,) = Path().glob("results/a2c*/*")
    assert main(["evaluate", str(played), "--episodes", "2"]) == 0
    assert "traceback" not in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "SEEN"], "vae must be the run of a VAE"),
        (["--dataset", "digits", "--vae", "EYE"], "takes an .npz of foveal collect"),
        (["--dataset", "SEEN", "--vae", "nowhere"], "no weights file or run at nowhere"),
        (["--dataset", "SEEN", "--vae", "EYE", "--binarize", "100"], "these frames are"),
        (["--dataset", "SEEN", "--vae", "EYE", "--train-size", "50"], "in order, got 50"),
        (["--dataset", "FEW", "--vae", "EYE"], "a world model takes more than 32"),
        (["--dataset", "SEEN", "--vae", "EYE", "--mixtures", "0"], "mixtures must be 1"),
        (
            ["--env-id", "foveal/Latent-v0", "--env-kwargs", "env_id=CartPole-v1", "world_model=EYE"],
            "holds a 'vae', not a 'world-model'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_one_line(flags, message, folder, capsys):
    write(Path("few.npz"), play(Collect(env_id="toys/Sides-v0", frames=100, num_envs=4)))
    names = {"SEEN": folder / "seen.npz", "EYE": folder / "eye.safetensors", "FEW": "few.npz"}
    command = ["train", "a2c" if "--env-id" in flags else "world-model", *flags]
    for name, path in names.items():
        command = [part.replace(name, str(path)) for part in command]
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not Path("results").exists()
