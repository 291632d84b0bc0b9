"""The command line: one command per verb, flags that are config fields, no logic.

With --json the result, and only it, is on stdout.  Exit codes: 0 ok, 1 failed, 2 usage, 3 does not
fit, 4 unsupported operator, 5 parity mismatch, 70 a bug of ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from modicum.errors import Bug, InvalidInput, ModicumError, ParityError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modicum.methods import Method
    from modicum.optim import SGD, Adam

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train models on devices that barely have room to run them: "
    "plan what to update on a board, adapt in PyTorch or emit C and run it, report.",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and only it.")]
ModelArg = Annotated[
    str, typer.Argument(help="path/to/file.py:factory, or a name from `modicum models`.")
]
Weights = Annotated[
    Path | None, typer.Option(help="State dict to load: .pt (weights only) or .safetensors.")
]
PlanFile = Annotated[Path, typer.Option("--plan", help="A plan made by `modicum plan`.")]
DataFile = Annotated[
    Path | None, typer.Option("--data", help="Training samples: .npz with x (n, ...) and y (n,).")
]
TestFile = Annotated[Path | None, typer.Option("--test", help="Test samples, as --data.")]


@app.command()
def plan(
    model: ModelArg,
    input: Annotated[str, typer.Option(help="Shape of one input, such as 1x3x96x96.")] = "",
    board: Annotated[str, typer.Option(help="A board's name, or a TOML file of your own.")] = "",
    method: Annotated[
        str, typer.Option(help="What to update: full, last, bias, explicit, or a JSON file.")
    ] = "full",
    set: Annotated[list[str] | None, typer.Option(help="A field of the method: --set n=3.")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Momentum (sgd).")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty.")] = 0.0,
    loss: Annotated[str, typer.Option(help="cross_entropy or mse.")] = "cross_entropy",
    accumulate: Annotated[int, typer.Option(help="Samples per update.")] = 1,
    ram: Annotated[str, typer.Option(help="RAM limit instead of the board's, as 200KB.")] = "",
    flash: Annotated[str, typer.Option(help="Flash limit instead of the board's.")] = "",
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Decide what to update on a board, and prove that it fits."""
    from modicum.capture import capture
    from modicum.plan import plan as make
    from modicum.units import parse_size

    net, example = _load_model(model, weights, input)
    made = make(
        capture(net, example),
        _board(board),
        _method(method, set or []),
        _optimizer(optimizer, lr, momentum, weight_decay),
        loss=_choice(loss, "loss", ("cross_entropy", "mse")),
        accumulate=accumulate,
        ram=parse_size(ram) if ram else None,
        flash=parse_size(flash) if flash else None,
    )
    if out is not None:
        made.save(out)
    _show(as_json, {**made.model_dump(mode="json"), "hash": made.hash}, str(made))


@app.command()
def adapt(
    model: ModelArg,
    plan: PlanFile,
    data: DataFile = None,
    test: TestFile = None,
    epochs: Annotated[int, typer.Option(help="Passes over the samples.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the order of the samples.")] = 0,
    record: Annotated[bool, typer.Option(help="Keep the trained slices of every step.")] = False,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the trace here.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the adapted state dict here.")] = None,
    as_json: Json = False,
) -> None:
    """Train in PyTorch under a plan."""
    from modicum.adapt import adapt as train

    made = _plan(plan)
    net, _ = _load_model(model, weights, _x(made.graph.shape(made.graph.input)))
    trace = train(
        net,
        made,
        _data(data) or _no_data(),
        epochs=epochs,
        test=_data(test),
        seed=seed,
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


@app.command()
def emit(
    model: ModelArg,
    plan: PlanFile,
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist or be empty.")],
    name: Annotated[str, typer.Option(help="Prefix of the C symbols.")] = "model",
    data: DataFile = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Write the plan as self-contained C99."""
    from modicum.emit import emit as write

    made = _plan(plan)
    net, _ = _load_model(model, weights, _x(made.graph.shape(made.graph.input)))
    folder = write(net, made, out, name=name, data=_data(data))
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    text = f"{folder}: {len(files)} files; try `make -C {folder} check`"
    _show(as_json, {"folder": str(folder), "name": name, "files": files}, text)


@app.command()
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
    out: Annotated[Path | None, typer.Option(help="Write the trace here.")] = None,
    as_json: Json = False,
) -> None:
    """Build an emitted folder, train on it, and measure.  With --like, also compare."""
    from modicum.run import run as execute
    from modicum.trace import Trace, compare

    reference = Trace.load(like) if like is not None else None
    trace = execute(
        folder,
        on,
        train=_data(data),
        order=reference.order if reference else None,
        test=_data(test),
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def ops(as_json: Json = False) -> None:
    """List the operators that can be captured and trained."""
    from modicum.ops import OPS

    rows = []
    for name, op in OPS.items():
        text = type(op).__doc__ or sys.modules[type(op).__module__].__doc__ or ""
        rows.append((name, ", ".join(op.roles) or "-", text.strip().splitlines()[0]))
    data = {name: {"parameters": params, "about": about} for name, params, about in rows}
    _show(as_json, data, "\n".join(_table(("operator", "parameters", "what it is"), rows)))


@app.command()
def models(as_json: Json = False) -> None:
    """List the reference networks."""
    from modicum.models import MODELS

    rows = [(n, _x(e.input), str(e.classes), e.about) for n, e in MODELS.items()]
    data = {
        n: {"input": e.input, "classes": e.classes, "about": e.about} for n, e in MODELS.items()
    }
    _show(as_json, data, "\n".join(_table(("model", "input", "classes", "what it is"), rows)))


@app.command()
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


def _load_model(spec: str, weights: Path | None, shape: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and an example input, from a name or path/to/file.py:factory.

    Initial weights are drawn from seed 0, so that every command sees the same network.
    """
    import torch

    from modicum.models import MODELS

    torch.manual_seed(0)
    file, colon, factory = spec.rpartition(":")
    if colon:
        net = _factory(Path(file), factory)
        if not shape:
            raise UsageError("a model from a file needs --input, such as --input 1x3x96x96")
    elif spec in MODELS:
        net = MODELS[spec].make(MODELS[spec].classes)
        shape = shape or _x(MODELS[spec].input)
    else:
        names = ", ".join(MODELS)
        raise UsageError(
            f"no model is called {spec!r}", hint=f"{names}, or path/to/file.py:factory"
        )
    if weights is not None:
        _load_weights(net, weights)
    return net.eval(), torch.zeros(_shape(shape))


def _factory(file: Path, name: str) -> nn.Module:
    import importlib.util

    from torch import nn

    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        net = getattr(module, name)()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}:{name} does not make a model", why=why) from error
    if not isinstance(net, nn.Module):
        raise UsageError(f"{file}:{name} returns {type(net).__name__}, not an nn.Module")
    return net


def _load_weights(net: nn.Module, path: Path) -> None:
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state)
    except Exception as error:
        why = str(error).strip().splitlines()[:6]
        raise InvalidInput(f"cannot load the weights {path}", why=why) from error


def _no_data() -> NoReturn:
    raise UsageError("--data is needed: an .npz file with x and y")


def _data(path: Path | None) -> tuple[Any, Any] | None:
    import numpy as np

    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InvalidInput(f"{path} is not an .npz with arrays x and y", why=str(error)) from None


def _board(name: str) -> Any:
    from modicum.board import Board, get

    if not name:
        return None
    return Board.from_toml(name) if name.endswith(".toml") else get(name)


def _method(name: str, fields: list[str]) -> Method:
    from pydantic import ValidationError

    from modicum.methods import METHODS

    values: dict[str, Any] = {}
    if name.endswith(".json"):
        try:
            values = json.loads(Path(name).read_text())
            name = values.pop("kind")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidInput(f"{name} is not a method", why=str(error)) from None
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", hint=", ".join(METHODS))
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals:
            raise UsageError(f"--set {field} is not key=value")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    try:
        return METHODS[name].model_validate(values)
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UsageError(f"method {name} does not take these fields", why=why) from None


def _optimizer(name: str, lr: float, momentum: float, weight_decay: float) -> SGD | Adam:
    from pydantic import ValidationError

    from modicum.optim import SGD, Adam

    kind = _choice(name, "optimizer", ("sgd", "adam"))
    if kind == "adam" and momentum:
        raise UsageError("--momentum is for sgd; adam has its own")
    try:
        if kind == "adam":
            return Adam(lr=lr, weight_decay=weight_decay)
        return SGD(lr=lr, momentum=momentum, weight_decay=weight_decay)
    except ValidationError as error:
        why = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        raise UsageError(f"the optimizer {kind} does not take these values", why=why) from None


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
