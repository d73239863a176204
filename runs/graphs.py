"""What there is to export: the parts of trained agents and models, as modules from raw inputs to answers.

Everything between a raw observation and an action is in the graph: the scaling of images, normalisation,
memory (whose state goes in and comes out), the cut to an action's bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..agents import DQN, PQN, RAM, Agent
from ..agents.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    MultiCategorical,
    SquashedGaussian,
    make_distribution,
)
from ..agents.on_policy import OnPolicyAgent
from ..agents.recurrent_attention import resolved
from ..agents.sb3 import OffPolicyAgent, SB3Agent
from ..generative import GAN, VAE, Autoencoder
from ..vision import Classifier, Model

Arrays = dict[str, np.ndarray]


class Input(NamedTuple):
    """An input of a graph: (B, *shape) of one row's `space`."""

    name: str
    space: spaces.Space
    about: str


class Function(nn.Module):
    """A function of tensors as a module, with the networks whose weights it uses."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *networks: nn.Module):
        super().__init__()
        self.function, self.networks = function, nn.ModuleList(networks)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.function(*inputs)


class Graph(NamedTuple):
    """A part of something trained, ready to be written."""

    module: Function
    """(*inputs) -> a tuple of outputs, (B, ...) each."""
    inputs: tuple[Input, ...]
    outputs: dict[str, str]
    """Names, in order, and what they are."""
    answer: Callable[[Arrays], Arrays]
    """What the library itself gives for inputs by name: the outputs, by name, that it has a call for."""
    memory: bool = False
    """Whether the output `next_state` is the next call's `state`."""


def make_graph(trained: Agent | Model, part: str = "auto") -> tuple[Graph, str]:
    """A part of an agent or a model on the CPU, and its name; `auto` is the first that it has.

    Raises ValueError, in one line that says why, for what has no such part or no graph at all.
    """
    parts = parts_of(trained)
    if part != "auto" and part not in parts:
        raise ValueError(f"part: {trained.name} has {' and '.join(parts)}, got {part!r}")
    if isinstance(trained, Model) and getattr(trained.config, "precision", "float32") != "float32":
        trained.config = replace(trained.config, precision="float32")  # the graph is, and is compared so
    name = next(iter(parts)) if part == "auto" else part
    return parts[name](), name


def parts_of(trained: Agent | Model) -> dict[str, Callable[[], Graph]]:
    """Name of a part -> what makes its graph. ValueError where there is none."""
    match trained:
        case DQN() | PQN() | OnPolicyAgent():
            return {"policy": lambda: policy(trained), "encoder": lambda: agent_encoder(trained)}
        case SB3Agent() if trained.name == "sb3/recurrent_ppo":
            raise ValueError(f"{trained.name} is not exported: its LSTM is sb3-contrib's; ppo has memory too")
        case SB3Agent():
            return {"policy": lambda: policy(trained), "encoder": lambda: agent_encoder(trained)}
        case RAM():
            return {"policy": lambda: ram_policy(trained)}
        case Classifier() if trained.config.encoder is None and trained.config.backbone == "linear":
            return {"classifier": lambda: classifier(trained)}
        case Classifier():
            return {
                "classifier": lambda: classifier(trained),
                "encoder": lambda: classifier_encoder(trained),
            }
        case VAE() | Autoencoder():
            return {"decoder": lambda: decoder(trained), "encoder": lambda: image_encoder(trained)}
        case GAN():
            return {"generator": lambda: decoder(trained)}
    reasons = {
        "knn": "it has no network, it compares with all training images",
        "pixelcnn": "it draws one pixel after the other",
        "pixelrnn": "it draws one pixel after the other",
    }
    raise ValueError(
        f"{trained.name} is not exported: {reasons.get(trained.name, 'it is a table, no network')}"
    )


# Agents.


def observations(space: spaces.Space) -> tuple[Input, ...]:
    """`obs`, or `obs.KEY` for every key of a Dict."""
    about = "raw observations, as the environment gives them; images channels first"
    if isinstance(space, spaces.Dict):
        return tuple(Input(f"obs.{key}", part, about) for key, part in space.items())
    return (Input("obs", space, about),)


def reader(agent: Any) -> Callable[[tuple[Tensor, ...]], Any]:
    """From flat inputs to what the agent's networks take: a tensor, or a dict of them, normalised where the
    agent normalises."""
    space = agent.observation_space
    keys = list(space) if isinstance(space, spaces.Dict) else [""]
    ours = getattr(agent.network, "normalizer", None)
    theirs: dict[str, tuple[Tensor, Tensor]] = {}
    if isinstance(agent, SB3Agent) and agent.normalizer is not None:
        vec = agent.normalizer
        for key, moments in vec.obs_rms.items() if isinstance(space, spaces.Dict) else [("", vec.obs_rms)]:
            deviation = torch.as_tensor(np.sqrt(moments.var + vec.epsilon))
            theirs[key] = torch.as_tensor(moments.mean), deviation

    def read(inputs: tuple[Tensor, ...]) -> Any:
        given = dict(zip(keys, inputs))
        for key, (mean, deviation) in theirs.items():
            cut = float(agent.normalizer.clip_obs)
            given[key] = ((given[key] - mean) / deviation).clamp(-cut, cut).float()
        obs = given if isinstance(space, spaces.Dict) else given[""]
        return obs if ours is None else ours(obs)

    return read


def policy(agent: Any) -> Graph:
    """The deterministic policy of an agent."""
    if isinstance(agent, DQN | PQN | OffPolicyAgent):
        return value_policy(agent)
    return sb3_policy(agent) if isinstance(agent, SB3Agent) else actor(agent)


def value_policy(agent: Any) -> Graph:
    """The greedy action of a Q-function, and its values."""
    read, first = reader(agent), int(agent.action_space.start)
    network: Any = agent.network.online if isinstance(agent, OffPolicyAgent) else agent.network

    def act(*inputs: Tensor) -> tuple[Tensor, ...]:
        q = network(read(inputs))
        if q.ndim == 3:  # quantiles (B, Q, A)
            q = q.mean(1)
        return q.argmax(1) + first, q

    outputs = {"action": "the greedy action", "scores": "the value of each action"}
    inputs = observations(agent.observation_space)
    return Graph(Function(act, network), inputs, outputs, predicting(agent))


def actor(agent: OnPolicyAgent) -> Graph:
    """The likeliest action, the distribution's parameters, and the state of a memory: the policy's part of
    it, which is the first of what `predict` hands on."""
    network, distribution, read = agent.network, agent.distribution, reader(agent)
    inputs = observations(agent.observation_space)
    number, core = len(inputs), network.core
    outputs = {"action": "the likeliest action", **parameters(distribution)}
    if core is not None:
        state = spaces.Box(-1, 1, (core.state_size,), np.float32)
        inputs += (
            Input("state", state, "the memory: zeros at first, then the last call's next_state"),
            Input("episode_start", spaces.MultiBinary(()), "true where an episode begins: forget the state"),
        )
        outputs["next_state"] = "the memory after this step"

    def act(*given: Tensor) -> tuple[Tensor, ...]:
        features = network.encoder(read(given[:number]))
        states: tuple[Tensor, ...] = ()
        if core is not None:
            state, starts = given[number:]
            kept = state * (~starts).unsqueeze(1).to(state.dtype)
            features, state = core.step(core.project(features), kept)
            states = (state,)
        params = network.parameters_of(network.policy_head(features))
        numbers = params.chunk(2, -1) if distribution.num_log_stds else (params,)
        return chosen(distribution, params), *numbers, *states

    return Graph(Function(act, network), inputs, outputs, predicting(agent), core is not None)


def sb3_policy(agent: SB3Agent) -> Graph:
    """The likeliest action of Stable-Baselines3's actor-critics, and the distribution's parameters."""
    from stable_baselines3.common.policies import BaseModel

    net, read = agent.model.policy, reader(agent)
    distribution = make_distribution(agent.action_space)
    # With noise that depends on the state the deviations do so too; the likeliest action is still the mean.
    no_deviations = agent.config.use_sde

    def act(*inputs: Tensor) -> tuple[Tensor, ...]:
        features = BaseModel.extract_features(net, read(inputs), net.pi_features_extractor)
        params = net.action_net(net.mlp_extractor.forward_actor(features))
        if not distribution.num_log_stds:
            return chosen(distribution, params), params
        log_std = torch.zeros_like(params) if no_deviations else net.log_std.expand_as(params)
        action = chosen(distribution, torch.cat([params, log_std], -1))
        return (action, params) if no_deviations else (action, params, log_std)

    outputs = {"action": "the likeliest action", **parameters(distribution)}
    if no_deviations:
        outputs.pop("log_std")
    inputs = observations(agent.observation_space)
    return Graph(Function(act, net), inputs, outputs, predicting(agent))


def parameters(distribution: Distribution) -> dict[str, str]:
    """Names of a distribution's parameters, and what they are."""
    match distribution:
        case Categorical():
            return {"logits": "of the actions"}
        case MultiCategorical():
            return {"logits": f"of choices of {distribution.sizes} each, one after the other"}
        case Bernoulli():
            return {"logits": "of the bits"}
    before = ", before tanh and the stretch to the bounds" * isinstance(distribution, SquashedGaussian)
    return {"mean": f"of the Gaussian over actions{before}", "log_std": "its log standard deviations"}


def chosen(distribution: Distribution, params: Tensor) -> Tensor:
    """The likeliest actions (B, ...) as the environment takes them: `to_env` of `mode`, in torch."""
    mode = distribution.mode(params)
    match distribution:
        case Categorical():
            return mode + distribution.start
        case MultiCategorical():
            return mode + torch.as_tensor(distribution.start)
        case Bernoulli():
            dtype = getattr(torch, str(np.dtype(distribution.dtype)))
            return mode.to(dtype).unflatten(-1, distribution.shape)
    space: spaces.Box = distribution.space  # type: ignore[attr-defined]
    shaped = mode.unflatten(-1, space.shape)
    if isinstance(distribution, SquashedGaussian):
        middle, half = torch.as_tensor(distribution.middle), torch.as_tensor(distribution.half)
        shaped = middle + half * shaped.tanh()
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    return shaped.maximum(low).minimum(high).to(low.dtype)


def predicting(agent: Any) -> Callable[[Arrays], Arrays]:
    """`predict` of an agent, for a graph's inputs by name."""

    def answer(given: Arrays) -> Arrays:
        obs: Any = {name.removeprefix("obs."): x for name, x in given.items() if name.startswith("obs.")}
        obs = obs or given["obs"]
        if "state" not in given:
            return {"action": agent.predict(obs, deterministic=True)[0]}
        # The library's state has the value's memory too, behind the policy's.
        size = given["state"].shape[1]
        whole = np.zeros((len(given["state"]), agent.network.state_size), np.float32)
        whole[:, :size] = given["state"]
        action, state = agent.predict(obs, whole, given["episode_start"].astype(bool), deterministic=True)
        return {"action": action, "next_state": state[:, :size]}

    return answer


def agent_encoder(agent: Any) -> Graph:
    """What the policy or the Q-function sees of an observation."""
    read = reader(agent)
    net: Any = agent.network.online if isinstance(agent, SB3Agent) else agent.network

    def encode(*inputs: Tensor) -> tuple[Tensor, ...]:
        obs = read(inputs)
        if not isinstance(agent, SB3Agent):
            return (net.encoder(obs),)
        from stable_baselines3.common.policies import BaseModel

        extractor = getattr(net, "pi_features_extractor", None) or net.features_extractor
        return (BaseModel.extract_features(net, obs, extractor),)

    outputs = {"features": "what the encoder makes of an observation"}
    return Graph(Function(encode, net), observations(agent.observation_space), outputs, lambda given: {})


def ram_policy(ram: RAM) -> Graph:
    """One glimpse of the recurrent attention model, as `foveal/Glimpse-v0` shows it: where to look next, the
    answer so far, and the core's state."""
    network, learned = ram.network, ram.config.looking == "learned" and ram.config.glimpses > 1
    patch, scales = resolved(ram.config)
    shape = (scales * ram.space.shape[0], patch, patch)
    inputs: tuple[Input, ...] = (
        Input("glimpse", spaces.Box(0, 1, shape, np.float32), "patches around the location, finest first"),
        Input("location", spaces.Box(-1, 1, (2,), np.float32), "x and y from -1 to 1, where it was taken"),
        Input("state", spaces.Box(-1, 1, (network.core.state_size,), np.float32), "zeros at first"),
    )
    if learned:
        inputs += (Input("time", spaces.Box(0, 1, (1,), np.float32), "share of the glimpses taken"),)
    outputs = {"answer": "the likeliest class so far", "scores": "logits of the classes"}
    outputs |= {"look": "where to look next"} if learned else {}
    outputs["next_state"] = "the state for the next glimpse"

    def step(
        glimpse: Tensor, location: Tensor, state: Tensor, time: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        output, after = network(glimpse, location, state)
        scores = network.classifier(output)
        looks = () if time is None else (network.means(output, network.taken(time)).clamp(-1, 1),)
        return scores.argmax(-1), scores, *looks, after

    def answer(given: Arrays) -> Arrays:
        obs = {name: array for name, array in given.items() if name != "state"}
        actions, state = ram.predict(obs, torch.as_tensor(given["state"]), deterministic=True)
        looks = {"look": actions["look"]} if learned else {}
        return {"answer": actions["answer"], **looks, "next_state": state.numpy()}

    return Graph(Function(step, network), inputs, outputs, answer, memory=True)


# Models of images.


def images(model: Any) -> Input:
    return Input("image", model.space, f"values from 0 to {int(model.space.high.max())}, channels first")


def labels(model: Any) -> tuple[Input, ...]:
    """The label, of a conditional model."""
    if not getattr(model, "conditional", False):
        return ()
    return (Input("label", spaces.Discrete(len(model.classes)), "the number of a class"),)


def classifier(model: Classifier) -> Graph:
    def classify(image: Tensor) -> tuple[Tensor, ...]:
        scores = model.network(image)
        return scores.argmax(1), scores

    def answer(given: Arrays) -> Arrays:
        scores = model.scores(torch.as_tensor(given["image"]))
        return {"label": scores.argmax(1).numpy(), "scores": scores.numpy()}

    outputs = {"label": "the likeliest class", "scores": "logits of the classes"}
    return Graph(Function(classify, model.network), (images(model),), outputs, answer)


def classifier_encoder(model: Classifier) -> Graph:
    network: Any = model.network
    if model.config.encoder is not None:
        see, what = network.encoder, "what the encoder makes of an image"
    else:
        see, what = network.feature_map, "the backbone's last map"

    def encode(image: Tensor) -> tuple[Tensor, ...]:
        return (see(image),)

    return Graph(Function(encode, network), (images(model),), {"features": what}, lambda given: {})


def decoder(model: Any) -> Graph:
    """From codes to images, of what has `decode`: a VAE's means, an autoencoder's images, a GAN's."""
    network: Any = model.generator if isinstance(model, GAN) else model.network

    def decode(z: Tensor, *label: Tensor) -> tuple[Tensor, ...]:
        if isinstance(model, GAN):
            return ((network(z, *label) + 1) / 2,)
        if isinstance(model, VAE):
            out = network.decode(z, *(label or (None,)))
            return model.likelihood.mean(out), out
        out = network.decoder(z)
        return (out.sigmoid() if model.binary else out.clamp(0, 1),)

    def answer(given: Arrays) -> Arrays:
        z, *label = (torch.as_tensor(given[name]) for name in ("z", "label") if name in given)
        return {"image": model.decode(z, *label).numpy()}

    outputs = {"image": "pixels from 0 to 1" + ", the means of p(x | z)" * isinstance(model, VAE)}
    if isinstance(model, VAE):
        outputs["parameters"] = "of p(x | z), one after the other along the channels"
    about = "a standard normal draw" if not isinstance(model, Autoencoder) else "a code"
    z = Input("z", spaces.Box(-np.inf, np.inf, (model.latent_dim,), np.float32), about)
    return Graph(Function(decode, network), (z, *labels(model)), outputs, answer)


def image_encoder(model: Any) -> Graph:
    """From images to codes, or to the posterior of a VAE."""
    network = model.network

    def encode(image: Tensor, *label: Tensor) -> tuple[Tensor, ...]:
        if isinstance(model, VAE):
            return tuple(network.encode(image, *(label or (None,))))
        return (network.encode(image),)

    def answer(given: Arrays) -> Arrays:
        image = torch.as_tensor(given["image"])
        label = torch.as_tensor(given["label"]) if "label" in given else None
        if isinstance(model, VAE):
            return {k: part.numpy() for k, part in model.posterior(image, label)._asdict().items()}
        return {"code": model.encode(image).numpy()}

    if isinstance(model, VAE):
        outputs = {"mean": "of q(z | x)", "log_var": "its log variances"}
    else:
        outputs = {"code": "of the image"}
    return Graph(Function(encode, network), (images(model), *labels(model)), outputs, answer)
