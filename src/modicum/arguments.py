"""What comes from outside, as a person writes it: flags, specs and files into our own objects.

Whatever cannot be read raises UsageError or InvalidInput, with what was found and what is known.
Nothing large is imported before it is needed, so that `modicum --help` is quick.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modicum.errors import InvalidInput, ModicumError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modicum.board import Board
    from modicum.federated.cases import Case
    from modicum.federated.rules import FederatedRule
    from modicum.fewshot import FineTune
    from modicum.graph import Graph
    from modicum.heads import FewShot
    from modicum.meta import MetaTrain, Rule
    from modicum.meta.rl import RL, Environment
    from modicum.methods import Method, Observed
    from modicum.optim import SGD, Adam
    from modicum.plan import Plan
    from modicum.task_comparison import Contender, Domain
    from modicum.tasks import Augment, EpisodeRule, FixedEpisodes, Preprocess

Shape = tuple[int, ...]

PAPERS_BATCH = {"full": 100, "tinytl": 100}
"""Samples at once by which TinyTrain's tables count a method's memory; for others it is 1."""
TASK_METHODS = (
    "none,head,last,bias,tinytl,tinytl:drop=0.25,tinytl:drop=0.5,tinytl:drop=0.75,tinytrain,full,"
    "transductive"
)
"""What is compared on tasks where nothing else is said; drop is AdapterDrop."""
SCHEMES = {
    "mcunet-5fps": "mcunet-99kb",
    "mbv2-w0.35": "mbv2-99kb",
    "proxyless-w0.3": "proxyless-98kb",
}
"""The published schemes of SparseUpdate that are compared too, by the net that they are for."""
HELD_BACK = 0.25
"""Share of the classes that rates are chosen on, where there are no others."""


def load_plan(path: Path) -> Plan:
    """A plan from its file."""
    from modicum.plan import Plan

    return Plan.load(path)


def load_model(
    spec: str,
    weights: Path | None,
    shape: str,
    classes: int | None,
    method: Method,
    ways: int | None = None,
) -> tuple[nn.Module, torch.Tensor]:
    """A network with what a method adds, from a name or path/to/file.py:factory, and its input.

    With `ways` it is a few-shot model.  Initial weights are drawn from seed 0, so that every
    command sees the same network.
    """
    import torch

    from modicum.lite import prepare_model

    example = torch.zeros(parse_shape(shape or default_input(spec)))
    if classes is not None and ":" in spec:
        raise UsageError("--classes goes with the name of a model", why="a factory has its own")
    if classes is not None and ways is not None:
        raise UsageError("--classes and --ways are both the number of outputs", hint="--ways alone")
    torch.manual_seed(0)
    net, said = make_network(
        spec, weights, classes, lambda net: prepare_model(net.eval(), example, method), ways
    )
    if said:
        print(said, file=sys.stderr)
    return net, example


def is_few_shot(graph: Graph) -> bool:
    """Whether a captured model ends with a cosine head."""
    return graph.by_name[graph.output].op == "cosine"


def model_of_plan(made: Plan, spec: str, weights: Path | None) -> nn.Module:
    """The network of a plan: it gets as many outputs or ways, and what the method adds."""
    graph = made.graph
    outputs = graph.values[graph.output].size
    ways = outputs if is_few_shot(graph) else None
    classes = None if ":" in spec or ways else outputs
    shape = shape_text(graph.shape(graph.input))
    return load_model(spec, weights, shape, classes, made.method, ways)[0]


def make_network(
    spec: str,
    weights: Path | None,
    classes: int | None,
    prepare: Callable[[nn.Module], nn.Module] = lambda net: net,
    ways: int | None = None,
) -> tuple[nn.Module, str]:
    """A network as `prepare` makes it, and what its weights left as initialised.

    With `ways` its last linear layer is replaced by a cosine head for so many classes.  Weights
    may be those of the network or of a few-shot model that was made of it: of the latter a plain
    network takes the backbone, and prototypes of another number of classes are left out.

    Weights of lite modules that the network has not, which `adapt --save` writes, are loaded when
    `prepare` has put those in; all others before.  It leaves alone what it has prepared.
    """
    from modicum.methods.tinytl import in_lite
    from modicum.models import MODELS, load_weights, read_weights

    file, colon, factory = spec.rpartition(":")
    if colon:
        net = _factory(Path(file), factory)
    else:
        _named(spec)
        net = MODELS[spec].make(classes or MODELS[spec].classes)
    if weights is None:
        return prepare(_with_ways(net, ways)), ""
    state = dict(read_weights(weights))
    of_few_shot = PROTOTYPES in state
    if of_few_shot:
        net = _with_ways(net, ways)
    if any(in_lite(name) for name in state.keys() - net.state_dict().keys()):
        net = prepare(net)
    said = _adjust(state, net) if of_few_shot else ""
    loaded = load_weights(net, state)
    if of_few_shot:
        return prepare(net), said
    return prepare(_with_ways(net, ways)), str(loaded) if loaded.fresh and not ways else ""


PROTOTYPES, BACKBONE = "head.prototypes", "backbone."


def _with_ways(net: nn.Module, ways: int | None) -> nn.Module:
    from modicum.heads import FewShot, few_shot

    if ways is None:
        return net
    return net.of_ways(ways) if isinstance(net, FewShot) else few_shot(net, ways)


def _adjust(state: dict[str, Any], net: nn.Module) -> str:
    """Make the state dict of a few-shot model fit a net, and say what of the net stays as it is."""
    from modicum.heads import FewShot, last_linear

    own = net.state_dict()
    if isinstance(net, FewShot):
        there, here = len(state[PROTOTYPES]), len(own.get(PROTOTYPES, ()))
        if there == here:
            return ""
        known = bool(state[PROTOTYPES].any())
        state[PROTOTYPES] = own.get(PROTOTYPES, state[PROTOTYPES])
        why = f"{there} classes in the weights, {here} in the net"
        return f"prototypes as initialised: {why}" if known else ""
    name = last_linear(net)[0]
    given = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    state.clear()
    state |= given | {k: own[k] for k in (f"{name}.weight", f"{name}.bias") if k in own}
    return f"{name} as initialised: the weights are of a few-shot model"


def _named(spec: str) -> Any:
    from modicum.models import MODELS

    if spec not in MODELS:
        names = ", ".join(MODELS)
        raise UsageError(
            f"no model is called {spec!r}", hint=f"{names}, or path/to/file.py:factory"
        )
    return MODELS[spec]


def default_input(spec: str) -> str:
    """The shape of a named model's input, as text."""
    if ":" in spec:
        raise UsageError("a model from a file needs --input, such as --input 1x3x96x96")
    return shape_text(_named(spec).input)


def _factory(file: Path, name: str) -> nn.Module:
    from torch import nn

    try:
        net = getattr(_module(file), name)()
    except ModicumError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}:{name} does not make a model", why=why) from error
    if not isinstance(net, nn.Module):
        raise UsageError(f"{file}:{name} returns {type(net).__name__}, not an nn.Module")
    return net


@functools.cache
def _module(file: Path) -> Any:
    import importlib.util

    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def no_data() -> NoReturn:
    """What there is instead of samples that are needed."""
    raise UsageError("--data is needed: an .npz file with x and y")


def load_samples(
    path: Path | None, preprocess: Callable[[], Preprocess], like: Path | None = None
) -> tuple[Any, Any] | None:
    """(x, y) of an .npz, as they are; (Labelled, Preprocess) of a folder or a zip of images.

    The classes are those of `like`, if that is a folder or a zip too.
    """
    from modicum.tasks import load

    if path is None:
        return None
    if path.suffix.lower() == ".npz":
        return _arrays(path)
    images = like is not None and like.suffix.lower() != ".npz"
    return load(path, classes=load(like).classes if images else None), preprocess()


def in_memory(samples: tuple[Any, Any] | None) -> tuple[Any, Any] | None:
    """What `load_samples` found, images too, as arrays (x, y)."""
    from modicum.tasks import Labelled, arrays

    return arrays(*samples) if samples and isinstance(samples[0], Labelled) else samples


def _arrays(path: Path) -> tuple[Any, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InvalidInput(f"{path} is not an .npz with arrays x and y", why=str(error)) from None


def observed(
    net: nn.Module, graph: Graph, method: Method, samples: tuple[Any, Any] | None
) -> Observed | None:
    """What a method that decides by samples or weights sees of them; None for any other."""
    from modicum.fewshot import observe_task
    from modicum.methods import ObservingMethod
    from modicum.observe import observe

    if not isinstance(method, ObservingMethod):
        return None
    if samples is None:
        return observe(net, graph, method)
    return observe_task(net, graph, method, samples)


def check_samples(method: Method, samples: Path | None) -> None:
    """Raise UsageError for samples that a method would not look at."""
    from modicum.methods import METHODS, ObservingMethod

    if samples is not None and not isinstance(method, ObservingMethod):
        able = [name for name, kind in METHODS.items() if issubclass(kind, ObservingMethod)]
        kind = method.model_dump()["kind"]
        raise UsageError(f"{kind} looks at no samples", why=f"--samples is for {', '.join(able)}")


def preprocess_of_plan(
    made: Callable[[], Plan], model: str | None, mean: str, std: str
) -> Callable[[], Preprocess]:
    """How images are shown to the network of a plan."""

    def preprocess() -> Preprocess:
        graph = made().graph
        return preprocess_of(graph.shape(graph.input), model, mean, std)

    return preprocess


def preprocess_of(shape: Shape, model: str | None, mean: str, std: str) -> Preprocess:
    """Preprocess of a network: as its published weights want it, if nothing else is said."""
    from modicum.tasks import Preprocess

    if len(shape) != 4:
        raise UsageError(f"the model takes {shape_text(shape)}, which is no image", hint="an .npz")
    if model is None and not (mean and std):
        raise UsageError(
            "--data and --test of images need --mean and --std here",
            why="an emitted folder does not say how its images are normalised",
        )
    normalise = None if model is None or ":" in model else _named(model).normalise
    known = normalise or ((0.0,), (1.0,))
    figures = [parse_numbers(mean, "--mean") if mean else known[0],
               parse_numbers(std, "--std") if std else known[1]]  # fmt: skip
    channels = shape[1]
    wide = [tuple(f) * channels if len(f) == 1 else tuple(f) for f in figures]
    if any(len(f) != channels for f in wide):
        raise UsageError(f"--mean and --std need 1 or {channels} values for {channels} channels")
    return _valid(Preprocess, {"size": shape[2:], "mean": wide[0], "std": wide[1]}, "--mean, --std")


def load_board(name: str) -> Board | None:
    """A board by its name or its TOML file; none without either."""
    from modicum.board import Board, get

    if not name:
        return None
    return Board.from_toml(name) if name.endswith(".toml") else get(name)


def parse_method(spec: str, fields: Sequence[str]) -> Method:
    """A method from name, name:key=value,key=value or a JSON file, and further fields."""
    from modicum.methods import METHODS

    name, values = spec, {}
    if spec.endswith(".json"):
        try:
            values = json.loads(Path(spec).read_text())
            name = values.pop("kind")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidInput(f"{spec} is not a method", why=str(error)) from None
    elif ":" in spec:
        name, values = parse_spec(spec)
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", hint=", ".join(METHODS))
    values |= _fields(fields, "--set ")
    return _valid(METHODS[name], values, f"method {name}")


def parse_tune(iterations: int | None, prototypes: str, fields: Sequence[str]) -> FineTune:
    """How a task is learned, from its flags; what they leave out has its default."""
    from modicum.fewshot import FineTune

    values = _fields(fields, "--tune ")
    values |= {} if iterations is None else {"iterations": iterations}
    values |= {"prototypes": prototypes} if prototypes else {}
    return _valid(FineTune, values, "fine-tuning")


def task_methods(model: str) -> str:
    """What is compared on few-shot tasks of a model by default, for `parse_contenders`."""
    scheme = SCHEMES.get(model)
    return TASK_METHODS + (f",sparse_update:scheme={scheme}" if scheme else "")


def parse_contenders(text: str, rates: tuple[float, ...], tune: FineTune) -> dict[str, Contender]:
    """Methods on tasks by how they are written: `none` trains nothing, `head` a linear head that
    begins with the prototypes, `transductive` is full with the entropy of the predictions for the
    queries.
    """
    from modicum.task_comparison import Contender

    found = {}
    for spec in split_methods(text):
        name, colon, rest = spec.partition(":")
        if spec == "none":
            found[spec] = Contender()
            continue
        used = tune
        head = "linear" if name == "head" else "cosine"
        if name == "head":
            name = "last"
        if name == "transductive":
            name, used = "full", tune.model_copy(update={"entropy": tune.entropy or 1.0})
        method = parse_method(name + colon + rest, [])
        batch = PAPERS_BATCH.get(method.model_dump()["kind"], 1)
        values = {"method": method, "tune": used, "rates": rates, "batch": batch, "head": head}
        found[spec] = _valid(Contender, values, f"method {spec}")
    return found


def parse_episodes(ways: str, shots: str, queries: int) -> FixedEpisodes:
    """Tasks from their flags; ways are a number, or a range as 5-10."""
    rule = parse_any_episodes(ways, shots, queries)
    if rule.kind != "fixed":
        raise UsageError(f"--shots {shots} is not a number", hint="--shots 5")
    return rule


def parse_any_episodes(ways: str, shots: str, queries: int) -> EpisodeRule:
    """The same; with `various` shots ways and shots are drawn by Meta-Dataset's rules."""
    from modicum.tasks import FixedEpisodes, VariousEpisodes

    parts = ways.split("-")
    if len(parts) > 2 or not all(p.isdecimal() for p in parts):
        raise UsageError(f"--ways {ways} is neither a number nor a range", hint="--ways 5-10")
    known = int(ways) if len(parts) == 1 else tuple(map(int, parts))
    where = "--ways, --shots, --queries"
    if shots == "various":
        both = known if isinstance(known, tuple) else (known, known)
        return _valid(VariousEpisodes, {"ways": both, "queries": queries}, where)
    if not shots.isdecimal():
        raise UsageError(f"--shots {shots} is neither a number nor 'various'", hint="--shots 5")
    return _valid(FixedEpisodes, {"ways": known, "shots": int(shots), "queries": queries}, where)


def parse_metatrain(values: dict[str, Any]) -> MetaTrain:
    """A meta-training from its fields."""
    from modicum.meta import MetaTrain

    return _valid(MetaTrain, values, "metatrain")


def parse_rule(spec: str) -> Rule:
    """A meta-learning rule from name or name:key=value,key=value."""
    from modicum.meta import RULES

    name, values = parse_spec(spec) if ":" in spec else (spec, {})
    if name not in RULES:
        raise UsageError(f"no rule is called {name!r}", hint=", ".join(RULES))
    return _valid(RULES[name], values, f"rule {name}")


def parse_case(spec: str) -> Case:
    """A use case of federated learning: its name, or path/to/file.py:function that returns one."""
    from modicum.federated.cases import CASES, Case

    if ":" not in spec:
        if spec not in CASES:
            names = ", ".join(CASES)
            raise UsageError(
                f"no use case is called {spec!r}", hint=f"{names}, or path/to/file.py:function"
            )
        return CASES[spec]
    file, _, name = spec.rpartition(":")
    try:
        made = getattr(_module(Path(file)), name)()
    except ModicumError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{spec} does not make a use case", why=why) from error
    if not isinstance(made, Case):
        raise UsageError(f"{spec} returns {type(made).__name__}, not a federated.Case")
    return made


def parse_federated(spec: str, case: Case) -> FederatedRule:
    """A federated method from name or name:key=value; what is not given is the case's."""
    from modicum.federated.cases import rule_for
    from modicum.federated.rules import FEDERATED

    name, values = parse_spec(spec) if ":" in spec else (spec, {})
    for key in ("local", "train"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    fields = rule_for(case, name, values)
    return _valid(FEDERATED[name], fields, f"rule {name}")


def parse_rl(values: dict[str, Any], outer: Sequence[str]) -> RL:
    """A meta-training of a policy from its fields, and those of its outer rule."""
    from modicum.meta.rl import RL, TRPO

    trpo = _valid(TRPO, _fields(outer, "--outer "), "--outer")
    return _valid(RL, {**values, "outer": trpo}, "metatrain-rl")


def parse_environment(name: str, horizon: int | None) -> Environment:
    """An environment by its name, with episodes of its own length if nothing else is said."""
    from modicum.meta.rl import ENVIRONMENTS

    if name not in ENVIRONMENTS:
        raise UsageError(f"no environment is called {name!r}", hint=", ".join(ENVIRONMENTS))
    return ENVIRONMENTS[name](**({} if horizon is None else {"horizon": horizon}))


def make_policy(
    environment: Environment, hidden: str, std: float, weights: Path | None, seed: int
) -> nn.Module:
    """A Gaussian policy of an environment; its initial weights are drawn from the seed."""
    import torch

    from modicum.models import GaussianPolicy, load_weights, read_weights

    sizes = hidden.split(",")
    if not all(part.strip().isdigit() and int(part) for part in sizes):
        raise UsageError(f"--hidden {hidden} are no sizes of layers", hint="--hidden 100,100")
    if not std > 0:
        raise UsageError(f"--std {std:g} is no deviation", hint="--std 1")
    torch.manual_seed(seed)
    net = GaussianPolicy(
        environment.observations, environment.actions, [int(part) for part in sizes], std
    )
    if weights is not None:
        load_weights(net, dict(read_weights(weights)))
    return net


def load_to_metatrain(spec: str, shape: str, weights: Path | None, config: MetaTrain) -> nn.Module:
    """A network as a rule takes it: with a cosine head for prototypes, or as many outputs as a
    task has ways."""
    if config.rule.kind == "protonet":
        return load_few_shot(spec, shape, weights, config.episode)
    low, high = config.episode.range
    if low != high:
        raise UsageError(
            f"tasks of {low} to {high} ways do not fit a head",
            why=f"{config.rule.kind} learns a head of so many outputs",
            hint="--ways 5, or --rule protonet",
        )
    from modicum.methods import Full

    classes = None if ":" in spec else high
    return load_model(spec, weights, shape, classes, Full())[0]


def few_shot_models(
    spec: str, shape: str, weights: Path | None, meta: Path | None, rule: EpisodeRule
) -> dict[str, nn.Module]:
    """What methods on tasks start from: a network as it is given, and with weights of `meta`."""
    files = {"as given": weights} | ({} if meta is None else {"meta-trained": meta})
    return {name: load_few_shot(spec, shape, file, rule) for name, file in files.items()}


def load_few_shot(spec: str, shape: str, weights: Path | None, rule: EpisodeRule) -> FewShot:
    """A few-shot network for tasks of a rule."""
    from modicum.methods import Full

    net: Any = load_model(spec, weights, shape, None, Full(), rule.range[1])[0]
    return net


def task_domains(
    data: Path,
    test: Sequence[Path],
    validation: Path | None,
    contenders: dict[str, Contender],
    rule: EpisodeRule,
) -> tuple[dict[str, Domain], dict[str, Domain], str]:
    """(where tasks come from, where rates are chosen, what to say of the latter).

    Without `validation`, a quarter of the classes of `data` are held back for it, if there is
    anything to choose.
    """
    from modicum.task_comparison import Domain
    from modicum.tasks import load, split_classes

    sets = {name: load(path) for name, path in _by_name([data, *test]).items()}
    tested = {name: Domain(dataset) for name, dataset in sets.items()}
    if all(len(c.rates) == 1 or c.method is None for c in contenders.values()):
        return tested, {}, ""
    if validation is not None:
        return tested, {validation.stem: Domain(load(validation))}, ""
    name, dataset = next(iter(sets.items()))
    known, fewest = len(dataset.classes), rule.range[0]
    held = max(fewest, round(HELD_BACK * known))
    if known - held < fewest:
        raise UsageError(
            f"{data} has {known} classes, too few to hold {held} back for the choice of a rate",
            why=f"tasks of {fewest} ways are drawn from them, and from the others",
            hint="--validation with other images, a single --lr, or fewer --ways",
        )
    others, chosen = split_classes(dataset, held)
    tested[name] = Domain(others)
    said = (
        f"rates are chosen on {held} of the {known} classes of {data}, drawn with seed 0: "
        f"{', '.join(chosen.classes)}; the tasks are of the others"
    )
    return tested, {f"{name} ({held} classes held back)": Domain(chosen)}, said


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names of sets of images; the whole path where that is not enough."""
    stems = [path.stem for path in paths]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is there twice")
    short = len(set(stems)) == len(stems)
    return {(p.stem if short else str(p).replace("/", "_")): p for p in paths}


def is_first_process() -> bool:
    """Of those that torchrun started, which all do the same, one says what came of it."""
    return os.environ.get("RANK", "0") == "0"


def refuse_flags(context: Any, names: Sequence[str], why: str) -> None:
    """Raise UsageError where one of these flags is on the command line."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def parse_augment(spec: str) -> Augment | None:
    """An augmentation from its crop and fields, such as pad:pad=2,flip=false."""
    from modicum.tasks import Augment

    name, values = parse_spec(spec)
    if name == "none" and not values:
        return None
    parse_choice(name, "augmentation", ("none", "resized", "pad"))
    return _valid(Augment, {"crop": name, **values}, f"augmentation {name}")


def split_methods(text: str) -> list[str]:
    """The methods of a list; a comma also parts the fields of one: last:n=3,bias:head=0."""
    found: list[str] = []
    for part in _parts(text):
        if found and "=" in part and ":" not in part.partition("=")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    twice = next((spec for spec in found if found.count(spec) > 1), None)
    if twice is not None or "" in found:
        what = f"the method {twice} is there twice" if twice else f"a method of {text!r} is empty"
        raise UsageError(what, hint="--methods full,last:n=3,bias")
    return found


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the fields of name:key=value,key=value."""
    name, _, rest = text.partition(":")
    return name, _fields(_parts(rest) if rest else [], f"{name}:")


def _parts(text: str) -> list[str]:
    """What commas part that stand in no quotes, brackets or braces."""
    parts, depth, quoted = [""], 0, False
    for c in text:
        quoted ^= c == '"'
        depth += not quoted and ((c in "[{") - (c in "]}"))
        if c == "," and not quoted and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _fields(texts: Sequence[str], where: str) -> dict[str, Any]:
    """key=value, where the value is JSON, or text where it is not."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{where}{text} is not key=value")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values


def _valid(kind: Any, values: dict[str, Any], what: str) -> Any:
    """A config from plain data; its own checks say what is wrong."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        why = "; ".join(
            ": ".join([".".join(map(str, e["loc"])), e["msg"]] if e["loc"] else [e["msg"]])
            for e in error.errors()
        )
        raise UsageError(f"{what} does not take these fields", why=why) from None


def parse_optimizer(name: str, lr: float, momentum: float, weight_decay: float) -> SGD | Adam:
    """An optimiser from its flags."""
    from modicum.optim import SGD, Adam

    kind = parse_choice(name, "optimizer", ("sgd", "adam"))
    values = {"lr": lr, "weight_decay": weight_decay}
    if kind == "sgd":
        return _valid(SGD, {**values, "momentum": momentum}, "optimizer sgd")
    if momentum:
        raise UsageError("--momentum is for sgd; adam has its own")
    return _valid(Adam, values, "optimizer adam")


def parse_numbers(text: str, flag: str) -> tuple[float, ...]:
    """The numbers that commas part."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} {text} is not a number, or numbers with commas") from None


def parse_choice(value: str, what: str, known: tuple[str, ...]) -> Any:
    """The value itself, if it is known."""
    if value not in known:
        raise UsageError(f"no {what} is called {value!r}", hint=", ".join(known))
    return value


def parse_shape(text: str) -> Shape:
    """The shape that x parts, the batch first.

    >>> parse_shape("1x3x96x96")
    (1, 3, 96, 96)
    """
    parts = text.lower().split("x")
    if not all(p.isdigit() and int(p) > 0 for p in parts) or len(parts) < 2:
        raise UsageError(f"{text!r} is not a shape", hint="with the batch first, as 1x3x96x96")
    return tuple(int(p) for p in parts)


def shape_text(shape: Shape) -> str:
    """A shape as `parse_shape` reads it."""
    return "x".join(map(str, shape))
