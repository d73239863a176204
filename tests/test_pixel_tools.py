"""What the command line does with pixel by pixel models: films of drawings, and novelty of observations."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from foveal.generative import VAE, PixelCNN
from foveal.runs.cli import main
from foveal.runs.novelty import Novelty


@pytest.fixture
def weights(tmp_path):
    space = spaces.Box(0, 1, (1, 6, 5), np.uint8)
    model = PixelCNN(space, ("image",), PixelCNN.Config(width=4, layers=1), device="cpu")
    return model.save(tmp_path / "model.safetensors")


def test_a_drawing_is_filmed(weights, tmp_path, capsys):
    import imageio_ffmpeg

    video, still = tmp_path / "d.mp4", tmp_path / "d.png"
    assert main(["sample", str(weights), "-n", "3", "--video", str(video), "--out", str(still)]) == 0
    frames = imageio_ffmpeg.count_frames_and_secs(str(video))[0]
    assert frames == 6 * 5 + 60  # a pixel a frame, and two seconds of the whole
    assert main(["sample", str(weights), "--video", str(tmp_path / "no" / "d.mp4")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_other_models_are_not_filmed(tmp_path, capsys):
    space = spaces.Box(0, 1, (1, 8, 8), np.uint8)
    path = VAE(space, ("image",), device="cpu").save(tmp_path / "vae.safetensors")
    assert main(["sample", str(path), "--video", str(tmp_path / "d.mp4")]) == 2
    assert "vae does not draw pixel by pixel" in capsys.readouterr().err


def test_novelty_is_the_mean_of_each_episode_that_counts(weights):
    model = PixelCNN.load(weights, device="cpu")
    novelty = Novelty(weights, model.space, "cpu")
    obs = torch.randint(0, 2, (4, 2, 1, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    starts = np.array([[True, True], [False, False], [True, False], [False, True]])
    for seen, start in zip(obs, starts):
        novelty.see(seen.numpy(), start)
    figures = novelty.figures(3)  # two of the first environment, one of the second
    bits = -model.log_prob(obs.flatten(0, 1)).view(4, 2).numpy() / (30 * np.log(2))
    expected = [bits[:2, 0].mean(), bits[2:, 0].mean(), bits[:3, 1].mean()]
    assert figures["novelty/episodes"] == pytest.approx(expected, rel=1e-5)
    assert figures["novelty/bits_per_dim_mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    with pytest.raises(ValueError, match="novelty: the model takes"):
        Novelty(weights, spaces.Box(0, 255, (1, 6, 5), np.uint8), "cpu")
