"""Settings of Stable-Baselines3's algorithms, under its names, and its zoo's values of them by environment
(DLR-RM/rl-baselines3-zoo on GitHub, hyperparams/, as of April 2026)."""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SB3Config:
    """What all of Stable-Baselines3's algorithms have here."""

    num_envs: int = 1
    """Environments stepped side by side."""
    learning_rate: float = 3e-4
    """The optimizer's step size."""
    learning_rate_final: float | None = None
    """Step size that `learning_rate` falls to, linearly over the training; None keeps it constant."""
    gamma: float = 0.99
    """Discount a step, in [0, 1]."""
    net_arch: tuple[int, ...] | None = None
    """Widths of the hidden layers of Stable-Baselines3's own network; None is its default, 64 64 for vectors.
    An --encoder takes their place."""
    activation: Literal["tanh", "relu"] = "tanh"
    """What follows each of those layers."""
    normalize: bool = False
    """Its VecNormalize: vectors to mean 0 and variance 1, rewards over the discounted return's deviation."""

    def __post_init__(self) -> None:
        if self.net_arch is not None:
            object.__setattr__(self, "net_arch", tuple(self.net_arch))  # JSON has it as a list
        given: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}

        def check(names: str, what: str, holds: Callable[[Any], bool]) -> None:
            for name in names.split():
                if name in given and not holds(given[name]):
                    raise ValueError(f"{name} must be {what}, got {given[name]}")

        counts = "num_envs n_steps n_epochs buffer_size train_freq target_update_interval n_critic_updates"
        check(counts, "1 or more", lambda x: x >= 1)
        check("lstm_hidden_size n_quantiles cg_max_steps sub_sampling_factor", "1 or more", lambda x: x >= 1)
        check("net_arch", "widths of 1 or more", lambda x: all(width >= 1 for width in x))
        check("batch_size", "2 or more", lambda x: x >= 2)
        check("learning_starts", "0 or more", lambda x: x >= 0)
        check("gradient_steps", "1 or more, or -1", lambda x: x >= 1 or x == -1)
        check("learning_rate max_grad_norm", "greater than 0", lambda x: x > 0)
        check("clip_range clip_range_vf target_kl", "greater than 0", lambda x: x > 0)
        check("learning_rate_final clip_range_final", "0 or more", lambda x: x >= 0)
        check("gamma gae_lambda exploration_initial_eps exploration_final_eps", "between 0 and 1", _is_share)
        check("tau exploration_fraction", "greater than 0 and at most 1", lambda x: 0 < x <= 1)
        if given.get("normalize_advantage") and self.num_envs * given["n_steps"] < 2:
            raise ValueError("n_steps must be 2 or more with num_envs 1 and normalize_advantage, got 1")


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


@dataclass(frozen=True)
class DQNConfig(SB3Config):
    """Hyper-parameters of Stable-Baselines3's DQN, by its names and with its defaults."""

    learning_rate: float = 1e-4
    """Adam's step size."""
    activation: Literal["tanh", "relu"] = "relu"
    """What follows each hidden layer."""
    buffer_size: int = 1_000_000
    """Transitions that the replay keeps, all environments together."""
    learning_starts: int = 100
    """Environment steps taken at random before the first update."""
    batch_size: int = 32
    """Transitions in one gradient step."""
    tau: float = 1.0
    """Share by which each update moves the target network to the online one, in (0, 1]; 1 copies it."""
    train_freq: int = 4
    """Steps of each environment between updates."""
    gradient_steps: int = 1
    """Gradient steps at each update; -1 is as many as environment steps were taken since the last."""
    n_steps: int = 1
    """Rewards that a target sums up before it bootstraps."""
    target_update_interval: int = 10_000
    """Environment steps between updates of the target network."""
    exploration_fraction: float = 0.1
    """Share of the training over which epsilon falls, in (0, 1]."""
    exploration_initial_eps: float = 1.0
    """Epsilon at the start."""
    exploration_final_eps: float = 0.05
    """Epsilon at the end of its linear schedule, and from then on."""
    max_grad_norm: float | None = 10.0
    """L2 norm that gradients are clipped to."""


@dataclass(frozen=True)
class PolicyConfig(SB3Config):
    """Hyper-parameters that Stable-Baselines3's policy gradient algorithms share."""

    n_steps: int = 2048
    """Steps of each environment between two updates."""
    gae_lambda: float = 0.95
    """Trade between bias (0) and variance (1) of the advantages, in [0, 1]."""
    normalize_advantage: bool = True
    """Advantages of a minibatch to mean 0 and variance 1."""
    use_sde: bool = False
    """Box actions: exploration noise that depends on the state (1803.02999) instead of independent noise."""
    sde_sample_freq: int = -1
    """Steps between two draws of that noise; -1 draws at the start of a rollout only."""
    log_std_init: float = 0.0
    """Box actions: log of the standard deviation at the start."""
    ortho_init: bool = True
    """Orthogonal initial weights, of the encoder too; never of one that comes trained."""


@dataclass(frozen=True)
class A2CConfig(PolicyConfig):
    """Hyper-parameters of Stable-Baselines3's A2C, by its names and with its defaults."""

    learning_rate: float = 7e-4
    """The optimizer's step size."""
    n_steps: int = 5
    """Steps of each environment between two updates."""
    gae_lambda: float = 1.0
    """Trade between bias (0) and variance (1) of the advantages, in [0, 1]; 1 is n-step returns."""
    normalize_advantage: bool = False
    """Advantages of a rollout to mean 0 and variance 1."""
    ent_coef: float = 0.0
    """Weight of the entropy in the loss."""
    vf_coef: float = 0.5
    """Weight of the value's squared error in the loss."""
    max_grad_norm: float = 0.5
    """L2 norm that gradients are clipped to."""
    use_rms_prop: bool = True
    """RMSprop instead of Adam."""
    rms_prop_eps: float = 1e-5
    """RMSprop's epsilon."""
    rms_prop_tf: bool = False
    """RMSprop as TensorFlow has it, epsilon inside of the root."""


@dataclass(frozen=True)
class PPOConfig(PolicyConfig):
    """Hyper-parameters of Stable-Baselines3's PPO, by its names and with its defaults."""

    batch_size: int = 64
    """Transitions in one gradient step."""
    n_epochs: int = 10
    """Passes over the rollout at each update."""
    clip_range: float = 0.2
    """How far the ratio of new to old probability counts: 1 +- clip_range."""
    clip_range_final: float | None = None
    """What `clip_range` falls to, linearly over the training; None keeps it constant."""
    clip_range_vf: float | None = None
    """How far a value may move from the rollout's before its gradient stops; None for no limit."""
    ent_coef: float = 0.0
    """Weight of the entropy in the loss."""
    vf_coef: float = 0.5
    """Weight of the value's squared error in the loss."""
    max_grad_norm: float = 0.5
    """L2 norm that gradients are clipped to."""
    target_kl: float | None = None
    """An update stops where the policy has moved by 1.5 times this KL divergence (nats); None for never."""


@dataclass(frozen=True)
class RecurrentPPOConfig(PPOConfig):
    """Hyper-parameters of sb3-contrib's PPO with an LSTM, by its names and with its defaults."""

    n_steps: int = 128
    """Steps of each environment between two updates."""
    batch_size: int = 128
    """Transitions in one gradient step."""
    lstm_hidden_size: int = 256
    """Width of the LSTM."""
    enable_critic_lstm: bool = True
    """The value has an LSTM of its own."""


@dataclass(frozen=True)
class QRDQNConfig(DQNConfig):
    """Hyper-parameters of sb3-contrib's quantile regression DQN, by its names and with its defaults."""

    learning_rate: float = 5e-5
    """Adam's step size."""
    exploration_fraction: float = 0.005
    """Share of the training over which epsilon falls, in (0, 1]."""
    exploration_final_eps: float = 0.01
    """Epsilon at the end of its linear schedule, and from then on."""
    max_grad_norm: float | None = None
    """L2 norm that gradients are clipped to; None for no limit."""
    n_quantiles: int = 200
    """Quantiles of the return that the network gives for every action."""


@dataclass(frozen=True)
class TRPOConfig(PolicyConfig):
    """Hyper-parameters of sb3-contrib's TRPO, by its names and with its defaults."""

    learning_rate: float = 1e-3
    """The value's step size."""
    batch_size: int = 128
    """Transitions in one gradient step of the value."""
    n_critic_updates: int = 10
    """Passes over the rollout for the value."""
    target_kl: float = 0.01
    """KL divergence (nats) that an update may move the policy by."""
    cg_max_steps: int = 15
    """Conjugate gradient steps."""
    cg_damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    sub_sampling_factor: int = 1
    """Every so many transitions make the policy's batch."""


# The zoo's settings by environment id. It has none for MinAtar: there the policy gradients take Atari's, and
# DQN what foveal's own recipe says. Its MuJoCo settings are for v4 and 1M steps.

MUJOCO: dict[str, Any] = {
    "normalize": True,
    "n_steps": 512,
    "log_std_init": -2.0,
    "ortho_init": False,
    "activation": "relu",
    "net_arch": (256, 256),
}
PPO_ATARI: dict[str, Any] = {
    "num_envs": 8,
    "n_steps": 128,
    "n_epochs": 4,
    "batch_size": 256,
    "learning_rate": 2.5e-4,
    "learning_rate_final": 0.0,
    "clip_range": 0.1,
    "clip_range_final": 0.0,
    "ent_coef": 0.01,
}
PPO_RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {
        "num_envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "learning_rate": 1e-3,
        "learning_rate_final": 0.0,
        "clip_range_final": 0.0,
    },
    "Acrobot-v*": {"normalize": True, "num_envs": 16, "n_steps": 256, "gae_lambda": 0.94, "n_epochs": 4},
    "MountainCar-v*": {"normalize": True, "num_envs": 16, "n_steps": 16, "gae_lambda": 0.98, "n_epochs": 4},
    "Pendulum-v*": {
        "num_envs": 4,
        "n_steps": 1024,
        "gamma": 0.9,
        "learning_rate": 1e-3,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    "LunarLander*-v*": {
        "num_envs": 16,
        "n_steps": 1024,
        "gae_lambda": 0.98,
        "gamma": 0.999,
        "n_epochs": 4,
        "ent_coef": 0.01,
    },
    "HalfCheetah-v*": {
        **MUJOCO,
        "gamma": 0.98,
        "learning_rate": 2.0633e-05,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
    },
    "Hopper-v*": {
        **MUJOCO,
        "batch_size": 32,
        "gamma": 0.999,
        "learning_rate": 9.80828e-05,
        "ent_coef": 0.00229519,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
    },
    "ALE/*": PPO_ATARI,
    "MinAtar/*": PPO_ATARI,
}
A2C_ATARI: dict[str, Any] = {"num_envs": 16, "ent_coef": 0.01, "vf_coef": 0.25, "rms_prop_tf": True}
A2C_RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {"num_envs": 8},
    "Acrobot-v*": {"normalize": True, "num_envs": 16},
    "MountainCar-v*": {"normalize": True, "num_envs": 16},
    "Pendulum-v*": {
        "normalize": True,
        "num_envs": 8,
        "n_steps": 8,
        "gae_lambda": 0.9,
        "vf_coef": 0.4,
        "gamma": 0.9,
        "learning_rate_final": 0.0,
        "use_sde": True,
        "log_std_init": -2.0,
        "ortho_init": False,
    },
    "LunarLander-v*": {
        "num_envs": 8,
        "gamma": 0.995,
        "learning_rate": 8.3e-4,
        "learning_rate_final": 0.0,
        "ent_coef": 1e-5,
    },
    "HalfCheetah-v*": {"normalize": True},
    "Hopper-v*": {"normalize": True},
    "ALE/*": A2C_ATARI,
    "MinAtar/*": A2C_ATARI,
}
DQN_CLASSIC: dict[str, Any] = {
    "learning_rate": 6.3e-4,
    "batch_size": 128,
    "buffer_size": 50_000,
    "learning_starts": 0,
    "target_update_interval": 250,
    "gradient_steps": -1,
    "exploration_fraction": 0.12,
    "exploration_final_eps": 0.1,
    "net_arch": (256, 256),
}
DQN_RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1_000,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
        "net_arch": (256, 256),
    },
    "MountainCar-v*": {
        "learning_rate": 4e-3,
        "batch_size": 128,
        "buffer_size": 10_000,
        "learning_starts": 1_000,
        "gamma": 0.98,
        "target_update_interval": 600,
        "train_freq": 16,
        "gradient_steps": 8,
        "exploration_fraction": 0.2,
        "exploration_final_eps": 0.07,
        "net_arch": (256, 256),
    },
    "LunarLander-v*": DQN_CLASSIC,
    "Acrobot-v*": DQN_CLASSIC,
    "ALE/*": {
        "buffer_size": 100_000,
        "learning_starts": 100_000,
        "target_update_interval": 1_000,
        "exploration_final_eps": 0.01,
    },
    "MinAtar/*": {
        "learning_rate": 2.5e-4,
        "buffer_size": 100_000,
        "learning_starts": 5_000,
        "target_update_interval": 1_000,
    },
}
QRDQN_RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {**DQN_RECIPES["CartPole-v*"], "n_quantiles": 10},
    "MountainCar-v*": {**DQN_RECIPES["MountainCar-v*"], "n_quantiles": 25},
    "Acrobot-v*": {**DQN_CLASSIC, "n_quantiles": 25},
    "LunarLander-v*": {
        "learning_rate": 1.5e-3,
        "learning_rate_final": 0.0,
        "batch_size": 128,
        "buffer_size": 100_000,
        "learning_starts": 10_000,
        "gamma": 0.995,
        "target_update_interval": 1,
        "train_freq": 256,
        "gradient_steps": -1,
        "exploration_fraction": 0.24,
        "exploration_final_eps": 0.18,
        "net_arch": (256, 256),
        "n_quantiles": 170,
    },
    "ALE/*": {"learning_starts": 50_000, "exploration_fraction": 0.025},
}
TRPO_RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {
        "num_envs": 2,
        "n_steps": 512,
        "batch_size": 512,
        "cg_damping": 1e-3,
        "gae_lambda": 0.98,
        "n_critic_updates": 20,
    },
    "Pendulum-v*": {
        "num_envs": 2,
        "n_steps": 1024,
        "gamma": 0.9,
        "n_critic_updates": 15,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    "LunarLander-v*": {
        "num_envs": 2,
        "n_steps": 512,
        "cg_damping": 0.01,
        "gae_lambda": 0.98,
        "n_critic_updates": 15,
    },
    "Acrobot-v*": {"normalize": True, "num_envs": 2, "n_steps": 1024},
    "MountainCar-v*": {"normalize": True, "num_envs": 2, "n_steps": 1024, "n_critic_updates": 20},
}
RECURRENT_PPO_RECIPES: dict[str, dict[str, Any]] = {
    "ALE/*": {**PPO_ATARI, "enable_critic_lstm": False, "lstm_hidden_size": 128},
}


def recipe_of(config: type, recipes: Mapping[str, Mapping[str, Any]]) -> Callable[..., Any]:
    def recipe(env_id: str, **changes: Any) -> Any:
        """The zoo's settings for an environment (the defaults where it has none), with `changes` made."""
        settings = next((r for pattern, r in recipes.items() if fnmatch.fnmatchcase(env_id, pattern)), {})
        return config(**{**settings, **changes})

    return recipe
