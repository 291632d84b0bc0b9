"""compare_on_tasks: the same tasks for all, learned once, whatever fails is told."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import modicum as mo
from modicum import task_comparison
from modicum.backward_cost import backward_cost
from modicum.errors import InvalidInput, UsageError
from modicum.heads import with_ways
from modicum.report.tasks import TaskComparison
from modicum.task_comparison import Contender, Domain, compare_on_tasks
from modicum.tasks import FixedEpisodes, Preprocess, arrays, draw_task, load

SHOWN = Preprocess(size=8, mean=(0.5,), std=(0.5,))
RULE = FixedEpisodes(ways=(2, 3), shots=2, queries=3)
QUICK = mo.FineTune(iterations=3)
NONE = Contender()
LAST = Contender(method=mo.Last(), tune=QUICK, rates=(0.01,))
TINY = Contender(
    method=mo.TinyTrain(ram="64KiB", macs_fraction=0.5), tune=QUICK, rates=(0.01,), batch=40
)
CONTENDERS = {"none": NONE, "last": LAST, "tinytrain": TINY}


def images(seed: int = 0, classes: int = 6, each: int = 8):
    """Each class is a noisy picture of its own."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 160, (classes, 8, 8, 1))
    y = np.arange(classes * each) % classes
    noise = rng.integers(0, 96, (len(y), 8, 8, 1))
    return load(((base[y] + noise).astype(np.uint8), y))


def net(seed: int = 0, act: type[nn.Module] = nn.ReLU) -> mo.FewShot:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 8, 3, padding=1), act(), nn.Conv2d(8, 8, 3, padding=1), act(),
              nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))  # fmt: skip
    return mo.few_shot(nn.Sequential(*layers), 2)


DOMAINS = {"signs": Domain(images()), "letters": Domain(images(1))}
OTHERS = {"others": Domain(images(2))}


def compared(out: Path, **more) -> TaskComparison:
    given = {"models": {"plain": net()}, "contenders": CONTENDERS, "domains": DOMAINS,
             "preprocess": SHOWN, "tasks": 2, "rule": RULE, **more}  # fmt: skip
    parts = [given.pop(k) for k in ("models", "contenders", "domains", "preprocess")]
    return compare_on_tasks(*parts, out=out, **given)


@pytest.fixture
def learned(monkeypatch) -> list[dict]:
    """The tasks that are really learned."""
    calls: list[dict] = []
    learn = task_comparison.fine_tune

    def spy(model, plan, support, config, *, seed, queries):
        calls.append({"kind": plan.method.kind, "rate": plan.optimizer.lr, "support": support,
                      "seed": seed, "queries": queries})  # fmt: skip
        return learn(model, plan, support, config, seed=seed, queries=queries)

    monkeypatch.setattr(task_comparison, "fine_tune", spy)
    return calls


def files(out: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(out.glob("tasks/*/*.json"))]


GRAPHS: dict[str, mo.Graph] = {}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without what takes longer than all the rest: pictures, and the same capture again."""

    def captured(model, example):
        key = f"{model} {[tuple(v.shape) for v in (example, *model.state_dict().values())]}"
        if key not in GRAPHS:
            GRAPHS[key] = mo.capture(model, example)
        return GRAPHS[key]

    monkeypatch.setattr(TaskComparison, "picture", lambda *a: None)
    monkeypatch.setattr(task_comparison, "capture", captured)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks")
    return out, compared(out)


# ---- what comes of it ----------------------------------------------------------------------------


def test_a_row_says_how_accurate_a_method_is_and_what_it_costs(done):
    out, made = done
    none, last, tiny = made.rows
    assert made.domains == ("signs", "letters") and made.tasks == 2
    assert [len(a) for a in last.accuracies.values()] == [2, 2]
    assert (none.memory, none.macs, none.saved, none.rate, none.tune) == (0, 0, 0, None, None)
    graph = with_ways(mo.capture(net(), torch.zeros(1, 1, 8, 8)), 3)
    made_plan = mo.plan(graph, None, mo.Last(), mo.Adam(lr=0.01))
    cost = backward_cost(graph, made_plan.selection, mo.Adam())
    assert (last.saved, last.ram) == (made_plan.cost.saved, made_plan.cost.ram)
    assert (last.trained, last.macs, last.memory_one) == (cost.updated, cost.macs, cost.memory)
    assert last.memory == last.memory_one and tiny.batch == 40 and tiny.memory > tiny.memory_one
    assert last.seconds > 0 and tiny.selection > 0 and not tiny.failed
    assert made.accuracy(last).mean > 0.5
    by_file = sorted(f["accuracy"] for f in files(out))
    assert by_file == sorted(a for r in made.rows for each in r.accuracies.values() for a in each)


def test_the_folder_has_the_comparison_as_data_text_and_pictures(done):
    out, made = done
    data = json.loads((out / "tasks.json").read_text())
    means = data.pop("means")
    assert TaskComparison.model_validate(data) == made
    assert means[1]["all"]["mean"] == pytest.approx(made.accuracy(made.rows[1]).mean)
    assert (out / "tasks.txt").read_text() == f"{made}\n"
    assert (out / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert "tinytrain" in (out / "tasks.svg").read_text()


def test_all_methods_learn_the_same_tasks(tmp_path, learned):
    compared(tmp_path, models={"a": net(), "b": net(1)})
    by_kind: dict[str, list[dict]] = {}
    for call in learned:
        by_kind.setdefault(call["kind"], []).append(call)
    (one, *others) = by_kind.values()
    assert len(by_kind) == 2 and len(one) == 8
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a["seed"] == b["seed"]
            for p, q in zip(a["support"], b["support"], strict=True):
                assert np.array_equal(p, q)
    prints = [f["inputs"]["images"] for f in files(tmp_path)]
    assert {prints.count(p) for p in prints} == {6}  # 3 methods, 2 models


def test_only_transductive_learning_sees_the_queries(tmp_path, learned):
    entropy = LAST.model_copy(update={"tune": mo.FineTune(iterations=3, entropy=1.0)})
    compared(tmp_path, contenders={"last": LAST, "transductive": entropy}, tasks=1)
    assert [c["queries"] is None for c in learned] == [True, True, False, False]


# ---- going on ------------------------------------------------------------------------------------


def test_a_linear_head_begins_with_the_prototypes_and_is_trained(tmp_path):
    still = mo.FineTune(iterations=0)
    given = {
        "still": Contender(method=mo.Last(), tune=still, head="linear"),
        "head": LAST.model_copy(update={"head": "linear"}),
        "last": LAST,
    }
    made = compared(tmp_path, contenders=given)
    rows = {row.label: row for row in made.rows}
    first = []
    for domain in DOMAINS.values():
        for i in range(2):
            task = draw_task(domain.dataset, RULE, seed=0, index=i)
            (xs, ys), (xq, yq) = (arrays(part, SHOWN) for part in (task.support, task.query))
            with torch.no_grad():
                near, far = (net().backbone(torch.from_numpy(x)) for x in (xs, xq))
            of_class = [near[torch.from_numpy(ys == k)].mean(0) for k in range(max(ys) + 1)]
            means = torch.stack(of_class)
            first.append(float((torch.cdist(far, means).argmin(1).numpy() == yq).mean()))
    assert [a for each in rows["still"].accuracies.values() for a in each] == pytest.approx(first)
    trained = {run["ways"]: run["layers"] for run in files(tmp_path) if "head" in run["inputs"]}
    assert trained and all(layers == {"head.weight": 32 * ways, "head.bias": ways}
                           for ways, layers in trained.items())  # fmt: skip
    assert rows["head"].trained == 33 * max(trained) != rows["last"].trained
    assert rows["head"].accuracies != rows["still"].accuracies
    assert [rows[label].head for label in given] == ["linear", "linear", "cosine"]
    with pytest.raises(ValidationError, match="needs a method"):
        Contender(head="linear")


def test_a_rerun_learns_nothing_and_finds_the_same(done, learned):
    out, made = done
    assert compared(out) == made
    assert learned == []


def test_after_an_interruption_only_the_rest_is_learned(tmp_path, learned, monkeypatch):
    spied = task_comparison.fine_tune

    def stop(*args, **kwargs):
        if len(learned) == 5:
            raise KeyboardInterrupt
        return spied(*args, **kwargs)

    monkeypatch.setattr(task_comparison, "fine_tune", stop)
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path)
    monkeypatch.setattr(task_comparison, "fine_tune", spied)
    compared(tmp_path)
    assert len(learned) == 8


def test_more_tasks_and_more_methods_learn_only_what_is_new(done, learned):
    out, made = done
    more = {**CONTENDERS, "full": Contender(method=mo.Full(), tune=QUICK)}
    both = compared(out, tasks=3, contenders=more)
    assert [c["kind"] for c in learned] == ["last"] * 2 + ["tinytrain"] * 2 + ["full"] * 6
    assert both.row("plain", "last").accuracies["signs"][:2] == made.rows[1].accuracies["signs"]


def test_another_batch_is_another_memory_of_the_same_tasks(done, learned):
    out, made = done
    many = {"tinytrain": TINY.model_copy(update={"batch": 64})}
    (row,) = compared(out, contenders=many).rows
    assert learned == [] and row.batch == 64
    assert row.memory > made.rows[2].memory and row.memory_one == made.rows[2].memory_one


def _brighter():
    """One pixel of each image."""
    dataset = images()
    x = np.stack([dataset.image(i) for i in range(len(dataset))])
    x[:, 0, 0] ^= 1
    return load((x, dataset.labels))


def _tuned(**fields) -> dict:
    return {"last": LAST.model_copy(update={"tune": QUICK.model_copy(update=fields)})}


CHANGES = {
    "a pixel": {"domains": {"signs": Domain(_brighter())}},
    "weights": {"models": {"plain": net(1)}},
    "an activation": {"models": {"plain": net(0, nn.ReLU6)}},
    "a field of the method": {"contenders": {"last": LAST.model_copy(update={
        "method": mo.Last(n=2)})}},
    "the rate": {"contenders": {"last": LAST.model_copy(update={"rates": (0.02,)})}},
    "the iterations": {"contenders": _tuned(iterations=4)},
    "the prototypes": {"contenders": _tuned(prototypes="fixed")},
    "the optimiser": {"optimizer": mo.SGD()},
    "the preprocessing": {"preprocess": Preprocess(size=8, mean=(0.4,), std=(0.5,))},
    "the shots": {"rule": FixedEpisodes(ways=(2, 3), shots=1, queries=3)},
    "the seed": {"seed": 1},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_matters_is_learned_anew(done, learned, change):
    out, _ = done
    given = {"contenders": {"last": LAST}, "domains": {"signs": DOMAINS["signs"]}, "tasks": 1}
    compared(out, **given)
    assert learned == []
    compared(out, **{**given, **change})
    assert len(learned) == 1


def test_a_damaged_file_is_learned_anew(tmp_path, learned):
    one = {"contenders": {"last": LAST}, "domains": {"signs": DOMAINS["signs"]}, "tasks": 1}
    made = compared(tmp_path, **one)
    (path,) = tmp_path.glob("tasks/signs/*.json")
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "", "{}", whole.replace('"task": 0', '"task": 1')):
        path.write_text(text)
        again = compared(tmp_path, **one)
        assert again.rows[0].accuracies == made.rows[0].accuracies
        assert json.loads(path.read_text())["inputs"]["task"] == 0
    assert len(learned) == 5


def test_two_processes_may_share_a_folder(tmp_path, done):
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=compared, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    _, made = done
    names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert len(names) == 12 + 2 and not [name for name in names if "part" in name]
    result = json.loads((tmp_path / "tasks.json").read_text())
    assert [r["accuracies"] for r in result["rows"]] == [
        {d: list(a) for d, a in row.accuracies.items()} for row in made.rows
    ]
    assert len(files(tmp_path)) == 12


# ---- the rate ------------------------------------------------------------------------------------


def test_each_model_gets_the_rate_that_is_best_on_validation_classes(
    tmp_path, learned, monkeypatch
):
    """The accuracy is made up: 0.1 suits the first model, 0.01 the second."""

    def accuracy(tuned, query):
        suits = 0.1 if float(tuned.head()[1]) == 10.0 else 0.01
        return 0.9 if tuned.plan.optimizer.lr == suits else 0.4

    monkeypatch.setattr(task_comparison, "task_accuracy", accuracy)
    second = net(1)
    second.head.scale.fill_(5.0)
    several = {"last": LAST.model_copy(update={"rates": (0.01, 0.1)})}
    made = compared(tmp_path, models={"a": net(), "b": second}, contenders=several, tasks=1,
                    validation=OTHERS, validation_tasks=3)  # fmt: skip
    assert [row.rate for row in made.rows] == [0.1, 0.01]
    assert made.rows[0].tried == pytest.approx({"0.01": 0.4, "0.1": 0.9})
    assert made.validation == ("others",) and made.validation_tasks == 3
    tried = [c["rate"] for c in learned]
    assert tried == [0.01] * 3 + [0.1] * 3 + [0.1] * 2 + [0.01] * 3 + [0.1] * 3 + [0.01] * 2
    assert len(list(tmp_path.glob("validation/others/*.json"))) == 12


def test_tasks_of_the_validation_domains_come_in_turn(tmp_path, learned):
    several = {"last": LAST.model_copy(update={"rates": (0.01, 0.1)})}
    compared(tmp_path, contenders=several, tasks=1, validation={**OTHERS, **DOMAINS},
             validation_tasks=4)  # fmt: skip
    counts = {d.name: len(list(d.iterdir())) for d in (tmp_path / "validation").iterdir()}
    assert counts == {"others": 4, "signs": 2, "letters": 2}


def test_several_rates_need_something_to_choose_by(tmp_path):
    several = {"last": LAST.model_copy(update={"rates": (0.01, 0.1)})}
    with pytest.raises(UsageError, match="nothing to choose by"):
        compared(tmp_path, contenders=several)
    none = {"none": Contender(rates=(0.01, 0.1))}
    assert compared(tmp_path, contenders=none, tasks=1).rows[0].rate is None


# ---- what does not work --------------------------------------------------------------------------


def test_a_method_that_diverges_counts_as_a_guess_and_is_listed(tmp_path):
    wild = Contender(method=mo.Full(), tune=QUICK, rates=(1e30,))
    late = wild.model_copy(update={"tune": mo.FineTune(iterations=1)})
    made = compared(tmp_path, contenders={"wild": wild, "late": late, "last": LAST})
    wild_row, late_row, last_row = made.rows
    assert set(wild_row.failed) == {"signs 0", "signs 1", "letters 0", "letters 1"}
    assert "the loss is not finite in step 1" in wild_row.failed["signs 0"]
    assert "the outputs are not finite after training" in late_row.failed["letters 1"]
    assert all(a in (1 / 2, 1 / 3) for each in wild_row.accuracies.values() for a in each)
    assert last_row.failed == {} and "wild, letters 1  the loss is not finite" in str(made)


def test_a_task_whose_scores_are_not_finite_counts_as_a_guess(tmp_path):
    broken = net()
    with torch.no_grad():
        for p in broken.parameters():
            p.mul_(1e20)
    given = {"tinytrain": TINY, "none": NONE}
    made = compared(tmp_path, models={"broken": broken}, contenders=given, tasks=1)
    for row, why in zip(made.rows, ("scores are not finite", "outputs are not"), strict=True):
        assert set(row.failed) == {"signs 0", "letters 0"} and why in row.failed["signs 0"]


def test_a_method_that_does_not_apply_is_left_out(tmp_path):
    lean = TINY.model_copy(update={"method": mo.TinyTrain(ram=100)})
    blocks = Contender(method=mo.MobileTL(), tune=QUICK)
    given = {"mobiletl": blocks, "lean": lean, "last": LAST}
    made = compared(tmp_path, contenders=given, tasks=1)
    assert [row.label for row in made.rows] == ["last"]
    assert "0 inverted residual blocks" in made.left_out["plain: mobiletl"]
    assert "of backward memory" in made.left_out["plain: lean"]
    with pytest.raises(UsageError, match="none of the methods could be compared"):
        compared(tmp_path, contenders={"mobiletl": blocks})


def test_a_model_with_another_head_is_refused(tmp_path):
    other = mo.FewShot(net().backbone, nn.Linear(32, 3))
    with pytest.raises(UsageError, match="none of the methods"):
        compared(tmp_path, models={"a": other}, contenders={"last": LAST})


def test_data_that_does_not_do_for_a_task_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="a task of 2 ways needs as many classes"):
        compared(tmp_path, domains={"few": Domain(images(each=3))})
    with pytest.raises(UsageError, match="nothing to compare"):
        compared(tmp_path, contenders={})


def test_models_are_left_alone_and_a_classifier_becomes_a_few_shot_model(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    few = net().train()
    kept = {k: v.clone() for k, v in few.state_dict().items()}
    made = compared(tmp_path, models={"linear": plain, "few": few}, tasks=1,
                    contenders={"none": NONE, "last": LAST})  # fmt: skip
    assert [row.model for row in made.rows] == ["linear"] * 2 + ["few"] * 2
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    assert all(torch.equal(v, kept[k]) for k, v in few.state_dict().items())
    assert all(module.training for module in few.modules())
