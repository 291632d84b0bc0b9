"""Meta-training of policies: policy-gradient steps inside, TRPO outside."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import nn

from modicum.errors import InvalidInput
from modicum.graph import Frozen
from modicum.meta.anil import ANIL
from modicum.meta.boil import BOIL
from modicum.meta.files import check_inputs, read_state, weights_hash, write_state
from modicum.meta.learner import GradientLearner
from modicum.meta.maml import MAML
from modicum.meta.memory import StepMemory
from modicum.meta.pmeta import PMeta, PMetaLearner
from modicum.meta.rl import inner, trpo
from modicum.meta.rl.environments import Array, Environment, Rng
from modicum.meta.rl.gaussian import check_policy
from modicum.meta.rl.rollout import Batch, sample
from modicum.meta.rl.trpo import TRPO, Count
from modicum.report.returns import Iteration, Returns, StepCost
from modicum.selection import Slice

PolicyRule = Annotated[MAML | ANIL | BOIL | PMeta, Field(discriminator="kind")]
Share = Annotated[float, Field(ge=0, le=1)]
TEST_SEED = 2_718_281
"""Of tasks and episodes to be judged on: none of those that are trained on."""


class RL(Frozen):
    """How long, on how many episodes, by which rule.

    In each of `iterations` the policy takes the inner steps of `rule` in `tasks` new tasks, from
    `episodes` episodes before each step, and `outer` moves what is learned by the `episodes` after
    the last one.  `discount` and `gae` are gamma and lambda of the advantages.  The weights of the
    end are judged on `test` other tasks, after 0 to `updates` inner steps.  The defaults are those
    of MAML's experiments, but for the discount of returns, 0.99.
    """

    rule: PolicyRule = MAML(steps=1, rate=0.1)
    iterations: Count = 500
    tasks: Count = 20
    episodes: Annotated[int, Field(ge=2)] = 20
    discount: Share = 0.99
    gae: Share = 1.0
    outer: TRPO = TRPO()
    test: Annotated[int, Field(ge=0)] = 40
    updates: Count = 3
    seed: Annotated[int, Field(ge=0)] = 0


def metatrain_rl(
    policy: nn.Module,
    environment: Environment,
    config: RL | None = None,
    *,
    out: str | Path,
    progress: bool = False,
) -> Returns:
    """Meta-train a policy in place, and return how it went.

    `out` gets checkpoint.pt and log.jsonl after each iteration, and at the end weights.pt, the
    state dict of `policy`, learner.pt (`load_learner`), and returns.json, .txt, .svg and .png.
    Called again with the same arguments it goes on from the checkpoint, to the same bits.

    Raises UsageError for a policy that does not go with the environment, and InvalidInput for a
    checkpoint of another training and for returns that are not finite.
    """
    config = config or RL()
    check_policy(policy, environment.observations, environment.actions)
    run = _Run(policy, environment, config, Path(out), progress)
    run.train()
    made = run.judge()
    made.save(Path(out))
    return made


def held_tasks(environment: Environment, config: RL) -> tuple[Array, Rng]:
    """The tasks that the weights of the end are judged on, and what draws their episodes."""
    rng = np.random.default_rng([config.seed, TEST_SEED])
    return environment.draw(config.test, rng), rng


def returns(
    learner: GradientLearner, environment: Environment, config: RL, tasks: Array, rng: Rng,
    updates: int | None = None,
) -> Array:  # fmt: skip
    """The mean return in each of t tasks after 0 .. `updates` inner steps: (t, updates + 1)."""
    updates = config.updates if updates is None else updates
    return np.stack(
        [r for _, r in _adapt(learner.eval(), environment, config, tasks, rng, updates)], 1
    )


def step_costs(
    learner: GradientLearner, environment: Environment, config: RL
) -> tuple[StepCost, ...]:
    """What each inner step takes on the episodes of a task, all of which pass at once.

    The loss's own gradient, by the mean of the policy, is counted as that of a squared error.
    """
    partial = isinstance(learner, PMetaLearner)
    memory = _memory(learner, environment, config, learner.slices() if partial else {})
    still = None if partial else _moved_layers(learner)
    return tuple(_cost(memory, still or learner.active(k)) for k in range(learner.steps))


def _adapt(
    learner: GradientLearner, environment: Environment, config: RL, tasks: Array, rng: Rng,
    updates: int,
) -> list[tuple[Batch, Array]]:  # fmt: skip
    """Episodes, and the mean return in each task, before and after each inner step."""
    params, made = inner.start(learner, len(tasks)), []
    for k in range(updates + 1):
        batch, got = sample(
            environment, learner.net, params, tasks, config.episodes, config.discount, config.gae,
            rng,
        )  # fmt: skip
        if not np.isfinite(got).all():
            raise InvalidInput(
                f"a return is not finite after {k} inner steps", hint="a smaller rate of the rule"
            )
        made.append((batch, got.mean(1)))
        if k < updates:
            params = inner.steps(learner, params, batch, k)
    return made


def _memory(
    learner: GradientLearner, environment: Environment, config: RL, slices: dict[str, Slice]
) -> StepMemory:
    samples = config.episodes * environment.horizon
    return StepMemory(learner.plain[0], (environment.observations,), samples, slices, loss="mse")


def _cost(memory: StepMemory, layers: frozenset[str]) -> StepCost:
    forward, backward = memory.macs(layers)
    return StepCost(layers=tuple(sorted(layers)), memory=memory.peak(layers), forward=forward,
                    backward=backward)  # fmt: skip


def _moved_layers(learner: GradientLearner) -> frozenset[str]:
    moving = learner.rule.moving(learner.net)
    return frozenset(n for n in _linear(learner.net) if f"{n}.weight" in moving)


def _linear(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]


class _Run:
    """One training; used once."""

    def __init__(
        self, policy: nn.Module, environment: Environment, config: RL, folder: Path, progress: bool
    ) -> None:
        self.policy, self.environment, self.config = policy, environment, config
        self.folder, self.progress = folder, progress
        self.device = next(policy.parameters()).device
        inputs = {
            "config": config.model_dump(mode="json"),
            "environment": [environment.name, environment.horizon],
            "weights": weights_hash(policy),
        }
        self.inputs = json.loads(json.dumps(inputs))
        self.learner: GradientLearner = config.rule.learner(policy).to(self.device)
        self.log: list[Iteration] = []

    def train(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        for number in range(len(self.log), self.config.iterations):
            start = time.perf_counter()
            entry = self.iteration(number)
            before = self.log[-1].seconds if self.log else 0.0
            seconds = before + time.perf_counter() - start
            self.log.append(entry.model_copy(update={"seconds": seconds}))
            self.save()
            self.say()
        self.learner.write_to(self.policy)
        write_state(self.folder / "weights.pt", self.policy.state_dict())
        rule = self.config.rule.model_dump(mode="json")
        state = {"rule": rule, "learner": self.learner.state_dict()}
        write_state(self.folder / "learner.pt", state)

    def iteration(self, number: int) -> Iteration:
        """One update of the outer rule; what it draws depends on nothing before it."""
        config, learner = self.config, self.learner
        learner.progress = number / config.iterations
        rng = np.random.default_rng([config.seed, number])
        tasks = self.environment.draw(config.tasks, rng)
        done = _adapt(learner.eval(), self.environment, config, tasks, rng, learner.steps)
        *support, query = [batch for batch, _ in done]
        learner.train()
        moved = trpo.update(
            list(learner.parameters()),
            lambda: inner.adapted(learner, support, query.observations),
            lambda policy: inner.surrogate(policy, query),
            config.outer,
        )
        if isinstance(learner, PMetaLearner):
            learner.progress = (number + 1) / config.iterations
            samples = config.episodes * self.environment.horizon
            learner.keep_limits((self.environment.observations,), samples, "mse")
        means = tuple(float(got.mean()) for _, got in done)
        return Iteration(returns=means, kl=moved.kl, change=moved.change, share=moved.share)

    def judge(self) -> Returns:
        config, environment = self.config, self.environment
        scores: tuple[Any, ...] = ()
        if config.test:
            tasks, rng = held_tasks(environment, config)
            by_step = returns(self.learner, environment, config, tasks, rng).T
            scores = tuple(tuple(got.tolist()) for got in by_step)
        whole = _memory(self.learner, environment, config, {})
        return Returns(
            environment=environment.name, rule=config.rule.kind, horizon=environment.horizon,
            episodes=config.episodes, seed=config.seed, log=tuple(self.log), test=scores,
            costs=step_costs(self.learner, environment, config),
            whole=_cost(whole, frozenset(_linear(self.learner.net))),
        )  # fmt: skip

    # ---- files ----

    def save(self) -> None:
        log = [entry.model_dump(mode="json") for entry in self.log]
        state = {"inputs": self.inputs, "log": log, "learner": self.learner.state_dict()}
        write_state(self.folder / "checkpoint.pt", state)
        lines = [json.dumps({"iteration": i, **entry}) + "\n" for i, entry in enumerate(log)]
        (self.folder / "log.jsonl").write_text("".join(lines))

    def resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        hint = "another --out, or delete it"
        state = read_state(path, self.device, hint)
        try:
            known = dict(state["inputs"])
            log = [Iteration.model_validate(entry) for entry in state["log"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"cannot read {path}", why=repr(error), hint=hint) from None
        check_inputs(path, known, self.inputs)
        self.learner.load_state_dict(state["learner"])
        self.log = log
        if self.progress:
            print(f"goes on after iteration {len(log)} of {path}", file=sys.stderr, flush=True)

    def say(self) -> None:
        if self.progress:
            head = f"iteration {len(self.log)}/{self.config.iterations}"
            print(f"{head}: {self.log[-1]}", file=sys.stderr, flush=True)
