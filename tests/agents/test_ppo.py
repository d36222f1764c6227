"""PPO: the backbone as a policy of stable-baselines3, what the learner is paid, and whose random numbers it uses."""

import random
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO as StableBaselinesPPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

import recsim_gr  # noqa: F401  (registers RewardModel-v0)
from recsim_gr.agents import PPO, Agent
from recsim_gr.agents.base import backbone_log_probs
from recsim_gr.agents.ppo import Checks, PPOConfig, _Watch, penalised_reward
from recsim_gr.agents.sb3 import BackbonePolicy, BatchedVecEnv, contained_randomness, inverse_cdf
from recsim_gr.backbones import HSTU, HSTUConfig
from recsim_gr.errors import ConfigError, TrainingError
from recsim_gr.histories import Histories, split_logs
from recsim_gr.log import InteractionLog
from recsim_gr.observations import Observations
from recsim_gr.pretraining import pretrain
from recsim_gr.rewards import RewardEnsemble, RewardEnsembleConfig, fit_reward_ensemble
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

REWARD_MODEL = "recsim_gr/RewardModel-v0"

Make = Callable[..., Agent]


@pytest.fixture
def envs(log: InteractionLog, rewards: RewardEnsemble) -> Any:
    return gym.make_vec(REWARD_MODEL, num_envs=64, rewards=rewards, log=log)


def policy_of(envs: Any, backbone: HSTU) -> BackbonePolicy:
    return BackbonePolicy(envs.single_observation_space, envs.single_action_space, lambda _: 1e-3, backbone)


def tensors(observations: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in observations.items()}


def nudge(module: torch.nn.Module, seed: int = 0) -> None:
    """Moves a policy away from its reference."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))


# -- the policy class ---------------------------------------------------------------------------------------------


def test_the_policy_is_the_backbone(envs: Any, backbone: HSTU) -> None:
    observations, _ = envs.reset(seed=0)
    policy, seen = policy_of(envs, backbone), tensors(observations)
    expected = backbone_log_probs(backbone, Observations(**observations, n_titles=30))
    with torch.no_grad():
        titles, values, log_probs = policy(seen)
        assert titles.shape == log_probs.shape == (64,)
        assert values.shape == (64, 1)
        np.testing.assert_allclose(log_probs, expected[np.arange(64), titles], atol=1e-5)
        values_again, own, entropy = policy.evaluate_actions(seen, titles)
        torch.testing.assert_close(own, log_probs)
        torch.testing.assert_close(values_again, values)
        torch.testing.assert_close(policy.predict_values(seen), values)
        finite = np.where(np.isfinite(expected), expected, 0.0)
        np.testing.assert_allclose(entropy, -(np.exp(expected) * finite).sum(axis=1), atol=1e-4)
        whole = policy.get_distribution(seen)
        torch.testing.assert_close(whole.log_prob(titles), log_probs)
        best = torch.from_numpy(expected.argmax(axis=1))
        assert torch.equal(policy(seen, deterministic=True)[0], best)
        assert torch.equal(whole.mode(), best)
        chosen = torch.arange(64) % 30
        unseen = np.isfinite(expected[np.arange(64), chosen])
        given = policy.evaluate_actions(seen, chosen[:, None])[1].numpy()
        np.testing.assert_allclose(given[unseen], expected[np.arange(64), chosen][unseen], atol=1e-5)
        assert (np.exp(given[~unseen]) == 0.0).all()


def test_it_copies_the_backbone_and_keeps_dropout_off(envs: Any, backbone: HSTU) -> None:
    policy, observations = policy_of(envs, backbone), tensors(envs.reset(seed=0)[0])
    assert backbone.config.dropout > 0
    policy.set_training_mode(True)
    titles = torch.zeros(64, dtype=torch.int64)
    one, two = (policy.evaluate_actions(observations, titles)[1] for _ in range(2))
    assert torch.equal(one, two)
    before = backbone.titles.detach().clone()
    nudge(policy)
    assert torch.equal(backbone.titles, before)
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_the_critic_starts_the_same_everywhere(envs: Any, backbone: HSTU) -> None:
    """Or the first advantages would hold the noise of its weights."""
    values = policy_of(envs, backbone).predict_values(tensors(envs.reset(seed=0)[0]))
    assert (values == values[0]).all()


def test_seen_titles_are_never_drawn(envs: Any, backbone: HSTU) -> None:
    """Nor by a policy that likes them best: it is asked 200 times for 64 contexts."""
    policy, observations = policy_of(envs, backbone), tensors(envs.reset(seed=0)[0])
    nudge(policy)
    seen = observations["titles"]
    longest = int(observations["length"].max())
    assert longest == 5
    torch.manual_seed(0)
    drawn: set[int] = set()
    with torch.no_grad():
        for _ in range(200):
            titles, _, log_probs = policy(observations)
            assert not (titles[:, None] == seen).any()
            assert log_probs.min() > -100
            drawn |= set(titles.tolist())
    assert len(drawn) > 15


def test_draws_have_the_frequencies_of_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.4, 0.0, 0.35, 0.2, 0.05, 0.0])
    n = 20_000
    torch.manual_seed(0)
    counts = torch.bincount(inverse_cdf(probabilities.log().expand(n, 7)), minlength=7)
    deviation = torch.sqrt(n * probabilities * (1 - probabilities))
    assert (counts[probabilities == 0] == 0).all()
    assert ((counts - n * probabilities).abs() <= 4 * deviation).all()


# -- stable-baselines3 runs on it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [True, False])
def test_stable_baselines3_trains_it(
    log: InteractionLog, rewards: RewardEnsemble, backbone: HSTU, envs: Any, vector: bool
) -> None:
    """On the native vector environment, and on a plain environment as any user would hand it over."""
    env = BatchedVecEnv(envs, seed=0) if vector else gym.make(REWARD_MODEL, rewards=rewards, log=log)
    with contained_randomness():
        learner = StableBaselinesPPO(
            BackbonePolicy,
            env,
            n_steps=2 if vector else 16,
            batch_size=16,
            n_epochs=1,
            gamma=1.0,
            policy_kwargs={"backbone": backbone},
            seed=0,
            device="cpu",
        )
        learner.learn(128 if vector else 32)
        assert learner.num_timesteps == (128 if vector else 32)
        moved: Any = learner.policy.backbone
        assert not torch.equal(moved.titles, backbone.titles)
        observations, _ = envs.reset(seed=3)
        titles, _ = learner.predict(observations)
        assert titles.shape == (64,)
        assert not (titles[:, None] == observations["titles"]).any()


def test_the_vector_environment_speaks_stable_baselines3(envs: Any) -> None:
    env = BatchedVecEnv(envs, seed=4)
    first: Any = env.reset()
    np.testing.assert_array_equal(first["titles"], BatchedVecEnv(envs, seed=4).reset()["titles"])
    unseen = np.array([next(i for i in range(30) if i not in history) for history in first["titles"]])
    following: Any
    following, paid, ended, infos = env.step(unseen)
    assert paid.dtype == np.float32
    assert paid.flags.owndata
    assert paid.flags.writeable
    assert ended.tolist() == [True] * 64
    assert infos == [{}] * 64
    assert not np.array_equal(following["titles"], first["titles"])
    assert env.get_attr("num_envs", [0, 1]) == [64, 64]
    env.set_attr("mark", 3)
    assert env.get_attr("mark", 0) == [3]
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 64
    assert len(env.env_method("action_masks", indices=[5])) == 1
    env.close()


# -- what the learner is paid -------------------------------------------------------------------------------------


class Keep(BaseCallback):
    """Keeps what came before and after the rewards were changed."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch, self.before, self.after = watch, [], []  # type: ignore[var-annotated]
        self.contexts: list[Observations] = []
        self.titles: list[np.ndarray] = []

    def _init_callback(self) -> None:
        self.watch.init_callback(self.model)

    def _on_training_start(self) -> None:
        self.watch.on_training_start(self.locals, self.globals)

    def _on_rollout_start(self) -> None:
        self.watch.on_rollout_start()

    def _on_step(self) -> bool:
        self.before.append(self.locals["rewards"].copy())
        shown: Any = self.model._last_obs
        self.contexts.append(Observations(**{name: part.copy() for name, part in shown.items()}, n_titles=30))
        self.titles.append(self.locals["actions"].copy())
        self.watch.update_locals(self.locals)
        self.watch.on_step()
        self.after.append(self.locals["rewards"].copy())
        return True


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_rewards_in_the_buffer_are_the_models_less_the_log_ratio(
    log: InteractionLog, rewards: RewardEnsemble, backbone: HSTU, kl_weight: float
) -> None:
    """r̂(x,a) − λ·log(π(a|x)/π_ref(a|x)), for a policy that has left π_ref."""
    agent = PPO(kl_weight=kl_weight, n_envs=64, rollout=128, minibatch=64, training=TrainingConfig(steps=8))
    with contained_randomness():
        learner = agent._learner(log, backbone, rewards, seed=0)
        policy: Any = learner.policy.backbone
        nudge(policy)
        drawn_by = HSTU(backbone.config, 30).eval()
        drawn_by.load_state_dict(policy.state_dict())
        keep = Keep(_Watch(agent.config, backbone, Checks(agent.config, lambda _: 0.0, None)))
        learner.learn(128, callback=keep)
    ratios = []
    for step in range(2):
        context, titles = keep.contexts[step], keep.titles[step]
        every = np.arange(64)
        expected = rewards.mean(context)[every, titles]
        np.testing.assert_allclose(keep.before[step], expected, atol=1e-4)
        own = backbone_log_probs(drawn_by, context)[every, titles]
        ref = backbone_log_probs(backbone, context)[every, titles]
        ratios.append(own - ref)
        np.testing.assert_allclose(keep.after[step], expected - kl_weight * (own - ref), atol=2e-4)
        np.testing.assert_array_equal(learner.rollout_buffer.rewards[step], keep.after[step])
    assert np.abs(np.concatenate(ratios)).mean() > 0.05


def test_at_the_reference_there_is_no_log_ratio_where_titles_are_not_out_either() -> None:
    """Both masks are the same, or rewards would lose λ·log of the share that titles to come have."""
    world = World(WorldConfig(n_titles=30, history_length=6, n_epochs=3, cold_share=0.4))
    log, few = world.generate_log(60), TrainingConfig(steps=1, checks=1)
    backbone: Any = pretrain(log, HSTUConfig(dimensions=8, n_layers=1), few)
    rewards = fit_reward_ensemble(log, backbone, RewardEnsembleConfig(members=2, training=few))
    agent = PPO(kl_weight=0.7, n_envs=64, rollout=128, minibatch=64, training=TrainingConfig(steps=8))
    with contained_randomness():
        learner = agent._learner(log, backbone, rewards, seed=0)
        keep = Keep(_Watch(agent.config, backbone, Checks(agent.config, lambda _: 0.0, None)))
        learner.learn(128, callback=keep)
    assert any((context.epoch == 0).any() for context in keep.contexts)
    np.testing.assert_allclose(keep.after, keep.before, atol=1e-4)


# -- fitting ------------------------------------------------------------------------------------------------------


def test_fitting_climbs_the_penalised_reward(
    make: Make, log: InteractionLog, rewards: RewardEnsemble, backbone: HSTU
) -> None:
    """On validation users, whose objective it reports with the sign of a loss; and it keeps the best state."""
    told: list[tuple[int, float]] = []
    steps = TrainingConfig(steps=96, checks=3)
    agent: Any = make("PPO", training=steps).fit(log, backbone, rewards, after_check=lambda *check: told.append(check))
    assert [step for step, _ in told] == [0, 32, 64, 96]
    held_out = split_logs(log, None)[1]
    histories, table = Histories(held_out), rewards.on(held_out)
    start = penalised_reward(backbone, backbone, histories, table, 0.1)
    end = penalised_reward(agent.policy, backbone, histories, table, 0.1)
    assert told[0][1] == pytest.approx(-start, abs=1e-5)
    assert min(value for _, value in told) == pytest.approx(-end, abs=1e-5)
    assert end > start + 0.5
    assert agent.record.samples == 3 * 2_048


def test_every_rollout_teaches(make: Make, log: InteractionLog, rewards: RewardEnsemble, backbone: HSTU) -> None:
    """The last one too: stable-baselines3 says that nothing is left of the run before it learns from it."""
    told: list[float] = []
    for rollouts in (1, 2):
        steps = TrainingConfig(steps=32 * rollouts, checks=rollouts)
        make("PPO", training=steps).fit(log, backbone, rewards, after_check=lambda _, value: told.append(value))
    assert len(set(told[:2])) == 2
    assert len(set(told[2:])) == 3
    config = PPOConfig(learning_rate=0.1, training=TrainingConfig(steps=128))
    np.testing.assert_allclose([config.rate(left) for left in (0.75, 0.5, 0.25, 0.0)], [0.1, 0.075, 0.05, 0.025])
    assert config.rate(1.0) == 0.1


@pytest.mark.parametrize(("steps", "rollouts"), [(1, 1), (32, 1), (47, 1), (49, 2), (320, 10), (1_000, 31)])
def test_rollouts_come_as_near_to_the_steps_as_they_can(steps: int, rollouts: int) -> None:
    """Four passes over 2,048 samples at 256 are 32 gradient steps a rollout."""
    config = PPOConfig(training=TrainingConfig(steps=steps))
    assert config.steps_per_rollout == 32
    assert config.rollouts == rollouts
    assert abs(config.rollouts * 32 - steps) <= max(16, 32 - steps)


def test_an_objective_that_is_nan_is_a_named_error(
    make: Make, log: InteractionLog, rewards: RewardEnsemble, backbone: HSTU, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsim_gr.agents.ppo.penalised_reward", lambda *_: float("nan"))
    before = torch.get_rng_state()
    with pytest.raises(TrainingError, match=r"PPO diverged.*after 0 steps"):
        make("PPO").fit(log, backbone, rewards)
    assert torch.equal(torch.get_rng_state(), before)


def test_its_options_reach_stable_baselines3(
    log: InteractionLog, rewards: RewardEnsemble, backbone: HSTU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other values than stable-baselines3's defaults; the rate is that of each rollout, four of them."""
    found: list[tuple[Any, ...]] = []
    learn = StableBaselinesPPO.train

    def noting(self: Any) -> None:
        learn(self)
        rate = self.policy.optimizer.param_groups[0]["lr"]
        found.append((rate, self.clip_range(1), self.n_epochs, self.batch_size, self.n_steps, self.gae_lambda))

    monkeypatch.setattr(StableBaselinesPPO, "train", noting)
    options: dict[str, Any] = {"n_envs": 16, "rollout": 32, "minibatch": 8, "epochs": 2, "clip_range": 0.3}
    PPO(training=TrainingConfig(steps=32), learning_rate=0.04, **options).fit(log, backbone, rewards)
    assert [others for _, *others in found] == [[0.3, 2, 8, 2, 1.0]] * 4
    np.testing.assert_allclose([rate for rate, *_ in found], [0.04, 0.03, 0.02, 0.01])


@pytest.mark.parametrize("fast", [False, True])
def test_the_state_that_is_kept_is_the_best_and_not_the_last(
    fast: bool, log: InteractionLog, rewards: RewardEnsemble, backbone: HSTU, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood: list[dict[str, Tensor]] = []

    def height(policy: HSTU, *_: Any) -> float:
        stood.append({name: value.clone() for name, value in policy.state_dict().items()})
        return [0.0, 2.0, 1.0][len(stood) - 1]

    monkeypatch.setattr("recsim_gr.agents.ppo.penalised_reward", height)
    agent = PPO(fast=fast, n_envs=16, rollout=32, minibatch=8, training=TrainingConfig(steps=32, checks=2))
    agent.fit(log, backbone, rewards)
    assert agent.record.best_step == 16
    titles = agent.policy.state_dict()["titles"]
    assert torch.equal(titles, stood[1]["titles"])
    assert not torch.equal(titles, stood[2]["titles"])


def test_what_its_loop_would_ignore_is_refused() -> None:
    for options in ({"precision": "bfloat16"}, {"compile": True}, {"patience": 1}):
        with pytest.raises(ConfigError, match=r"PPOConfig\.training must be of float32, without"):
            PPO(training=TrainingConfig(**options))
    with pytest.raises(ConfigError, match=r"PPOConfig\.minibatch must be at least 2"):
        PPO(minibatch=1)


# -- randomness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_global_generators_are_put_back(fails: bool) -> None:
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def use() -> None:
        with contained_randomness():
            random.seed(9)
            random.random()
            np.random.rand(3)  # noqa: NPY002
            torch.rand(3)
            if fails:
                raise RuntimeError("on purpose")

    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            use()
    else:
        use()
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(), before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
