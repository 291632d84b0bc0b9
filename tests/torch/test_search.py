"""search: what each choice adds, and the best sum of choices that a limit allows."""

from __future__ import annotations

import itertools
import json
import random
import sys
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import inverted, seq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import modicum as mo
from modicum import cli, task_comparison
from modicum.backward_cost import backward_cost
from modicum.errors import DoesNotFit, InvalidInput, ToolMissing, UsageError
from modicum.methods import Limits
from modicum.methods.layers import layers
from modicum.report.search import Contributions, Scheme, biases_text
from modicum.report.tasks import Estimate
from modicum.search import POPULATION, _Schemes, contribution, find_scheme, search
from modicum.tasks import FixedEpisodes, Preprocess, load

SHOWN = Preprocess(size=8, mean=(0.5,), std=(0.5,))
RULE = FixedEpisodes(ways=3, shots=2, queries=3)
SHARES = (1.0, 0.5, 0.25)
LIMIT = 9 << 10  # a third of the schemes


def net() -> nn.Module:
    torch.manual_seed(0)
    stem = seq(nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    return seq(stem, inverted(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@cache
def known() -> tuple[mo.FewShot, mo.Graph, mo.Observed]:
    model = mo.few_shot(net(), 3).eval()
    graph = mo.capture(model, torch.zeros(1, 1, 8, 8))
    return model, graph, mo.observe(model, graph, mo.SparseUpdate(biases=1))


def made_up(seed: int, every: int = 1) -> Contributions:
    """Gains of all sizes, some of them losses, of the net's four layers."""
    rng, found = random.Random(seed), layers(known()[1])
    n = len(found)

    def gain() -> Estimate:
        return Estimate(mean=rng.gauss(0.02, 0.02), half=0.01)

    return Contributions(
        layers={x.weight: x.shape for x in found},
        domains=("signs",),
        tasks=4,
        rule=RULE,
        tune={"iterations": 1},
        optimizer=mo.Adam(),
        preprocess=SHOWN,
        seed=0,
        base=Estimate(mean=0.5, half=None),
        biases={k: gain() for k in sorted({*range(every, n, every), n})},
        weights={i: {r: gain() for r in SHARES} for i in range(n)},
    )


def memory(method: mo.SparseUpdate) -> int:
    _, graph, seen = known()
    selection = method.select_for(graph, seen, Limits(mo.Adam()))
    return backward_cost(graph, selection, mo.Adam()).memory


def all_schemes(c: Contributions) -> list[tuple[float, int]]:
    """(gain, memory) of every scheme that trains weights of layers whose biases it trains."""
    n, found = len(c.layers), []
    for k in c.biases:
        for shares in itertools.product((0.0, *SHARES), repeat=k):
            chosen = {n - k + j: r for j, r in enumerate(shares) if r}
            weights = {str(i): r for i, r in chosen.items()}
            cost = memory(mo.SparseUpdate(biases=k, weights=weights))
            found.append((c.gain(k, chosen), cost))
    return found


def searched(c: Contributions, limit: int | str, **more) -> Scheme:
    _, graph, seen = known()
    return search(c, graph, limit, samples=seen, **{"generations": 4, **more})


# ---- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_trying_all_schemes_finds(seed):
    c = made_up(seed)
    schemes = all_schemes(c)
    limits = sorted(m for _, m in schemes)
    for limit in (limits[len(limits) // 20], limits[len(limits) // 3], limits[-1]):
        best = max(gain for gain, cost in schemes if cost <= limit)
        assert searched(c, limit, generations=16).gain == pytest.approx(best)


def test_the_scheme_is_the_method_whose_gain_and_cost_it_tells():
    c = made_up(0)
    found = searched(c, LIMIT)
    assert found.cost.memory == memory(found.method) <= found.limit == LIMIT
    assert found.gain == pytest.approx(c.gain(found.method.biases, found.shares))
    assert found.looked <= 4 * POPULATION
    _, graph, seen = known()
    plan = mo.plan(graph, None, found.method, mo.Adam(), samples=seen)
    assert plan.cost.trained_params == found.cost.updated


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0, 1.1),
    st.sampled_from((1, 2, 3)),
    st.sampled_from((mo.Adam(), mo.SGD(), mo.SGD(momentum=0.9))),
)
def test_no_scheme_is_over_the_limit(seed, part, every, optimizer):
    c = made_up(seed, every)
    _, graph, seen = known()

    def cost(method):
        selection = method.select_for(graph, seen, Limits(optimizer))
        return backward_cost(graph, selection, optimizer).memory

    n = len(c.layers)
    low = cost(mo.SparseUpdate(biases=min(c.biases)))
    high = cost(mo.SparseUpdate(biases=n, weights={str(i): 1.0 for i in range(n)}))
    limit = low + round(part * (high - low))
    found = searched(c, limit, optimizer=optimizer, generations=1)
    assert cost(found.method) == found.cost.memory <= limit
    assert found.method.biases in c.biases
    assert all(i >= n - found.method.biases for i in found.shares)


def test_a_weight_that_gains_nothing_is_not_trained():
    c = made_up(0)
    lost = {r: Estimate(mean=-0.01, half=None) for r in SHARES}
    c = c.model_copy(update={"weights": {**c.weights, 1: lost, 3: lost}})
    assert not set(searched(c, "1MiB").shares) & {1, 3}


def test_a_limit_below_the_cheapest_scheme_names_the_smallest_that_works():
    c = made_up(0)
    least = memory(mo.SparseUpdate(biases=1))
    with pytest.raises(DoesNotFit) as refused:
        searched(c, least - 1)
    assert refused.value.details["try"] == [f"--limit {least}"]
    assert searched(c, least).cost.memory <= least


def test_a_linear_head_is_trained_and_counted_with_every_scheme():
    model = net().eval()
    graph = mo.capture(model, torch.zeros(1, 1, 8, 8))
    seen = mo.observe(model, graph, mo.SparseUpdate(biases=1))
    found = search(made_up(0), graph, 2 * LIMIT, samples=seen, generations=1)
    selection = found.method.select_for(graph, seen, Limits(mo.Adam()))
    assert {u.param for u in selection.updates} >= {"4.weight", "4.bias"}
    assert backward_cost(graph, selection, mo.Adam()) == found.cost
    assert found.cost.memory <= 2 * LIMIT


def test_contributions_of_another_network_are_refused():
    c = made_up(0)
    other = {**c.layers, next(iter(c.layers)): (9, 1, 3, 3)}
    with pytest.raises(InvalidInput, match="another network"):
        searched(c.model_copy(update={"layers": other}), "1MiB")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ToolMissing) as refused:
        searched(made_up(0), "1MiB")
    assert refused.value.details["try"] == ['pip install "modicum[search]"']


# ---- going on with a search ----------------------------------------------------------------------


def study(out: Path) -> Path:
    (path,) = (out / "studies").glob("*.json")
    return path


def test_an_interrupted_search_ends_as_one_that_was_not(tmp_path, monkeypatch):
    c = made_up(1)
    whole = searched(c, LIMIT, out=tmp_path / "whole", generations=5)
    asked, gain = itertools.count(), _Schemes.gain

    def interrupted(self, genes):
        if next(asked) == 2 * POPULATION:
            raise KeyboardInterrupt
        return gain(self, genes)

    monkeypatch.setattr(_Schemes, "gain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        searched(c, LIMIT, out=tmp_path / "part", generations=5)
    part = json.loads(study(tmp_path / "part").read_text())
    assert 0 < len(part["gains"]) <= 3 * POPULATION
    assert searched(c, LIMIT, out=tmp_path / "part", generations=5) == whole
    assert study(tmp_path / "part").read_text() == study(tmp_path / "whole").read_text()


def test_a_finished_search_looks_at_nothing_again_and_more_generations_go_on(tmp_path, monkeypatch):
    c = made_up(2)
    first = searched(c, LIMIT, out=tmp_path, generations=2)
    more = searched(c, LIMIT, out=tmp_path, generations=4)
    assert more == searched(c, LIMIT, generations=4)
    looked = []
    monkeypatch.setattr(_Schemes, "gain", lambda self, genes: looked.append(genes) or 0.0)
    assert searched(c, LIMIT, out=tmp_path, generations=4) == more
    assert searched(c, LIMIT, out=tmp_path, generations=2) == first
    assert looked == []


def test_other_seeds_look_at_other_schemes_and_the_same_seed_at_the_same(tmp_path):
    c = made_up(0)
    looked = []
    for i, seed in enumerate((0, 0, 1)):
        searched(c, LIMIT, out=tmp_path / str(i), generations=1, seed=seed)
        looked.append(json.loads(study(tmp_path / str(i)).read_text())["gains"])
    assert looked[0] == looked[1] != looked[2]


@pytest.mark.parametrize("text", ["", "{", '{"inputs": {}, "gains": {"0,0,0,0,0": 1.0}}'])
def test_a_broken_study_file_is_not_gone_on_with(tmp_path, text):
    c = made_up(0)
    found = searched(c, LIMIT, out=tmp_path, generations=1)
    study(tmp_path).write_text(text)
    assert searched(c, LIMIT, out=tmp_path, generations=1) == found


# ---- contribution --------------------------------------------------------------------------------


def domain(seed: int = 0) -> mo.Domain:
    """Five classes, each brighter in rows of its own."""
    rng = np.random.default_rng(seed)
    y = np.arange(40) % 5
    x = rng.integers(0, 150, (len(y), 8, 8, 1))
    for i, label in enumerate(y):
        x[i, label : label + 3] += 100
    return mo.Domain(load((x.astype(np.uint8), y)))


def contributed(out: Path, **more) -> Contributions:
    values = {"tasks": 2, "rule": RULE, "tune": mo.FineTune(iterations=3), "every": 2,
              "shares": (1.0, 0.5), "optimizer": mo.Adam(lr=0.01), **more}  # fmt: skip
    model, domains = values.pop("model", net()), values.pop("domains", {"rows": domain()})
    return contribution(model, domains, SHOWN, out=out, **values)


@pytest.fixture
def learned(monkeypatch) -> list[mo.SparseUpdate]:
    """The methods of the tasks that are really learned."""
    methods: list[mo.SparseUpdate] = []
    fine_tune = task_comparison.fine_tune

    def spy(net, plan, *args, **kwargs):
        methods.append(plan.method)
        return fine_tune(net, plan, *args, **kwargs)

    monkeypatch.setattr(task_comparison, "fine_tune", spy)
    return methods


def runs(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "tasks").rglob("*.json"))]


def test_gains_are_differences_over_the_same_tasks(tmp_path):
    c = contributed(tmp_path)
    assert list(c.biases) == [2, 4]
    assert {i: list(by) for i, by in c.weights.items()} == {
        0: [1.0],  # of one input channel there is no half
        **{i: [1.0, 0.5] for i in (1, 2, 3)},
    }

    def accuracies(biases: int | None, weights: dict[str, float]) -> np.ndarray:
        found = {}
        for run in runs(tmp_path):
            m = run["inputs"]["method"]
            if (m and (m["biases"], m["weights"])) == (biases and (biases, weights)):
                found[run["inputs"]["task"]] = run["accuracy"]
        return np.array([found[0], found[1]])

    none = accuracies(None, {})
    assert c.base.mean == pytest.approx(none.mean())
    assert c.biases[4].mean == pytest.approx((accuracies(4, {}) - none).mean())
    for i, k in ((1, 4), (2, 2)):  # the biases of the last 2 layers reach layer 2
        difference = accuracies(k, {str(i): 0.5}) - accuracies(k, {})
        assert c.weights[i][0.5].mean == pytest.approx(difference.mean())
        assert c.weights[i][0.5].half is not None


def test_a_rerun_learns_nothing_and_an_interrupted_one_the_rest(tmp_path, learned):
    whole = contributed(tmp_path / "whole")
    number = len(learned)
    assert number == 2 * (2 + 7)  # tasks, biases and slices
    learned.clear()
    assert contributed(tmp_path / "whole") == whole
    assert learned == []
    files = sorted((tmp_path / "whole" / "tasks").rglob("*.json"))
    trained = [f for f in files if json.loads(f.read_text())["inputs"]["method"]]
    for file in trained[:5]:
        file.unlink()
    assert contributed(tmp_path / "whole") == whole
    assert len(learned) == 5


def test_blocks_leave_the_first_layers_out(tmp_path):
    c = contributed(tmp_path, blocks=1, tasks=1)
    assert len(c.layers) == 4
    assert list(c.biases) == [2, 3]
    assert list(c.weights) == [1, 2, 3]


def test_layers_without_biases_gain_nothing_from_them(tmp_path, learned):
    bare = seq(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False),
               nn.Flatten(), nn.Linear(64, 5))  # fmt: skip
    c = contributed(tmp_path, model=bare, tasks=1, every=1)
    assert [e.mean for e in c.biases.values()] == [0.0, 0.0]
    assert all(m.weights for m in learned)


@pytest.mark.parametrize(
    "more", [{"tasks": 0}, {"every": 0}, {"blocks": 0}, {"shares": (0.0,)}, {"domains": {}}]
)
def test_what_cannot_be_learned_is_refused(tmp_path, more):
    with pytest.raises(UsageError):
        contributed(tmp_path, **more)


def test_a_model_without_layers_before_its_head_is_refused(tmp_path):
    flat = seq(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        contributed(tmp_path, model=flat)


# ---- both ----------------------------------------------------------------------------------------


def test_what_would_fail_after_hours_fails_before_them(tmp_path, monkeypatch, learned):
    with pytest.raises(DoesNotFit):
        find_scheme(net(), {"rows": domain()}, SHOWN, 100, out=tmp_path, rule=RULE)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ToolMissing):
        find_scheme(net(), {"rows": domain()}, SHOWN, "1MiB", out=tmp_path, rule=RULE)
    assert learned == [] and not runs(tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A net and images, as the command line takes them."""
    root = tmp_path_factory.mktemp("searched")
    data = domain().dataset
    x = np.stack([data.image(i) for i in range(len(data))])
    np.savez(root / "rows.npz", x=x, y=data.labels)
    (root / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Conv2d(4, 8, 3), nn.ReLU6(),\n"
        "                         nn.Flatten(), nn.Linear(128, 5))\n"
    )
    return root


def called(monkeypatch, capsys, files: Path, out: Path, *words: str) -> tuple[int, str]:
    given = ["search", f"{files / 'net.py'}:make", "--input", "1x1x8x8", "--data",
             str(files / "rows.npz"), "--out", str(out), *words]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["modicum", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().out


def test_the_command_line_writes_a_method_that_it_takes(monkeypatch, capsys, files, tmp_path):
    code, text = called(
        *(monkeypatch, capsys, files, tmp_path, "--limit", "4KiB", "--tasks", "2", "--ways", "3"),
        *("--shots", "2", "--queries", "3", "--iterations", "2", "--every", "1"),
        *("--generations", "1", "--json"),
    )
    result = json.loads(text)
    assert code == 0
    assert result["memory"] <= 4096 == result["limit"]
    method = cli.parse_method(str(tmp_path / "sparse_update.json"), [])
    assert method == mo.SparseUpdate.model_validate(result["method"])
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved >= {"search.json", "search.txt", "search.svg", "search.png", "contributions.json"}
    assert ET.parse(tmp_path / "search.svg").getroot().tag.endswith("svg")


def test_a_limit_that_nothing_fits_exits_with_3(monkeypatch, capsys, files, tmp_path):
    code, text = called(monkeypatch, capsys, files, tmp_path, "--limit", "1KiB", "--ways", "3",
                        "--json")  # fmt: skip
    error = json.loads(text)
    assert (code, error["error"]) == (3, "DoesNotFit")
    assert "--limit" in error["try"]


def test_the_text_has_a_line_for_each_layer_and_what_was_chosen():
    found = searched(made_up(0), LIMIT)
    lines = str(found).splitlines()
    assert sum(line.split()[:2] == [str(i), found.contributions.name(i)]
               for i in range(4) for line in lines) == 4  # fmt: skip
    assert biases_text(found.method.biases) in lines
    assert sum(line.startswith("  weight of layer") for line in lines) == len(found.shares)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_the_same_twice_and_other_suffixes_are_refused(tmp_path, suffix):
    found = searched(made_up(0), LIMIT, generations=1)
    for name in "ab":
        found.picture(tmp_path / f"{name}.{suffix}")
    first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
    assert first == second and first
    with pytest.raises(UsageError, match="not written as"):
        found.picture(tmp_path / "a.pdf")
