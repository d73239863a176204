"""Small environments with known answers for the policy gradient agents, registered when this is imported."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(2, start=3),
    "multi-discrete": spaces.MultiDiscrete([2, 3], start=[0, 5]),
    "multi-binary": spaces.MultiBinary(2),
    "box": spaces.Box(-2, 1, (2,), np.float32),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "int-box": spaces.Box(0, 5, (2,), np.int32),
    "text": spaces.Text(3),
}


class Signs(gym.Env):
    """Two numbers are shown, fresh ones each step, and their signs are to be told: reward 1 for all right.

    With Box actions the reward is minus the distance from half the numbers, which its bounds allow. The seed
    draws an episode's length from `lengths`, and whether it ends by termination or truncation. With `images`
    the signs are in an image and the numbers' sizes in a vector.
    """

    def __init__(self, actions="discrete", lengths=(3, 5, 8), truncate=0.5, images=False, render_mode=None):
        self.lengths, self.truncate, self.images = lengths, truncate, images
        self.action_space = ACTIONS[actions]
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        if images:
            picture = spaces.Box(0, 255, (1, 6, 6), np.uint8)
            self.observation_space = spaces.Dict({"numbers": self.observation_space, "picture": picture})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.np_random.choice(self.lengths))
        self.truncates = bool(self.np_random.random() < self.truncate)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action) or isinstance(self.action_space, spaces.Discrete), action
        signs = (self.numbers > 0).astype(int)
        match self.action_space:
            case spaces.Discrete():
                assert action in (3, 4), action
                reward = float(action - 3 == signs[0])
            case spaces.MultiDiscrete():
                reward = float(np.mean(action - [0, 5] == signs))
            case spaces.MultiBinary():
                reward = float(np.mean(action == signs))
            case _:
                reward = -float(np.abs(action - self.numbers / 2).sum())
        self.count += 1
        over = self.count >= self.length
        return self.observe(), reward, over and not self.truncates, over and self.truncates, {}

    def observe(self):
        self.numbers = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        if not self.images:
            return self.numbers.copy()
        picture = np.zeros((1, 6, 6), np.uint8)
        picture[:, :3], picture[:, 3:] = 255 * (self.numbers > 0)[:, None, None]
        return {"numbers": np.abs(self.numbers), "picture": picture}


class Recall(gym.Env):
    """A sign is shown at the first step and asked for `delay` steps later, at the end: reward 1 if right.

    Of one observation alone the best that can be done is 1/2.
    """

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, delay=3):
        self.delay = delay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.count = int(self.np_random.integers(2)), 0
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.count += 1
        over = self.count > self.delay
        obs = np.array([0, self.count == self.delay], np.float32)
        return obs, float(over and action == self.cue), over, False, {}


GREY = spaces.Box(0, 255, (1, 20, 20), np.uint8)


class Sides(gym.Env):
    """An image is bright on its left or right half, which is to be told, four times: reward 1 if right."""

    observation_space = GREY
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        reward = float(action == self.side)
        self.count += 1
        return self.observe(), reward, self.count == 4, False, {}

    def observe(self):
        self.side = int(self.np_random.integers(2))
        image = self.np_random.integers(100, size=GREY.shape, dtype=np.uint8)
        image[:, :, 10 * self.side : 10 * self.side + 10] += 120
        return image


class Broken(gym.Env):
    """Gives `value` as its reward, or in its observation, at step `at` of an episode; 0 is the reset."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, what="reward", value="nan", at=50):
        self.what, self.value, self.at = what, float(value), at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        reward = self.value if self.what == "reward" and self.count == self.at else 1.0
        return self.observe(), reward, self.count == 60, False, {}

    def observe(self):
        broken = self.what == "observation" and self.count == self.at
        return np.array([0.0, self.value if broken else self.count / 60], np.float32)


class Scripted:
    """A backend for VectorEnv that ends episodes where `script` (T, N) says: "." goes on, "T" terminates, "C"
    cuts off, "B" both at once, and "L" is a lost life: terminated, but the game goes on without a reset.

    Observations (N, 3) are the environment, the episode and the step in it; rewards say all of that too.
    """

    def __init__(self, script: list[str]):
        self.script = np.array([list(row) for row in script])  # (T, N)
        self.single_observation_space: spaces.Space = spaces.Box(-100, 100, (3,), np.float32)
        self.single_action_space: spaces.Space = spaces.Discrete(2)
        self.t = 0
        self.place = np.zeros((self.script.shape[1], 3), np.float32)
        self.place[:, 0] = np.arange(self.script.shape[1])
        self.place[:, 1] = -1

    def reset(self, mask, seeds):
        self.place[mask, 1] += 1
        self.place[mask, 2] = 0
        return self.place.copy()

    def step(self, actions):
        kinds = self.script[self.t]
        self.t += 1
        self.place[:, 2] += 1
        rewards = self.place @ [100.0, 10.0, 1.0] + actions / 2
        truncated = np.isin(kinds, ["C", "B"])
        terminated = np.isin(kinds, ["T", "B", "L"])
        return self.place.copy(), rewards, terminated, truncated, np.isin(kinds, ["T", "B", "C"])

    def render(self):
        raise RuntimeError

    def close(self):
        pass


for environment in (Signs, Recall, Sides, Broken):
    gym.register(f"toys/{environment.__name__}-v0", f"toys:{environment.__name__}")
