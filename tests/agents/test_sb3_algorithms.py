"""Other algorithms of stable-baselines3 on the backbone: A2C and DQN learn; the Q policy; docs/stable_baselines3.md,
done as it says."""

import copy
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN
from torch import Tensor

import recsim_gr
from recsim_gr.agents.base import backbone_log_probs
from recsim_gr.agents.sb3 import (
    BackbonePolicy,
    BackboneQPolicy,
    BatchedVecEnv,
    closed_titles,
    contained_randomness,
)
from recsim_gr.backbones import Backbone, HSTUConfig
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Contexts, Observations
from recsim_gr.reward_heads import Scorer
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World

REWARD_MODEL = "recsim_gr/RewardModel-v0"
PAGE = (Path(__file__).parents[2] / "docs" / "stable_baselines3.md").read_text(encoding="utf-8")


@pytest.fixture
def envs(log: InteractionLog, rewards: RewardEnsemble) -> Any:
    return gym.make_vec(REWARD_MODEL, num_envs=64, rewards=rewards, log=log)


def tensors(observations: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in observations.items()}


def q_policy(envs: Any, backbone: Backbone, **options: Any) -> BackboneQPolicy:
    return BackboneQPolicy(envs.single_observation_space, envs.single_action_space, lambda _: 1e-3, backbone, **options)


def as_dict(observations: Observations) -> dict[str, Any]:
    return {name: getattr(observations, name) for name in ("titles", "scores", "times", "length", "epoch")}


# -- they learn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A2C", "DQN"])
@pytest.mark.parametrize("environment", ["reward model", "world"])
def test_it_learns(
    name: str,
    environment: str,
    log: InteractionLog,
    rewards: RewardEnsemble,
    backbone: Backbone,
    world: World,
    contexts: Contexts,
) -> None:
    """Its recommendations for users whom it never met, by what it was paid for others (r̂, or true satisfaction, as
    scores have no noise here): more than half the way from the pretrained policy's titles to the best there are."""
    of_rewards = {"rewards": rewards, "log": log}
    where: dict[str, Any] = of_rewards if environment == "reward model" else {"world": world, "pool_users": 150}
    made = gym.make_vec(REWARD_MODEL if environment == "reward model" else world.env_id, num_envs=64, **where)
    env, start = BatchedVecEnv(made, seed=0), {"backbone": backbone}
    with contained_randomness():
        model: Any
        if name == "A2C":
            model = A2C(BackbonePolicy, env, 3e-3, n_steps=4, gamma=0.0, policy_kwargs=start, seed=0, device="cpu")
        else:
            model = DQN(
                BackboneQPolicy,
                env,
                3e-3,
                buffer_size=10_000,
                batch_size=128,
                learning_starts=512,
                train_freq=1,
                gradient_steps=2,
                gamma=0.0,
                target_update_interval=1_000,
                exploration_fraction=0.3,
                policy_kwargs=start,
                seed=0,
                device="cpu",
            )
        model.learn(25_600 if name == "A2C" else 12_800)
        titles, _ = model.predict(as_dict(contexts.observations), deterministic=True)
    assert not contexts.observations.seen()[np.arange(20), titles].any()
    of_world = environment == "world"
    worth = world.satisfaction(contexts.users) if of_world else rewards.mean(contexts.observations)
    before = worth[np.arange(20), backbone_log_probs(backbone, contexts.observations).argmax(axis=1)].mean()
    after = worth[np.arange(20), titles].mean()
    best = np.where(contexts.observations.seen(), -np.inf, worth).max(axis=1).mean()
    assert best > before + 0.5
    assert (after - before) / (best - before) > 0.5, (before, after, best)


# -- the Q policy -------------------------------------------------------------------------------------------------


def test_q_is_a_scorers_and_the_lowest_score_where_a_title_is_seen(envs: Any, backbone: Backbone) -> None:
    observations, _ = envs.reset(seed=0)
    torch.manual_seed(0)
    policy, seen = q_policy(envs, backbone), tensors(observations)
    scorer: Any = policy.q_net.q_net
    assert isinstance(scorer, Scorer)
    closed = torch.from_numpy(Observations(**observations, n_titles=30).seen())
    with torch.no_grad():
        q = policy.q_net(seen)
        bare = scorer(seen["titles"], seen["scores"], seen["times"])
        assert (q[closed] == 1.0).all()
        torch.testing.assert_close(q[~closed], bare[~closed])
        assert torch.equal(policy.q_net_target(seen), q)
        greedy = policy._predict(seen)
        assert torch.equal(greedy, bare.masked_fill(closed, -torch.inf).argmax(dim=1))
        scorer.head.mean.fill_(-50.0)  # far below what seen titles are said to be worth
        assert (policy.q_net(seen)[closed] == 1.0).all()
        again, _ = policy.predict(observations)
        assert not closed[torch.arange(64), torch.from_numpy(again)].any()


def test_a_seen_title_teaches_nothing(envs: Any, backbone: Backbone) -> None:
    """Shown by exploration, it is paid the lowest score, which is what Q says: no loss, no gradient."""
    observations, _ = envs.reset(seed=3)
    policy, seen = q_policy(envs, backbone), tensors(observations)
    with_history = torch.from_numpy(observations["length"] > 0)
    titles = torch.where(with_history, seen["titles"][:, 0], 0)
    _, paid, *_ = envs.step(titles.numpy())
    error = policy.q_net(seen).gather(1, titles[:, None])[:, 0] - torch.from_numpy(paid)
    loss = (error[with_history] ** 2).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert with_history.sum() > 30
    for parameter in policy.q_net.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_it_copies_the_backbone_twice_and_keeps_dropout_off(envs: Any, backbone: Backbone) -> None:
    observations, _ = envs.reset(seed=0)
    before = copy.deepcopy(backbone.state_dict())
    policy, seen = q_policy(envs, backbone), tensors(observations)
    assert backbone.config.dropout > 0
    policy.set_training_mode(True)
    assert torch.equal(policy.q_net(seen), policy.q_net(seen))
    with torch.no_grad():
        for parameter in policy.q_net.parameters():
            parameter.add_(1.0)
    target: Any = policy.q_net_target.q_net
    for name, value in before.items():
        assert torch.equal(backbone.state_dict()[name], value)
        assert torch.equal(target.backbone.state_dict()[name], value)
    trained = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in policy.q_net.parameters()}
    assert all(p.requires_grad for p in policy.q_net.parameters())


def test_titles_that_are_not_out_are_closed() -> None:
    """Of four titles, the third comes out in epoch 1: closed in epoch 0; the first has been seen by the second user."""
    titles, epoch = torch.tensor([[4, 4], [0, 4], [4, 4]]), torch.tensor([0, 0, 1])
    release = torch.tensor([0, 0, 1, 0])
    expected = [[False, False, True, False], [True, False, True, False], [False] * 4]
    assert closed_titles(titles, epoch, 4, release).tolist() == expected
    assert closed_titles(titles, epoch[:, None], 4, release).tolist() == expected
    assert closed_titles(titles, epoch, 4).tolist() == [[False] * 4, [True, False, False, False], [False] * 4]


def test_dqn_never_recommends_what_is_not_out(envs: Any, backbone: Backbone) -> None:
    observations, _ = envs.reset(seed=0)
    release = torch.zeros(30, dtype=torch.int64)
    release[:20] = 1
    policy = q_policy(envs, backbone, release=release)
    with torch.no_grad():
        assert policy._predict(tensors(observations)).min() >= 20
        assert (policy.q_net(tensors(observations))[:, :20] == 1.0).all()


def test_sessions_are_played_to_their_end(world: World, backbone: Backbone) -> None:
    """Of three steps: two go on to a history that is one longer, the third ends."""
    env = BatchedVecEnv(gym.make_vec(world.env_id, num_envs=8, world=world, horizon=3), seed=0)
    with contained_randomness():
        model: Any = A2C(
            BackbonePolicy, env, n_steps=6, gamma=0.9, policy_kwargs={"backbone": backbone}, seed=0, device="cpu"
        )
        model.learn(48)
    buffer = model.rollout_buffer
    lengths = buffer.observations["length"].reshape(8, 6)  # it has been flattened, environment after environment
    np.testing.assert_array_equal(buffer.episode_starts, np.array([[1, 0, 0] * 2] * 8).T)
    np.testing.assert_array_equal(lengths - lengths[:, [0, 0, 0, 3, 3, 3]], [[0, 1, 2] * 2] * 8)


def test_dqn_takes_a_plain_environment_too(log: InteractionLog, rewards: RewardEnsemble, backbone: Backbone) -> None:
    env = gym.make(REWARD_MODEL, rewards=rewards, log=log)
    with contained_randomness():
        model: Any = DQN(
            BackboneQPolicy,
            env,
            buffer_size=200,
            learning_starts=20,
            train_freq=1,
            policy_kwargs={"backbone": backbone},
            seed=0,
            device="cpu",
        )
        model.learn(60)
    moved = model.policy.q_net.q_net.backbone.titles
    assert model.num_timesteps == 60
    assert not torch.equal(moved, backbone.titles)


def test_dqn_explores_until_it_is_told_not_to(envs: Any, backbone: Backbone) -> None:
    """As the page says: seen titles come up in `predict`, and never with ``deterministic=True``."""
    with contained_randomness():
        model: Any = DQN(
            BackboneQPolicy, BatchedVecEnv(envs, seed=0), policy_kwargs={"backbone": backbone}, seed=0, device="cpu"
        )
        model.exploration_rate = 1.0
        seen = {True: 0, False: 0}
        for seed in range(20):
            observations, _ = envs.reset(seed=seed)
            for deterministic in seen:
                titles, _ = model.predict(observations, deterministic=deterministic)
                seen[deterministic] += int((titles[:, None] == observations["titles"]).any(axis=1).sum())
    assert seen[True] == 0
    assert seen[False] > 0


# -- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["PPO", "A2C", "DQN"])
def test_the_page_keeps_its_word(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each of its three lines, on a world and with steps that are smaller than the page's."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    models = re.findall(r"^model = (\w+)\(", code, re.MULTILINE)
    assert models == ["PPO", "A2C", "DQN"]
    others = "|".join(name for name in models if name != kept)
    code = re.sub(rf"^model = (?:{others})\(.*\n", "", code, flags=re.MULTILINE)
    smaller = code.replace("n_titles=200", "n_titles=30, history_length=6").replace("n_users=1_000", "n_users=60")
    smaller = smaller.replace("20_000)", "1_024)")
    assert smaller.count("1_024)") == 1
    few = TrainingConfig(steps=4, warmup_steps=1, checks=1)
    pretrain, fit = recsim_gr.pretrain, recsim_gr.fit_reward_ensemble
    monkeypatch.setattr(recsim_gr, "pretrain", lambda log: pretrain(log, HSTUConfig(dimensions=8, n_layers=1), few))
    monkeypatch.setattr(
        recsim_gr,
        "fit_reward_ensemble",
        lambda log, backbone: fit(log, backbone, RewardEnsembleConfig(members=2, training=few)),
    )
    found: dict[str, Any] = {}
    with contained_randomness():
        exec(compile(smaller, "stable_baselines3.md", "exec"), found)
    assert type(found["model"]).__name__ == kept
    assert found["model"].num_timesteps >= 1_024
    assert found["titles"].shape == (64,)
    assert not (found["titles"][:, None] == found["observations"]["titles"]).any()
