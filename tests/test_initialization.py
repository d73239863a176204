"""Orthogonal first weights."""

import pytest
import torch
from forks import python
from torch import nn

from foveal.agents.initialization import orthogonal, orthogonal_


@pytest.mark.parametrize("shape", [(64, 4), (2, 64), (16, 3, 5, 5), (8, 8)])
def test_rows_or_columns_are_orthonormal_times_the_gain(shape):
    weight = torch.empty(shape)
    orthogonal_(weight, gain=3.0)
    flat = weight.flatten(1)
    gram = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
    torch.testing.assert_close(gram, 9 * torch.eye(len(gram)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(64, 4), (2, 64), (16, 3, 5, 5)])
def test_same_numbers_as_torchs(shape):
    mine, theirs = torch.empty(shape), torch.empty(shape)
    torch.manual_seed(3)
    orthogonal_(mine, 0.5)
    torch.manual_seed(3)
    nn.init.orthogonal_(theirs, 0.5)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_all_layers_of_a_module_get_gain_and_zero_biases():
    conv, norm, linear = nn.Conv2d(2, 4, 3), nn.LayerNorm(5), nn.Linear(6, 3, bias=False)
    orthogonal(nn.Sequential(conv, norm, nn.Sequential(linear)))
    for weight in (conv.weight, linear.weight):
        flat = weight.flatten(1)
        torch.testing.assert_close(flat @ flat.T, 2 * torch.eye(len(flat)), atol=1e-5, rtol=0)
    assert conv.bias is not None
    assert not conv.bias.any()
    assert torch.equal(norm.weight, torch.ones(5))


DIGEST = """
import hashlib, sys, torch
from foveal.agents import PPO
torch.set_num_threads(int(sys.argv[1]))
agent = PPO("CartPole-v1", seed=4, device="cpu")
print(torch.get_num_threads(), hashlib.sha256(agent.weights.detach().numpy().tobytes()).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit_of_the_first_weights(tmp_path):
    threads = ("1", "2", "4")
    runs = [python(DIGEST, number, cwd=tmp_path).communicate().split() for number in threads]
    assert [run[0] for run in runs] == list(threads)
    assert len({run[1] for run in runs}) == 1
