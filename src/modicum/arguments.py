"""What comes from outside, as a person writes it: flags, specs and files into our own objects.

Whatever cannot be read raises UsageError or InvalidInput, with what was found and what is known.
Nothing large is imported before it is needed, so that `modicum --help` is quick.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modicum.errors import InvalidInput, ModicumError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modicum.board import Board
    from modicum.methods import Method
    from modicum.optim import SGD, Adam
    from modicum.plan import Plan
    from modicum.tasks import Augment, Preprocess

Shape = tuple[int, ...]


def load_plan(path: Path) -> Plan:
    """A plan from its file."""
    from modicum.plan import Plan

    return Plan.load(path)


def load_model(
    spec: str, weights: Path | None, shape: str, classes: int | None, method: Method
) -> tuple[nn.Module, torch.Tensor]:
    """A network with what a method adds, from a name or path/to/file.py:factory, and its input.

    Initial weights are drawn from seed 0, so that every command sees the same network.
    """
    import torch

    from modicum.lite import prepare_model

    example = torch.zeros(parse_shape(shape or default_input(spec)))
    if classes is not None and ":" in spec:
        raise UsageError("--classes goes with the name of a model", why="a factory has its own")
    torch.manual_seed(0)
    net, fresh = make_network(
        spec, weights, classes, lambda net: prepare_model(net.eval(), example, method)
    )
    if fresh:
        print(fresh, file=sys.stderr)
    return net, example


def model_of_plan(made: Plan, spec: str, weights: Path | None) -> nn.Module:
    """The network of a plan: a named model gets as many outputs, and what the method adds."""
    graph = made.graph
    classes = None if ":" in spec else graph.values[graph.output].size
    shape = shape_text(graph.shape(graph.input))
    return load_model(spec, weights, shape, classes, made.method)[0]


def make_network(
    spec: str,
    weights: Path | None,
    classes: int | None,
    prepare: Callable[[nn.Module], nn.Module] = lambda net: net,
) -> tuple[nn.Module, str]:
    """A network as `prepare` makes it, and what its weights left as initialised.

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
        return prepare(net), ""
    state = read_weights(weights)
    if any(in_lite(name) for name in state.keys() - net.state_dict().keys()):
        net = prepare(net)
    loaded = load_weights(net, state)
    return prepare(net), str(loaded) if loaded.fresh else ""


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
