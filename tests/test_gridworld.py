"""The grid world: what its arrays say is what it does, and what it refuses."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from vector_runs import assert_resumes

from foveal.agents.tabular import expected_return, optimal_return, policy_iteration
from foveal.envs import MDP, find_spec, list_env_ids, make_mdp, make_vec
from foveal.envs.gridworld import MAPS, MOVES

ENV_ID = "foveal/GridWorld-v0"


def make(**kwargs: Any) -> Any:
    env: Any = gym.make(ENV_ID, **kwargs).unwrapped
    env.reset(seed=0)
    return env


def test_found_by_every_way_of_making_one():
    assert ENV_ID in list_env_ids()
    assert find_spec(ENV_ID).max_episode_steps == 100
    env = make_vec(ENV_ID, num_envs=2, seed=1, env_kwargs={"map": "8x8"})
    assert env.reset().shape == (2,)
    assert env.single_observation_space == gym.spaces.Discrete(54)
    assert env.single_action_space == gym.spaces.Discrete(4)
    with pytest.raises(ValueError, match="did you mean foveal/GridWorld-v0"):
        find_spec("GridWorld")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("map", MAPS)
def test_gymnasium_takes_every_map(map):
    check_env(make(map=map))
    assert 0.1 < optimal_return(make_mdp(ENV_ID, {"map": map})) < 1, "the goal cannot be reached"


def test_moves_walls_and_border():
    env = make(map=["S.#", ".G."], slip=0.0, step_reward=-0.5, goal_reward=2.0)
    np.testing.assert_array_equal(env.cells, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)])
    #                      up right down left
    assert env.successors.tolist() == [
        [0, 1, 2, 0],
        [1, 1, 3, 0],
        [0, 3, 2, 2],
        [1, 4, 3, 2],
        [4, 4, 4, 3],
    ]
    assert env.step(1) == (1, -0.5, False, False, {})
    assert env.step(1) == (1, -0.5, False, False, {}), "a wall"
    assert env.step(2) == (3, 1.5, True, False, {}), "the last move costs, too"


@pytest.mark.parametrize("map", MAPS)
def test_arrays_are_an_mdp(map):
    """MDP checks that rows are probabilities; here what they must be in a grid."""
    env = make(map=map, slip=0.3)
    mdp = env.mdp
    for state in np.flatnonzero(~mdp.terminal):
        for action in range(4):
            reached = np.flatnonzero(mdp.P[state, action])
            steps = np.abs(env.cells[reached] - env.cells[state]).sum(axis=1)
            assert steps.max() <= 1, "further than a step"
            back = env.cells[state] - MOVES[action]
            assert not (env.cells[reached] == back).all(axis=1).any(), "nothing slips backwards"
    assert mdp.start.sum() == 1
    assert [(env.layout[r][c]) for r, c in env.cells[mdp.start > 0]] == ["S"] * "".join(env.layout).count("S")


def test_steps_have_the_frequencies_of_the_tensor():
    """Pearson's statistic over all states and actions, against its mean and deviation."""
    env = make(map="4x4", slip=0.3)
    mdp, draws = env.mdp, 1000
    statistic, freedom, rewards = 0.0, 0, np.zeros((mdp.num_states, 4))
    env.reset(seed=7)
    for state in np.flatnonzero(~mdp.terminal):
        for action in range(4):
            counts = np.zeros(mdp.num_states)
            for _ in range(draws):
                env.state = int(state)
                successor, reward, terminated, truncated, _ = env.step(action)
                counts[successor] += 1
                rewards[state, action] += reward / draws
                assert (terminated, truncated) == (mdp.terminal[successor], False)
            expected = draws * mdp.P[state, action]
            assert not counts[expected == 0].any(), "went where it cannot go"
            possible = expected > 0
            statistic += ((counts - expected)[possible] ** 2 / expected[possible]).sum()
            freedom += possible.sum() - 1
    assert freedom > 60
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    # Rewards lie in [-1.04, 0.96], so that a mean of 1000 has a deviation of at most 0.032.
    assert np.abs(rewards - mdp.rewards).max() < 4 * 0.032
    assert np.abs(rewards - mdp.rewards).mean() < 0.01


def test_starts_are_drawn_evenly_and_by_the_seed():
    env = make(map=["SS", "SG"])
    states = [env.reset(seed=seed)[0] for seed in range(600)]
    assert states == [env.reset(seed=seed)[0] for seed in range(600)]
    counts = np.bincount(states, minlength=4)
    assert counts[3] == 0
    assert np.abs(counts[:3] - 200).max() < 4 * np.sqrt(600 * 2 / 9)
    np.testing.assert_allclose(env.mdp.start, [1 / 3, 1 / 3, 1 / 3, 0])


def test_the_textbook_world_has_the_textbook_values():
    """Russell and Norvig, 3rd edition, figure 17.3: gamma 1, slip 0.2, -0.04 a move."""
    env = make(map="4x3", slip=0.2)
    _, q = policy_iteration(env.mdp, gamma=1.0)
    values = np.full((3, 4), np.nan)
    values[tuple(env.cells.T)] = q.max(axis=1)
    published = [[0.812, 0.868, 0.918], [0.762, np.nan, 0.660], [0.705, 0.655, 0.611]]
    np.testing.assert_allclose(values[:, :3], published, atol=5e-4)
    assert values[2, 3] == pytest.approx(0.388, abs=5e-4)


def test_time_limit_truncates():
    env = make_vec(ENV_ID, seed=1, env_kwargs={"slip": 0.0})
    env.reset()
    for t in range(100):
        step = env.step(np.array([0]))  # up, against the border
        assert (step.terminated[0], step.truncated[0]) == (False, t == 99)


def test_pictures():
    env = make(map="4x4", render_mode="ansi")
    assert env.render() == "@..#\n.P..\n...P\n#..G"
    env.state = 1
    assert env.render() == "S@.#\n.P..\n...P\n#..G"
    env = make(map="4x4", render_mode="rgb_array")
    first = env.render()
    assert (first.shape, first.dtype) == ((192, 192, 3), np.uint8)
    env.state = 1
    second = env.render()
    changed = np.argwhere((first != second).any(axis=-1))
    assert changed[:, 0].max() < 48, "only the first row of cells"
    assert 48 < changed[:, 1].max() < 96
    assert (first[:48, :48] != second[:48, :48]).any()
    assert (
        len({tuple(first[6 + 48 * r, 6 + 48 * c]) for r, c in [(0, 3), (3, 3), (1, 1), (0, 1), (0, 0)]}) == 5
    )
    assert make(map="4x4").render() is None


def test_resumes_where_it_stood():
    assert_resumes(ENV_ID, {"num_envs": 3, "env_kwargs": {"map": "8x8", "slip": 0.5}}, before=130, after=40)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"map": "9x9"}, r"map '9x9' is unknown; nearest: 8x8, 4x4, 4x3 \(or rows of #.SGP\)"),
        ({"map": 3}, "map must be a name .*or rows of text, got 3"),
        ({"map": ["S.", 1]}, "rows of text"),
        ({"map": ["S.", "G"]}, r"map must have rows of one length, got the lengths \[2, 1\]"),
        ({"map": "S.\nG"}, r"got the lengths \[2, 1\]"),
        ({"map": []}, "map must have rows"),
        ({"map": ["SX", "G."]}, "map must be made of # . S G P, got X in it"),
        ({"map": ["..", "G."]}, "map must have a S in it, got ../G."),
        ({"map": "S.."}, "map must have a G in it"),
        ({"slip": 1.5}, "slip must be between 0 and 1, got 1.5"),
        ({"slip": "icy"}, "slip must be between 0 and 1, got 'icy'"),
        ({"pit_reward": float("nan")}, "pit_reward must be a finite number, got nan"),
        ({"step_reward": True}, "step_reward must be a finite number, got True"),
        ({"stride": 2}, "stride"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        make_vec(ENV_ID, env_kwargs=kwargs)
    assert "\n" not in str(error.value)


def test_wrong_render_mode_is_named():
    from foveal.envs.gridworld import GridWorld

    with pytest.raises(ValueError, match="render_mode must be None, rgb_array or ansi, got 'human'"):
        GridWorld(render_mode="human")


# MDPs of other environments.


def test_frozen_lake_by_hand():
    mdp = make_mdp("FrozenLake-v1")
    assert (mdp.num_states, mdp.num_actions) == (16, 4)
    np.testing.assert_allclose(mdp.P[0, 0, [0, 4]], [2 / 3, 1 / 3])  # left: stay, slip up (stay), slip down
    np.testing.assert_array_equal(np.flatnonzero(mdp.terminal), [5, 7, 11, 12, 15])
    assert mdp.rewards.sum() == pytest.approx(1.0)  # next to the goal: a third by three actions
    assert mdp.rewards[14].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "best"),
    [
        ("CliffWalking-v1", {}, -13.0),
        ("FrozenLake-v1", {"is_slippery": False}, 1.0),
        ("Taxi-v4", {}, 7.93),  # what solved Taxis score on average
    ],
)
def test_best_scores_of_gymnasiums_tables(env_id, env_kwargs, best):
    mdp = make_mdp(env_id, env_kwargs)
    policy, _ = policy_iteration(mdp, 0.999)
    assert expected_return(mdp, policy, max_steps=200) == pytest.approx(best, abs=5e-3)


class NoTable(gym.Env):
    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(2)


class OddTable(NoTable):
    P: ClassVar[Any] = {
        0: {0: [(1.0, 1, 0.0, True)], 1: [(1.0, 1, 0.0, False)]},
        1: {0: [(1.0, 1, 0.0, False)], 1: [(1.0, 0, 0.0, False)]},
    }
    initial_state_distrib = np.array([1.0, 0.0])


class SmallTable(NoTable):
    mdp = MDP(np.ones((1, 1, 1)), np.zeros((1, 1)), np.array([False]), np.ones(1))


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPole-v1", r"planning takes Discrete observations; CartPole-v1 has Box"),
        ("NoTable-v0", "exposes its transitions, as `mdp` or as Gymnasium's `P` .*; NoTable-v0 does not"),
        ("OddTable-v0", "state 1 of OddTable-v0 is both"),
        (
            "SmallTable-v0",
            r"SmallTable-v0 has an mdp of 1 states and 1 actions, and the spaces Discrete\(2\) and Disc",
        ),
    ],
)
def test_environments_without_an_mdp_are_refused(env_id, message):
    kinds: Any = (NoTable, OddTable, SmallTable)
    for kind in kinds:
        gym.register(f"{kind.__name__}-v0", kind)
    try:
        with pytest.raises(ValueError, match=message) as error:
            make_mdp(env_id)
        assert "\n" not in str(error.value)
    finally:
        for kind in kinds:
            gym.registry.pop(f"{kind.__name__}-v0")


P = np.array([[[0.5, 0.5]], [[0.0, 1.0]]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": P[0]}, r"P must have the shape \(S, A, S\), got \(1, 2\)"),
        ({"P": P[:, :, :1]}, r"P must have the shape \(S, A, S\), got \(2, 1, 1\)"),
        ({"P": P * 0.9}, r"P of state and action \(0, 0\) must be probabilities that sum to 1"),
        ({"P": [[[1.5, -0.5]], [[0, 1]]]}, r"P of state and action \(0, 0\) must be probabilities"),
        ({"P": [[[np.nan, 1]], [[0, 1]]]}, r"P of state and action \(0, 0\) must be probabilities"),
        ({"rewards": [1.0, 0.0]}, r"rewards must have the shape \(2, 1\), got \(2,\)"),
        ({"rewards": [[np.inf], [0.0]]}, "rewards must be finite"),
        ({"start": [0.5, 0.6]}, "start must be probabilities that sum to 1"),
        ({"terminal": [False]}, r"terminal must have the shape \(2,\), got \(1,\)"),
        ({"terminal": [True, True]}, "terminal states must lead to themselves with reward 0"),
        ({"rewards": [[1.0], [1.0]]}, "terminal states must lead to themselves with reward 0"),
    ],
)
def test_arrays_that_are_no_mdp(change, message):
    arrays: Any = {"P": P, "rewards": [[1.0], [0.0]], "terminal": [False, True], "start": [1.0, 0.0]}
    assert MDP(**arrays).rewards.dtype == np.float64
    with pytest.raises(ValueError, match=message):
        MDP(**{**arrays, **change})
