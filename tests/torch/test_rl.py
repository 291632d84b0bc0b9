"""Meta-reinforcement learning: its parts against oracles, its training, its command line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modicum.errors import InvalidInput, ToolMissing, UsageError
from modicum.meta import ANIL, MAML, PMeta, load_learner
from modicum.meta.inner import own_params
from modicum.meta.rl import (
    RL,
    TRPO,
    HalfCheetahDirection,
    HalfCheetahVelocity,
    Navigation2D,
    inner,
    metatrain_rl,
    step_costs,
    train,
    trpo,
)
from modicum.meta.rl.advantages import RIDGE, advantages, discounted, features, fitted, gae
from modicum.meta.rl.gaussian import Gaussian
from modicum.meta.rl.rollout import Batch, sample
from modicum.models import GaussianPolicy, Mlp
from modicum.report.returns import Returns

SHORT = RL(
    rule=MAML(steps=1, rate=0.1), iterations=3, tasks=3, episodes=4, test=4, updates=2,
    outer=TRPO(conjugate=3),
)  # fmt: skip
SMALL = Navigation2D(horizon=12)


def policy(
    seed: int = 0, hidden: tuple[int, ...] = (8, 8), observations: int = 2, actions: int = 2
):
    torch.manual_seed(seed)
    return GaussianPolicy(observations, actions, hidden)


def doubles(seed: int = 0, hidden: tuple[int, ...] = (4,)) -> GaussianPolicy:
    return policy(seed, hidden).double()


def batch(tasks: int | None, n: int, seed: int, net: nn.Module) -> Batch:
    """Steps that a policy with the net's own parameters has taken, with any advantages."""
    g = torch.Generator().manual_seed(seed)
    lead = (n,) if tasks is None else (tasks, n)
    x = torch.randn(*lead, 2, generator=g, dtype=torch.float64)
    now = Gaussian(net(x).detach(), net.log_std.detach())
    acted = now.mean + now.log_std.exp() * torch.randn(*lead, 2, generator=g, dtype=torch.float64)
    worth = torch.randn(*lead, generator=g, dtype=torch.float64)
    return Batch(x, acted, worth, now.log_prob(acted))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- environments --------------------------------------------------------------------------------


def test_navigation_goes_by_clipped_actions_and_pays_the_squared_distance():
    env = Navigation2D(horizon=3)
    goals = np.array([[0.3, -0.4], [0.0, 0.5]])
    assert (env.start(goals, np.random.default_rng(0)) == 0).all()
    at, reward = env.step(np.array([[1.0, -0.05], [-0.2, 0.1]]))
    np.testing.assert_allclose(at, [[0.1, -0.05], [-0.1, 0.1]])
    np.testing.assert_allclose(reward, [-(0.2**2 + 0.35**2), -(0.1**2 + 0.4**2)])
    at, _ = env.step(np.array([[0.05, 0.0], [0.0, 0.0]]))
    np.testing.assert_allclose(at, [[0.15, -0.05], [-0.1, 0.1]])


def test_goals_are_uniform_and_nobody_beats_who_knows_the_goal():
    env = Navigation2D(horizon=20)
    goals = env.draw(4000, np.random.default_rng(0))
    assert abs(goals).max() <= 0.5 and abs(goals.mean(0)).max() < 0.02
    np.testing.assert_allclose(goals.var(0), 1 / 12, rtol=0.05)
    best = env.best_returns(goals[:50])
    assert (best > -20 * (goals[:50] ** 2).sum(1)).all()  # who stays at the origin
    env.start(goals[:50], np.random.default_rng(0))
    rng = np.random.default_rng(1)
    wild = np.sum([env.step(rng.uniform(-0.1, 0.1, (50, 2)))[1] for _ in range(20)], axis=0)
    assert (best > wild).all()


def test_half_cheetah_is_gymnasiums_with_the_rewards_of_the_task(tmp_path, monkeypatch):
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes what it warns of
    rng = np.random.default_rng(0)
    acted = rng.uniform(-1.5, 1.5, (8, 3, 6))
    HalfCheetahDirection(1).start(np.ones((1, 1)), rng)
    assert list(tmp_path.iterdir()) == []  # no warnings when it is ours
    own = gymnasium.make("HalfCheetah-v5").unwrapped
    seeds = np.random.default_rng(5).integers(0, 1 << 31, 3)
    for env, worth in (
        (HalfCheetahDirection(8), lambda v, goal: goal * v),
        (HalfCheetahVelocity(8), lambda v, goal: -abs(v - goal)),
    ):
        tasks = env.draw(3, rng)
        seen = [env.start(tasks, np.random.default_rng(5))]
        rewards = []
        for actions in acted:
            now, reward = env.step(actions)
            seen.append(now)
            rewards.append(reward)
        for i in (0, 2):
            first, _ = own.reset(seed=int(seeds[i]))
            np.testing.assert_array_equal(seen[0][i], first)
            for k, actions in enumerate(acted):
                a = actions[i].clip(-1, 1)
                at, _, _, _, info = own.step(a)
                np.testing.assert_array_equal(seen[k + 1][i], at)
                wanted = worth(info["x_velocity"], tasks[i, 0]) - 0.05 * (a**2).sum()
                assert rewards[k][i] == pytest.approx(wanted, abs=1e-12)


def test_directions_come_in_equal_numbers():
    tasks = HalfCheetahDirection().draw(10, np.random.default_rng(0))
    assert sorted(tasks[:, 0]) == [-1] * 5 + [1] * 5


def test_a_missing_gymnasium_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ToolMissing, match="needs gymnasium") as told:
        HalfCheetahDirection(3).start(np.ones((1, 1)), np.random.default_rng(0))
    assert "modicum[rl]" in str(told.value)


# ---- advantages ----------------------------------------------------------------------------------


@given(st.integers(1, 7), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_is_the_sum_that_its_equation_says(horizon, discount, decay, seed):
    rng = np.random.default_rng(seed)
    r, v = rng.normal(size=(2, 3, horizon))
    after = np.concatenate([v[:, 1:], np.zeros((3, 1))], 1)
    deltas = r + discount * after - v
    wanted = np.zeros_like(r)
    for t in range(horizon):
        for k in range(t, horizon):
            wanted[:, t] += (discount * decay) ** (k - t) * deltas[:, k]
    got = gae(torch.from_numpy(r), torch.from_numpy(v), discount, decay)
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-12)


def test_the_baseline_is_the_ridge_fit_of_each_task():
    g = torch.Generator().manual_seed(0)
    seen = 12 * torch.randn(2, 5, 9, 3, generator=g)
    x = features(seen).flatten(1, 2)
    assert x.shape == (2, 45, 10)
    o = seen[1, 4, 7].double().clamp(-10, 10)
    t = 0.07
    row = torch.cat([o, o**2, torch.tensor([t, t**2, t**3, 1.0], dtype=torch.float64)])
    torch.testing.assert_close(x[1, 4 * 9 + 7], row)
    y = torch.randn(2, 45, generator=g, dtype=torch.float64)
    for k, got in enumerate(fitted(x, y)):
        wide = torch.cat([x[k], RIDGE**0.5 * torch.eye(10, dtype=torch.float64)])
        target = torch.cat([y[k], torch.zeros(10, dtype=torch.float64)])
        w = torch.linalg.lstsq(wide, target).solution
        torch.testing.assert_close(got, x[k] @ w, rtol=1e-6, atol=1e-6)


def test_advantages_of_each_task_have_mean_0_and_deviation_1():
    g = torch.Generator().manual_seed(0)
    seen, rewards = torch.randn(3, 4, 6, 2, generator=g), torch.randn(3, 4, 6, generator=g)
    rewards[1] = 100 * rewards[1] + 7
    made = advantages(seen, rewards, 0.9, 1.0)
    torch.testing.assert_close(made.mean((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std((1, 2)), torch.ones(3), atol=1e-4, rtol=0)
    # lambda 1: what is left of the returns
    returns = discounted(rewards.double(), 0.9)
    left = returns - fitted(features(seen).flatten(1, 2), returns.flatten(1)).view_as(returns)
    left = (left - left.mean((1, 2), keepdim=True)) / left.std((1, 2), keepdim=True)
    torch.testing.assert_close(made, left.float(), atol=1e-5, rtol=1e-5)


# ---- inner step ----------------------------------------------------------------------------------


def test_an_inner_step_is_reinforce():
    net = doubles()
    learner = MAML(steps=1, rate=0.3).learner(net).train()
    b = batch(None, 6, 1, net)
    moved = inner.step(learner, own_params(learner.net), b, 0)
    dist = torch.distributions.Normal(net(b.observations), net.std())
    loss = -(dist.log_prob(b.actions).sum(-1) * b.advantages).mean()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for (name, w), g in zip(net.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(moved[name], w - 0.3 * g)


@pytest.mark.parametrize(
    "rule", [MAML(steps=2, rate=0.2), PMeta(steps=2, rate=0.2, rho=0.6), ANIL(steps=2, rate=0.2)]
)
def test_the_outer_gradient_through_inner_steps_is_that_of_finite_differences(rule):
    net = doubles()
    learner = rule.learner(net).double().train()
    batches, query = [batch(2, 6, k, net) for k in (1, 2)], batch(2, 6, 3, net)

    def value() -> torch.Tensor:
        return inner.surrogate(inner.adapted(learner, batches, query.observations), query)

    parameters = list(learner.parameters())
    got = trpo.flat_gradient(value(), parameters)
    start = trpo.flat([p.detach() for p in parameters])
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        v = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                trpo.put(parameters, start + sign * 1e-6 * v)
                ends.append(float(value()))
        assert float(got @ v) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)
    assert got.abs().max() > 0.01


def test_tasks_at_once_are_adapted_as_each_alone():
    net = doubles()
    learner = PMeta(steps=1, rho=0.6).learner(net).double().eval()
    b = batch(3, 6, 1, net)
    together = inner.steps(learner, inner.start(learner, 3), b, 0)
    for t in range(3):
        alone = inner.step(learner, own_params(learner.net), Batch(*(x[t] for x in b)), 0)
        for name, w in alone.items():
            torch.testing.assert_close(together[name][t], w)


def test_episodes_are_those_of_the_policy_of_each_task():
    env, net = Navigation2D(horizon=5), policy()
    params = {n: torch.stack([w.detach(), 2 * w.detach()]) for n, w in own_params(net).items()}
    tasks = env.draw(2, np.random.default_rng(0))
    made, got = sample(env, net, params, tasks, 3, 0.9, 1.0, np.random.default_rng(1))
    assert made.observations.shape == (2, 15, 2) and got.shape == (2, 3)
    net.load_state_dict({n: w[1] for n, w in params.items()})
    dist = torch.distributions.Normal(net(made.observations[1]), net.std())
    torch.testing.assert_close(made.log_probs[1], dist.log_prob(made.actions[1]).sum(-1))
    x, a = made.observations[1, 5:10].double(), made.actions[1, 5:10].double()  # second episode
    torch.testing.assert_close(x[1:], x[:-1] + a[:-1].clamp(-0.1, 0.1), atol=1e-6, rtol=0)
    again, _ = sample(env, policy(), params, tasks, 3, 0.9, 1.0, np.random.default_rng(1))
    assert all(torch.equal(p, q) for p, q in zip(made, again, strict=True))


# ---- TRPO ----------------------------------------------------------------------------------------


def kl_now(net: GaussianPolicy, x: torch.Tensor):
    def now() -> Gaussian:
        return Gaussian(net(x), net.log_std.expand(len(x), -1))

    return now


def test_the_divergence_of_gaussians_is_torchs():
    g = torch.Generator().manual_seed(0)
    p, q = (Gaussian(*torch.randn(2, 5, 3, generator=g)) for _ in range(2))
    a, b = (torch.distributions.Normal(d.mean, d.log_std.exp()) for d in (p, q))
    wanted = torch.distributions.kl_divergence(a, b).sum(-1)
    torch.testing.assert_close(p.kl_to(q), wanted)
    torch.testing.assert_close(p.log_prob(q.mean), a.log_prob(q.mean).sum(-1))


@pytest.mark.parametrize("through", [False, True])
def test_the_natural_gradient_is_that_of_the_dense_fisher_matrix(through):
    """F is the Hessian of the mean divergence from the policy as it was, inner step included."""
    net = doubles(hidden=(3,))
    learner = MAML(steps=1, rate=0.2).learner(net).train()
    parameters, b, query = list(learner.parameters()), batch(2, 5, 1, net), batch(2, 7, 2, net)
    support = [b] if through else []
    now = inner.adapted(learner, support, query.observations)
    old = now.snapshot()
    divergence = old.kl_to(now).mean()
    first = trpo.flat_gradient(divergence, parameters, create_graph=True)
    dense = torch.stack([trpo.flat_gradient(g, parameters) for g in first])
    product = trpo.fisher_product(now, parameters, damping=0.01)
    made = torch.stack([product(v) for v in torch.eye(len(dense), dtype=torch.float64)])
    dense = dense + 0.01 * torch.eye(len(dense), dtype=torch.float64)
    torch.testing.assert_close(made, dense, atol=1e-9, rtol=1e-6)
    gradient = trpo.flat_gradient(inner.surrogate(now, query), parameters)
    direction = trpo.conjugate_gradient(product, gradient, steps=4 * len(dense))
    wanted = torch.linalg.solve(dense, gradient)
    torch.testing.assert_close(direction, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_an_update_lowers_the_loss_and_keeps_the_limit_of_the_divergence(seed):
    net = doubles(seed)
    b, limit = batch(None, 40, seed, net), 0.05
    now = kl_now(net, b.observations)
    old = now().snapshot()
    moved = trpo.update(
        list(net.parameters()), now, lambda p: inner.surrogate(p, b), TRPO(kl=limit)
    )
    kl = float(old.kl_to(now().snapshot()).mean())
    before = float(inner.surrogate(old, b))
    assert moved.kl == kl and 0.2 * limit < kl <= limit
    assert float(inner.surrogate(now().snapshot(), b)) - before == moved.change < 0


def test_the_line_search_goes_back_where_the_quadratic_model_is_wrong():
    net = doubles()
    b = batch(None, 40, 0, net)
    now, parameters = kl_now(net, b.observations), list(net.parameters())
    old, before = now().snapshot(), float(inner.surrogate(now().snapshot(), b))
    start = trpo.flat([p.detach() for p in parameters])
    gradient = trpo.flat_gradient(inner.surrogate(now(), b), parameters)

    def go(length: float, tries: int) -> trpo.Moved:
        trpo_config = TRPO(kl=0.01, backtracks=tries)
        found = trpo.search(parameters, length * gradient, now, lambda p: inner.surrogate(p, b),
                            old, before, trpo_config)  # fmt: skip
        return found

    far = go(1e3, 3)
    assert far.share == 0 and torch.equal(trpo.flat(parameters), start)
    near = go(1e3, 80)
    assert 0 < near.share < 0.1 and near.kl <= 0.01
    with torch.no_grad():
        trpo.put(parameters, start)
    assert go(float("nan"), 3).share == 0 and torch.equal(trpo.flat(parameters), start)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [MAML(steps=1), PMeta(steps=1, share=0.6)])
def test_a_policy_learns_to_adapt(tmp_path, rule):
    config = RL(rule=rule, iterations=16, tasks=8, episodes=8, test=10, updates=1,
                outer=TRPO(kl=0.04, conjugate=6, damping=1e-3))  # fmt: skip
    net = policy(hidden=(32, 32))
    made = metatrain_rl(net, Navigation2D(30), config, out=tmp_path)
    first, last = made.log[0].returns, np.mean([e.returns for e in made.log[-4:]], axis=0)
    assert last[1] > 0.6 * first[1] and last[1] > 0.75 * last[0]  # returns are negative
    assert all(e.kl <= 0.04 for e in made.log)
    assert made.gains[0].mean > 0


def test_what_it_writes_can_be_read_again(tmp_path):
    net, rule = policy(), PMeta(steps=1, share=0.7)
    config = SHORT.model_copy(update={"rule": rule})
    made = metatrain_rl(net, SMALL, config, out=tmp_path)
    assert same(torch.load(tmp_path / "weights.pt", weights_only=True), net.state_dict())
    again, learner = load_learner(policy(1), tmp_path / "learner.pt")
    assert again == rule
    costs = step_costs(learner, SMALL, config)
    assert costs == made.costs
    assert Returns.load(tmp_path / "returns.json") == made
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert tuple(lines[2]["returns"]) == made.log[2].returns
    assert "4 other tasks, 4 episodes of 12 steps" in (tmp_path / "returns.txt").read_text()
    assert "after inner step 1" in (tmp_path / "returns.svg").read_text()
    assert (tmp_path / "returns.png").stat().st_size > 5000


def test_the_same_seed_makes_the_same_policy_and_another_another(tmp_path):
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        net = policy()
        config = SHORT.model_copy(update={"seed": seed})
        trace = metatrain_rl(net, SMALL, config, out=tmp_path / name)
        made.append((net.state_dict(), trace.test))
    assert same(made[0][0], made[1][0]) and made[0][1] == made[1][1]
    assert not same(made[0][0], made[2][0])


@pytest.mark.parametrize("rule", [MAML(steps=2), PMeta(steps=1, share=0.6, prune_from=0.3)])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, rule):
    config = SHORT.model_copy(update={"rule": rule, "iterations": 4})
    whole = policy()
    wanted = metatrain_rl(whole, SMALL, config, out=tmp_path / "whole")
    iteration = train._Run.iteration

    def stopped(run, number):
        if number == 2:
            raise KeyboardInterrupt
        return iteration(run, number)

    monkeypatch.setattr(train._Run, "iteration", stopped)
    with pytest.raises(KeyboardInterrupt):
        metatrain_rl(policy(), SMALL, config, out=tmp_path / "parts")
    monkeypatch.undo()
    net = policy()
    made = metatrain_rl(net, SMALL, config, out=tmp_path / "parts")
    assert same(net.state_dict(), whole.state_dict()) and made.test == wanted.test
    assert [e.returns for e in made.log] == [e.returns for e in wanted.log]
    learned = [torch.load(tmp_path / n / "learner.pt")["learner"] for n in ("whole", "parts")]
    assert same(*learned)


def test_a_checkpoint_of_another_training_or_a_broken_one_is_refused(tmp_path):
    metatrain_rl(policy(), SMALL, SHORT, out=tmp_path)
    for args in (
        (policy(1), SMALL, SHORT),
        (policy(), Navigation2D(13), SHORT),
        (policy(), SMALL, SHORT.model_copy(update={"discount": 0.5})),
    ):
        with pytest.raises(InvalidInput, match="of another training"):
            metatrain_rl(*args, out=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(InvalidInput, match="cannot read"):
        metatrain_rl(policy(), SMALL, SHORT, out=tmp_path)


def test_a_net_that_does_not_go_with_the_environment_is_refused(tmp_path):
    with pytest.raises(UsageError, match="takes 3 observations and makes 2 actions"):
        metatrain_rl(policy(observations=3), SMALL, SHORT, out=tmp_path)
    with pytest.raises(UsageError, match="no policy"):
        metatrain_rl(Mlp(), SMALL, SHORT, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_return_that_is_not_finite_ends_it(tmp_path):
    config = SHORT.model_copy(update={"rule": MAML(steps=1, rate=1e38)})
    with pytest.raises(InvalidInput, match="not finite after 1 inner steps"):
        metatrain_rl(policy(), SMALL, config, out=tmp_path)


def test_p_meta_keeps_its_limit_and_its_step_takes_less_than_that_of_maml(tmp_path):
    net = policy(hidden=(32, 32))
    (whole,) = step_costs(MAML(steps=1).learner(net), SMALL, SHORT)
    assert whole.layers == ("layers.0", "layers.2", "layers.4")
    rule = PMeta(steps=1, rho=0.3, ram=whole.memory // 2)
    made = metatrain_rl(net, SMALL, SHORT.model_copy(update={"rule": rule}), out=tmp_path)
    (cost,) = made.costs
    assert made.whole == whole
    assert 0 < cost.memory <= whole.memory // 2 and cost.macs < whole.macs
    assert set(cost.layers) < set(whole.layers)
    (head,) = step_costs(ANIL(steps=1).learner(net), SMALL, SHORT)
    assert head.layers == ("layers.4",)


# ---- command line --------------------------------------------------------------------------------


def test_metatrain_rl_on_the_command_line(modicum, tmp_path):
    words = ["metatrain-rl", "navigation", "--out", tmp_path / "out", "--horizon", 10, "--hidden",
             "6,6", "--iterations", 2, "--tasks", 3, "--episodes", 3, "--test", 3, "--updates", 1,
             "--rule", "p-meta:steps=1,share=0.7", "--outer", "kl=0.02"]  # fmt: skip
    first = modicum(*words)
    assert first.code == 0, first.err
    assert "iteration 2/2: return" in first.err
    assert "before adaptation" in first.out and "returns.svg" in first.out
    again = modicum(*words, "--json")
    data = json.loads(again.out)
    assert "goes on after iteration 2" in again.err
    assert data["rule"] == "p-meta" and len(data["means"]) == 2
    assert data["weights"] == str(tmp_path / "out" / "weights.pt")
    more = modicum("metatrain-rl", "navigation", "--out", tmp_path / "more", "--horizon", 10,
                   "--hidden", "6,6", "--iterations", 1, "--tasks", 3, "--episodes", 3, "--test", 0,
                   "--weights", tmp_path / "out" / "weights.pt")  # fmt: skip
    assert more.code == 0, more.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["walker"], "no environment is called 'walker'"),
        (["navigation", "--rule", "protonet"], "does not match any of the expected tags"),
        (["navigation", "--hidden", "8,x"], "no sizes of layers"),
        (["navigation", "--std", "0"], "no deviation"),
        (["navigation", "--outer", "kl=0"], "greater than 0"),
    ],
)
def test_metatrain_rl_refuses_early(modicum, tmp_path, words, told):
    done = modicum("metatrain-rl", *words, "--out", tmp_path / "out")
    assert done.code == 2 and told in done.err
    assert not (tmp_path / "out").exists()
