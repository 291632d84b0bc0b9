"""The command line: one command per verb, flags that are config fields, no logic.

With --json the result, and only it, is on stdout.  Exit codes: 0 ok, 1 failed, 2 usage, 3 does not
fit, 4 unsupported operator, 5 parity mismatch, 70 a bug of ours.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from modicum.errors import Bug, InvalidInput, ModicumError, ParityError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modicum.methods import Method
    from modicum.optim import SGD, Adam
    from modicum.plan import Plan
    from modicum.tasks import Augment, Preprocess

    Shape = tuple[int, ...]


class Command(TyperCommand):
    """A command whose help is plain text: typer escapes brackets for rich even without it."""

    def get_help(self, ctx: Any) -> str:
        return super().get_help(ctx).replace("\\[", "[")


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train models on devices that barely have room to run them: "
    "plan what to update on a board, adapt in PyTorch or emit C and run it, report.",
)
command = functools.partial(app.command, cls=Command)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and only it.")]
ModelArg = Annotated[
    str, typer.Argument(help="path/to/file.py:factory, or a name from `modicum models`.")
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights to load: .pt, .safetensors, or int8 .npz with a table."),
]
Input = Annotated[str, typer.Option(help="Shape of one input, such as 1x3x96x96.")]
BoardName = Annotated[str, typer.Option(help="A board's name, or a TOML file of your own.")]
OptimizerName = Annotated[str, typer.Option(help="sgd or adam.")]
Momentum = Annotated[float, typer.Option(help="Momentum (sgd).")]
WeightDecay = Annotated[float, typer.Option(help="L2 penalty.")]
PlanFile = Annotated[Path, typer.Option("--plan", help="A plan made by `modicum plan`.")]
DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Training samples: .npz with x (n, ...) and y (n,), or a folder or zip of images.",
    ),
]
TestFile = Annotated[Path | None, typer.Option("--test", help="Test samples, as --data.")]
Mean = Annotated[
    str, typer.Option(help="Mean of each channel, for images from 0 to 1: 0.5,0.5,0.5.")
]
Std = Annotated[str, typer.Option(help="What each channel is divided by after that.")]


def _version(show: bool) -> None:
    if show:
        from modicum import __version__

        print(f"modicum {__version__}")
        raise typer.Exit


@app.callback()
def _modicum(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@command()
def plan(
    model: ModelArg,
    input: Input = "",
    board: BoardName = "",
    method: Annotated[
        str,
        typer.Option(help="What to update: a name of `modicum methods`, last:n=3, a JSON file."),
    ] = "full",
    set: Annotated[list[str] | None, typer.Option(help="A field of the method: --set n=3.")] = None,
    optimizer: OptimizerName = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    loss: Annotated[str, typer.Option(help="cross_entropy or mse.")] = "cross_entropy",
    accumulate: Annotated[int, typer.Option(min=1, help="Samples per update.")] = 1,
    ram: Annotated[str, typer.Option(help="RAM limit instead of the board's, as 200KB.")] = "",
    flash: Annotated[str, typer.Option(help="Flash limit instead of the board's.")] = "",
    classes: Annotated[
        int | None, typer.Option(min=1, help="Outputs of a named model, if not its own number.")
    ] = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Decide what to update on a board, and prove that it fits."""
    from modicum.capture import capture
    from modicum.lite import prepare_model
    from modicum.plan import plan as make
    from modicum.units import parse_size

    target, chosen = _board(board), _method(method, set or [])
    trained = _optimizer(optimizer, lr, momentum, weight_decay)
    known = _choice(loss, "loss", ("cross_entropy", "mse"))
    limits = {k: parse_size(v) if v else None for k, v in (("ram", ram), ("flash", flash))}
    net, example = _load_model(model, weights, input, classes)
    graph = capture(prepare_model(net, example, chosen), example)
    made = make(graph, target, chosen, trained, loss=known, accumulate=accumulate, **limits)
    if out is not None:
        made.save(out)
    _show(as_json, {**made.model_dump(mode="json"), "hash": made.hash}, str(made))


@command()
def adapt(
    model: ModelArg,
    plan: PlanFile,
    data: DataFile = None,
    test: TestFile = None,
    epochs: Annotated[int, typer.Option(help="Passes over the samples.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the order of the samples.")] = 0,
    schedule: Annotated[
        str, typer.Option(help="constant, or cosine: the learning rate falls to 0.")
    ] = "constant",
    record: Annotated[bool, typer.Option(help="Keep the trained slices of every step.")] = False,
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the trace here.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the adapted state dict here.")] = None,
    as_json: Json = False,
) -> None:
    """Train in PyTorch under a plan."""
    from modicum.adapt import adapt as train

    made = _plan(plan)
    shown = _preprocess(lambda: made, model, mean, std)
    samples, held = _samples(data, shown), _samples(test, shown, data)
    net = _model_of(made, model, weights)
    trace = train(
        net,
        made,
        _in_memory(samples) or _no_data(),
        epochs=epochs,
        test=held,
        seed=seed,
        schedule=_choice(schedule, "schedule", ("constant", "cosine")),
        record=record,
        progress=True,
    )
    if out is not None:
        trace.save(out)
    if save is not None:
        import torch

        state = net.state_dict()
        state.update({k: torch.from_numpy(v) for k, v in trace.state.items()})
        torch.save(state, save)
    _show(as_json, trace.as_dict(arrays=False), _trace_text(trace))


@command()
def emit(
    model: ModelArg,
    plan: PlanFile,
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist or be empty.")],
    name: Annotated[str, typer.Option(help="Prefix of the C symbols.")] = "model",
    data: DataFile = None,
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Write the plan as self-contained C99."""
    from modicum.emit import emit as write

    made = _plan(plan)
    samples = _samples(data, _preprocess(lambda: made, model, mean, std))
    net = _model_of(made, model, weights)
    folder = write(net, made, out, name=name, data=_in_memory(samples))
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    text = f"{folder}: {len(files)} files; try `make -C {folder} check`"
    _show(as_json, {"folder": str(folder), "name": name, "files": files}, text)


@command()
def run(
    folder: Annotated[Path, typer.Argument(help="A folder that `modicum emit` wrote.")],
    on: Annotated[
        str, typer.Option(help="host, m4f, m7, m55, or qemu for the plan's core.")
    ] = "host",
    data: DataFile = None,
    test: TestFile = None,
    like: Annotated[
        Path | None, typer.Option(help="Train on the samples in the order of this trace.")
    ] = None,
    fast: Annotated[bool, typer.Option(help="Build for speed, not for the same bits.")] = False,
    record: Annotated[bool, typer.Option(help="Keep the trained slices of every step.")] = False,
    mean: Mean = "",
    std: Std = "",
    out: Annotated[Path | None, typer.Option(help="Write the trace here.")] = None,
    as_json: Json = False,
) -> None:
    """Build an emitted folder, train on it, and measure.  With --like, also compare."""
    from modicum.run import run as execute
    from modicum.trace import Trace, compare

    reference = Trace.load(like) if like is not None else None
    shown = _preprocess(lambda: _plan(folder / "plan.json"), None, mean, std)
    trace = execute(
        folder,
        on,
        train=_in_memory(_samples(data, shown)),
        order=reference.order if reference else None,
        test=_in_memory(_samples(test, shown, data)),
        parity=not fast,
        record=record,
    )
    if out is not None:
        trace.save(out)
    result, text = trace.as_dict(arrays=False), _trace_text(trace)
    if reference is not None:
        comparison = compare(reference, trace)
        result["comparison"] = comparison.as_dict()
        text += f"\n{comparison}"
        if not comparison.same:
            raise ParityError(
                str(comparison),
                hint="the same --weights for adapt and emit, the same --data for both",
            )
    _show(as_json, result, text)


@command()
def compare(
    model: ModelArg,
    methods: Annotated[
        str,
        typer.Option(help="Methods, such as full,last:n=3,bias, or JSON files; see `methods`."),
    ],
    data: Annotated[Path, typer.Option(help="Training images: a folder, a zip, or an .npz.")],
    out: Annotated[Path, typer.Option(help="The folder of all results; a rerun goes on there.")],
    test: Annotated[
        Path | None, typer.Option(help="Test images; without, a fifth of --data, of each class.")
    ] = None,
    input: Input = "",
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images per update.")] = 8,
    optimizer: OptimizerName = "sgd",
    lr: Annotated[
        str, typer.Option(help="Learning rate; of several, 0.01,0.1, the best for each method.")
    ] = "0.01",
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    schedule: Annotated[str, typer.Option(help="cosine or constant.")] = "cosine",
    augment: Annotated[
        str, typer.Option(help="none, resized or pad, with fields: pad:pad=2,flip=false.")
    ] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="So many trainings of each method.")] = 3,
    board: BoardName = "",
    as_json: Json = False,
) -> None:
    """Train several methods alike, and put accuracy beside memory and work."""
    from modicum.comparison import compare_methods
    from modicum.tasks import load, split

    chosen = {spec: _method(spec, []) for spec in _specs(methods)}
    rates = _numbers(lr, "--lr")
    trained = _optimizer(optimizer, rates[0], momentum, weight_decay)
    known = _choice(schedule, "schedule", ("cosine", "constant"))
    changed, target = _augment(augment), _board(board)
    shape = _shape(input or _default_input(model))
    train = load(data)
    if test is not None:
        held = load(test, classes=train.classes)
    else:
        train, held = split(train, (0.8, 0.2), seed=0)
        print(f"{len(train)} images to train, {len(held)} to test, drawn with seed 0 from {data}",
              file=sys.stderr)  # fmt: skip
    classes = None if ":" in model else len(train.classes)
    say_fresh = _network(model, weights, classes)[1]
    if say_fresh:
        print(say_fresh, file=sys.stderr)
    result = compare_methods(
        lambda: _network(model, weights, classes)[0],
        chosen,
        train,
        held,
        _normalised(shape, model, mean, std),
        out=out,
        seeds=range(seeds),
        epochs=epochs,
        batch=batch,
        optimizer=trained,
        rates=rates,
        schedule=known,
        augment=changed,
        board=target,
        progress=True,
    )
    text = f"{result}\n\n{out / 'comparison.svg'}: accuracy against memory"
    _show(as_json, result.as_dict(), text)


@command()
def cost(
    plan: PlanFile,
    batch: Annotated[int, typer.Option(help="Samples that pass at once.")] = 1,
    as_json: Json = False,
) -> None:
    """MACs, FLOPs and kept bytes of a plan, by layer and by block."""
    from modicum.accounting import account

    made = account(_plan(plan), batch)
    _show(as_json, made.model_dump(mode="json"), str(made))


@command()
def report(
    plan: PlanFile,
    traces: Annotated[
        list[Path] | None, typer.Argument(help="Traces, the reference first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write .html, .json or .txt here.")] = None,
    as_json: Json = False,
) -> None:
    """Say what was planned and what happened, in text, JSON or one HTML page."""
    from modicum.report import report as make
    from modicum.trace import Trace

    page = make(_plan(plan), *(Trace.load(p) for p in traces or []), out=out)
    _show(as_json, page.as_dict(), page.text())


@command()
def boards(as_json: Json = False) -> None:
    """List the boards and the sources of their figures."""
    from modicum.board import boards as catalogue
    from modicum.units import size

    known = catalogue()
    rows = [
        (b.name, b.core, size(b.ram), size(b.available), size(b.flash),
         f"{b.clock_hz / 1e6:.0f} MHz", b.qemu or "-", b.title)
        for b in known.values()
    ]  # fmt: skip
    head = ("board", "core", "RAM", "for modicum", "flash", "clock", "QEMU", "what it is")
    lines = _table(head, rows)
    lines.append("\nSources of the figures: modicum boards --json")
    _show(as_json, {n: b.model_dump(mode="json") for n, b in known.items()}, "\n".join(lines))


@command()
def methods(as_json: Json = False) -> None:
    """List the methods and their fields."""
    from modicum.methods import METHODS

    rows, data = [], {}
    for kind, cls in METHODS.items():
        fields = {k: f for k, f in cls.model_fields.items() if k != "kind"}
        given = ", ".join(k if f.is_required() else f"{k}={f.default}" for k, f in fields.items())
        about = (cls.__doc__ or "").strip().splitlines()[0]
        rows.append((kind, given or "-", about))
        data[kind] = {"about": about, "schema": cls.model_json_schema()}
    _show(as_json, data, "\n".join(_table(("method", "--set", "what it updates"), rows)))


@command()
def ops(as_json: Json = False) -> None:
    """List the operators that can be captured and trained."""
    from modicum.ops import OPS

    rows = []
    for name, op in OPS.items():
        text = type(op).__doc__ or sys.modules[type(op).__module__].__doc__ or ""
        rows.append((name, ", ".join(op.roles) or "-", text.strip().splitlines()[0]))
    data = {name: {"parameters": params, "about": about} for name, params, about in rows}
    _show(as_json, data, "\n".join(_table(("operator", "parameters", "what it is"), rows)))


@command()
def models(as_json: Json = False) -> None:
    """List the reference networks."""
    from modicum.models import MODELS

    rows = [(n, _x(e.input), str(e.classes), e.about) for n, e in MODELS.items()]
    data = {
        n: {"input": e.input, "classes": e.classes, "about": e.about} for n, e in MODELS.items()
    }
    _show(as_json, data, "\n".join(_table(("model", "input", "classes", "what it is"), rows)))


@command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Where everything goes; must not exist or be empty.")],
    board: Annotated[str, typer.Option(help="The board to plan for.")] = "nano33ble",
    as_json: Json = False,
) -> None:
    """Train, plan, adapt and emit on real digits, and compare PyTorch, host and emulated boards."""
    from modicum.quickstart import quickstart as start

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    result = start(out, board, say=say, progress=sys.stderr.isatty())
    if as_json:
        _show(True, result.as_dict(), "")


def main() -> None:
    """Run the command line and exit; errors go to stderr, with --json to stdout as JSON."""
    import click

    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except ModicumError as error:
        _fail(error, as_json)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.ClickException as error:
        if as_json:
            _fail(UsageError(error.format_message()), as_json)
        error.show()
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a file that cannot be read or written, a full disk
        _fail(ModicumError(str(error)), as_json)
    except Exception as error:
        import traceback

        traceback.print_exc()
        _fail(Bug(f"{type(error).__name__}: {error}"), as_json)


def _fail(error: ModicumError, as_json: bool) -> None:
    if as_json:
        print(json.dumps(error.as_dict(), indent=1))
    else:
        print(error.render(), file=sys.stderr)
    sys.exit(error.exit_code)


def _show(as_json: bool, result: dict[str, Any], text: str) -> None:
    print(json.dumps(result, indent=1) if as_json else text)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head) - 1)]
    return [
        "  ".join([*(f"{c:<{w}}" for c, w in zip(r, widths, strict=False)), r[-1]])
        for r in [head, *rows]
    ]


def _trace_text(trace: Any) -> str:
    lines = [f"{trace.where}: {len(trace.losses)} steps"]
    if trace.losses:
        lines[0] += f", loss {trace.losses[0]:.4f} -> {trace.losses[-1]:.4f}"
    if trace.accuracy_after is not None:
        lines.append(f"accuracy {trace.accuracy_before:.1%} -> {trace.accuracy_after:.1%}")
    for name, value in trace.figures.items():
        text = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"
        lines.append(f"  {name:<20} {text}")
    return "\n".join(lines)


# ---- what comes from outside ----


def _plan(path: Path) -> Any:
    from modicum.plan import Plan

    return Plan.load(path)


def _load_model(
    spec: str, weights: Path | None, shape: str, classes: int | None = None
) -> tuple[nn.Module, torch.Tensor]:
    """A network and an example input, from a name or path/to/file.py:factory.

    Initial weights are drawn from seed 0, so that every command sees the same network.
    """
    import torch

    example = _shape(shape or _default_input(spec))
    if classes is not None and ":" in spec:
        raise UsageError("--classes goes with the name of a model", why="a factory has its own")
    torch.manual_seed(0)
    net, fresh = _network(spec, weights, classes)
    if fresh:
        print(fresh, file=sys.stderr)
    return net.eval(), torch.zeros(example)


def _model_of(made: Plan, spec: str, weights: Path | None) -> nn.Module:
    """The network of a plan: a named model gets as many outputs, and what the method adds."""
    from modicum.lite import prepare_model

    graph = made.graph
    classes = None if ":" in spec else graph.values[graph.output].size
    net, example = _load_model(spec, weights, _x(graph.shape(graph.input)), classes)
    return prepare_model(net, example, made.method)


def _network(spec: str, weights: Path | None, classes: int | None) -> tuple[nn.Module, str]:
    """A network, and what its weights left as initialised."""
    from modicum.models import MODELS, load_weights

    file, colon, factory = spec.rpartition(":")
    if colon:
        net = _factory(Path(file), factory)
    else:
        _named(spec)
        net = MODELS[spec].make(classes or MODELS[spec].classes)
    if weights is None:
        return net, ""
    loaded = load_weights(net, weights)
    return net, str(loaded) if loaded.fresh else ""


def _named(spec: str) -> Any:
    from modicum.models import MODELS

    if spec not in MODELS:
        names = ", ".join(MODELS)
        raise UsageError(
            f"no model is called {spec!r}", hint=f"{names}, or path/to/file.py:factory"
        )
    return MODELS[spec]


def _default_input(spec: str) -> str:
    if ":" in spec:
        raise UsageError("a model from a file needs --input, such as --input 1x3x96x96")
    return _x(_named(spec).input)


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


def _no_data() -> NoReturn:
    raise UsageError("--data is needed: an .npz file with x and y")


def _samples(
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


def _in_memory(samples: tuple[Any, Any] | None) -> tuple[Any, Any] | None:
    from modicum.tasks import Labelled, arrays

    return arrays(*samples) if samples and isinstance(samples[0], Labelled) else samples


def _arrays(path: Path) -> tuple[Any, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InvalidInput(f"{path} is not an .npz with arrays x and y", why=str(error)) from None


def _preprocess(
    made: Callable[[], Plan], model: str | None, mean: str, std: str
) -> Callable[[], Preprocess]:
    """How images are shown to the network of a plan."""

    def preprocess() -> Preprocess:
        graph = made().graph
        return _normalised(graph.shape(graph.input), model, mean, std)

    return preprocess


def _normalised(shape: Shape, model: str | None, mean: str, std: str) -> Preprocess:
    """Preprocess of a network: as its published weights want it, if nothing else is said."""
    from modicum.tasks import Preprocess

    if len(shape) != 4:
        raise UsageError(f"the model takes {_x(shape)}, which is no image", hint="an .npz")
    if model is None and not (mean and std):
        raise UsageError(
            "--data and --test of images need --mean and --std here",
            why="an emitted folder does not say how its images are normalised",
        )
    normalise = None if model is None or ":" in model else _named(model).normalise
    known = normalise or ((0.0,), (1.0,))
    figures = [_numbers(mean, "--mean") if mean else known[0],
               _numbers(std, "--std") if std else known[1]]  # fmt: skip
    channels = shape[1]
    wide = [tuple(f) * channels if len(f) == 1 else tuple(f) for f in figures]
    if any(len(f) != channels for f in wide):
        raise UsageError(f"--mean and --std need 1 or {channels} values for {channels} channels")
    return _valid(Preprocess, {"size": shape[2:], "mean": wide[0], "std": wide[1]}, "--mean, --std")


def _board(name: str) -> Any:
    from modicum.board import Board, get

    if not name:
        return None
    return Board.from_toml(name) if name.endswith(".toml") else get(name)


def _method(spec: str, fields: Sequence[str]) -> Method:
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
        name, values = _spec(spec)
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", hint=", ".join(METHODS))
    values |= _fields(fields, "--set ")
    return _valid(METHODS[name], values, f"method {name}")


def _augment(spec: str) -> Augment | None:
    from modicum.tasks import Augment

    name, values = _spec(spec)
    if name == "none" and not values:
        return None
    _choice(name, "augmentation", ("none", "resized", "pad"))
    return _valid(Augment, {"crop": name, **values}, f"augmentation {name}")


def _specs(text: str) -> list[str]:
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


def _spec(text: str) -> tuple[str, dict[str, Any]]:
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


def _optimizer(name: str, lr: float, momentum: float, weight_decay: float) -> SGD | Adam:
    from modicum.optim import SGD, Adam

    kind = _choice(name, "optimizer", ("sgd", "adam"))
    values = {"lr": lr, "weight_decay": weight_decay}
    if kind == "sgd":
        return _valid(SGD, {**values, "momentum": momentum}, "optimizer sgd")
    if momentum:
        raise UsageError("--momentum is for sgd; adam has its own")
    return _valid(Adam, values, "optimizer adam")


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} {text} is not a number, or numbers with commas") from None


def _choice(value: str, what: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise UsageError(f"no {what} is called {value!r}", hint=", ".join(known))
    return value


def _shape(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(p.isdigit() and int(p) > 0 for p in parts) or len(parts) < 2:
        raise UsageError(f"{text!r} is not a shape", hint="with the batch first, as 1x3x96x96")
    return tuple(int(p) for p in parts)


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


if __name__ == "__main__":
    main()
