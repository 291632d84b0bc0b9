"""The command line: one command per verb, flags that are config fields, no logic.

With --json the result, and only it, is on stdout.  Exit codes: 0 ok, 1 failed, 2 usage, 3 does not
fit, 4 unsupported operator, 5 parity mismatch, 70 a bug of ours.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from modicum.arguments import (
    check_samples,
    default_input,
    few_shot_models,
    in_memory,
    is_few_shot,
    is_first_process,
    load_board,
    load_few_shot,
    load_model,
    load_plan,
    load_samples,
    load_to_metatrain,
    make_network,
    make_policy,
    model_of_plan,
    no_data,
    observed,
    parse_any_episodes,
    parse_augment,
    parse_case,
    parse_choice,
    parse_contenders,
    parse_environment,
    parse_episodes,
    parse_federated,
    parse_metatrain,
    parse_method,
    parse_numbers,
    parse_optimizer,
    parse_rl,
    parse_rule,
    parse_shape,
    parse_tune,
    preprocess_of,
    preprocess_of_plan,
    refuse_flags,
    shape_text,
    split_methods,
    task_domains,
    task_methods,
)
from modicum.errors import Bug, ModicumError, ParityError, UsageError


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
Iterations = Annotated[
    int | None, typer.Option(min=0, help="Steps in which a few-shot task is learned (40).")
]
Prototypes = Annotated[
    str, typer.Option(help="Of a few-shot task: moving, refreshed or fixed (moving).")
]
Tune = Annotated[
    list[str] | None,
    typer.Option(help="Another field of how a few-shot task is learned: --tune translate=0.2."),
]


FOR_EPOCHS = ("epochs", "schedule", "record")
FOR_ITERATIONS = ("iterations", "prototypes", "tune")
FOR_TRAININGS = ("epochs", "batch", "schedule", "augment", "seeds", "board")
NOT_FOR_RULES = (
    "batch", "optimizer", "lr", "momentum", "weight_decay", "schedule", "seeds", "board",
    *FOR_ITERATIONS, "meta", "validation_tasks",
)  # fmt: skip
FOR_TASKS = ("ways", "shots", "queries", *FOR_ITERATIONS, "meta", "validation", "validation_tasks")


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
    ways: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Few-shot: a cosine head for so many classes, instead of the last linear layer.",
        ),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="What the method looks at before it selects, as --data.")
    ] = None,
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Decide what to update on a board, and prove that it fits."""
    from modicum.capture import capture
    from modicum.plan import plan as make
    from modicum.units import parse_size

    target, chosen = load_board(board), parse_method(method, set or [])
    trained = parse_optimizer(optimizer, lr, momentum, weight_decay)
    known = parse_choice(loss, "loss", ("cross_entropy", "mse"))
    most_ram, most_flash = (parse_size(text) if text else None for text in (ram, flash))
    check_samples(chosen, samples)
    shape = parse_shape(input or default_input(model))
    few = in_memory(load_samples(samples, lambda: preprocess_of(shape, model, mean, std)))
    net, example = load_model(model, weights, input, classes, chosen, ways)
    graph = capture(net, example)
    made = make(graph, target, chosen, trained, samples=observed(net, graph, chosen, few),
                loss=known, accumulate=accumulate, ram=most_ram, flash=most_flash)  # fmt: skip
    if out is not None:
        made.save(out)
    _show(as_json, {**made.model_dump(mode="json"), "hash": made.hash}, str(made))


@command()
def metatrain(
    model: ModelArg,
    data: Annotated[Path, typer.Option(help="Images to draw tasks from: a folder, a zip, .npz.")],
    out: Annotated[Path, typer.Option(help="The folder of what comes of it; a rerun goes on.")],
    rule: Annotated[
        str,
        typer.Option(
            help="protonet, maml, anil, boil, maml++, reptile or p-meta, with fields: "
            "maml:steps=5,rate=0.1,norms=frozen."
        ),
    ] = "protonet",
    validation: Annotated[
        Path | None, typer.Option(help="Images of other classes, to keep the best epoch by.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Images of yet other classes, to judge the result on.")
    ] = None,
    input: Input = "",
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    ways: Annotated[str, typer.Option(help="Classes of a task: 5, or a range as 5-10.")] = "5",
    shots: Annotated[int, typer.Option(min=1, help="Support images of each class.")] = 5,
    queries: Annotated[int, typer.Option(min=1, help="Query images of each class.")] = 15,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs.")] = 100,
    episodes: Annotated[int, typer.Option(min=1, help="Tasks of an epoch.")] = 2000,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks of an update (protonet 1, others 4).")
    ] = None,
    together: Annotated[int, typer.Option(min=1, help="Tasks computed at once (vmap).")] = 1,
    optimizer: Annotated[
        str, typer.Option(help="Outer optimiser: sgd or adam (protonet and reptile sgd).")
    ] = "",
    rate: Annotated[
        float | None,
        typer.Option(help="Outer rate after the warm-up (protonet 5e-5, reptile 1, others 1e-3)."),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Epochs in which the rate rises (protonet 5, others 0).")
    ] = None,
    augment: Annotated[
        str, typer.Option(help="none, resized or pad, with fields: pad:pad=2,flip=false.")
    ] = "none",
    validation_tasks: Annotated[int, typer.Option(min=1, help="Tasks to validate on.")] = 100,
    test_tasks: Annotated[int, typer.Option(min=1, help="Tasks to judge the result on.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    as_json: Json = False,
) -> None:
    """Train the weights that few-shot tasks start from; torchrun for several processes."""
    from modicum.meta import metatrain as train
    from modicum.tasks import load

    episode = parse_episodes(ways, str(shots), queries)
    given = {"tasks": tasks, "optimizer": optimizer or None, "rate": rate, "warmup": warmup}
    config = parse_metatrain({
        **{key: value for key, value in given.items() if value is not None},
        "rule": parse_rule(rule), "epochs": epochs, "episodes": episodes, "episode": episode,
        "together": together, "augment": parse_augment(augment), "seed": seed,
        "validation": validation_tasks,
    })  # fmt: skip
    shape = parse_shape(input or default_input(model))
    shown = preprocess_of(shape, model, mean, std)
    images, *held = (None if p is None else load(p) for p in (data, validation, test))
    assert images is not None
    net = load_to_metatrain(model, input, weights, config)
    trace = train(net, images, shown, config, out=out, validation=held[0], test=held[1],
                  test_tasks=test_tasks, progress=True)  # fmt: skip
    if is_first_process():
        _show(as_json, {**trace.model_dump(mode="json"), "weights": str(out / "weights.pt")},
              f"{trace}\n{out / 'weights.pt'}: the weights")  # fmt: skip


@command("metatrain-rl")
def metatrain_rl(
    environment: Annotated[
        str, typer.Argument(help="navigation, cheetah-direction or cheetah-velocity.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of what comes of it; a rerun goes on.")],
    rule: Annotated[
        str, typer.Option(help="maml, anil, boil or p-meta, with fields: p-meta:steps=1,share=0.5.")
    ] = "maml:steps=1,rate=0.1",
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Steps of an episode (navigation 100, cheetah 200).")
    ] = None,
    hidden: Annotated[str, typer.Option(help="Sizes of the policy's hidden layers.")] = "100,100",
    std: Annotated[float, typer.Option(help="Deviation of its actions at first.")] = 1.0,
    weights: Annotated[Path | None, typer.Option(help="Weights of a policy to start from.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Updates of the outer rule.")] = 500,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of an update.")] = 20,
    episodes: Annotated[
        int, typer.Option(min=2, help="Episodes of a task, before each inner step and after.")
    ] = 20,
    discount: Annotated[float, typer.Option(min=0, max=1, help="Discount of rewards.")] = 0.99,
    gae: Annotated[float, typer.Option(min=0, max=1, help="Lambda of the advantages.")] = 1.0,
    outer: Annotated[
        list[str] | None,
        typer.Option(help="A field of TRPO, the outer rule: --outer kl=0.02."),
    ] = None,
    test: Annotated[int, typer.Option(min=0, help="Other tasks, to judge the result on.")] = 40,
    updates: Annotated[int, typer.Option(min=1, help="Inner steps when it is judged.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the policy, tasks and episodes.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a policy that a few policy-gradient steps adapt to a task, by MAML or p-Meta."""
    from modicum.meta.rl import metatrain_rl as train

    config = parse_rl({
        "rule": parse_rule(rule), "iterations": iterations, "tasks": tasks, "episodes": episodes,
        "discount": discount, "gae": gae, "test": test, "updates": updates, "seed": seed,
    }, outer or [])  # fmt: skip
    place = parse_environment(environment, horizon)
    policy = make_policy(place, hidden, std, weights, seed)
    made = train(policy, place, config, out=out, progress=True)
    text = f"{made}\n{out / 'returns.svg'}: the returns; {out / 'weights.pt'}: the weights"
    _show(as_json, {**made.as_dict(), "weights": str(out / "weights.pt")}, text)


@command()
def federate(
    case: Annotated[
        str,
        typer.Argument(help="sines, characters or words, or path/to/file.py:function of a Case."),
    ],
    rule: Annotated[
        str,
        typer.Option(
            help="fedavg, reptile, tinyreptile, fedrecon or tinymetafed, with fields: "
            "tinymetafed:top=0.1,local=head.*"
        ),
    ] = "tinymetafed",
    data: Annotated[
        list[Path] | None, typer.Option(help="The case's files; may be given several times.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 100,
    board: Annotated[str, typer.Option(help="A board that a client's plan has to fit.")] = "",
    learner: Annotated[
        str, typer.Option(help="Clients train in the emitted C (native) or in PyTorch (torch).")
    ] = "native",
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Samples (of each class) of a new client (the case's)."),
    ] = None,
    tests: Annotated[int, typer.Option(min=1, help="Samples that it is tested on.")] = 50,
    tasks: Annotated[int, typer.Option(min=1, help="Times that it is.")] = 1,
    judge_every: Annotated[
        int | None, typer.Option(min=0, help="Rounds between tests (a tenth of all); 0: none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, samples and choices.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder of what comes of it; a rerun goes on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let clients learn weights together, in this process, that a new client starts from."""
    import torch

    from modicum.federated.federation import federate as run_all

    of = parse_case(case)
    config = parse_federated(rule, of)
    kind = parse_choice(learner, "learner", ("native", "torch"))
    torch.manual_seed(seed)
    made = run_all(
        of.model(), torch.zeros(1, *of.input), config, of.population(data or (), seed),
        rounds=rounds, board=load_board(board), learner=kind, shots=shots or of.shots,
        tests=tests, tasks=tasks, seed=seed, out=out, progress=True,
        judge_every=max(1, rounds // 10) if judge_every is None else judge_every,
    )  # fmt: skip
    text = str(made) if out is None else f"{made}\n{out}: weights.npz, history.json, curve.svg"
    _show(as_json, made.as_dict(), text)


@command()
def adapt(
    context: typer.Context,
    model: ModelArg,
    plan: PlanFile,
    data: DataFile = None,
    test: TestFile = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples (10).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the samples.")] = 0,
    schedule: Annotated[
        str, typer.Option(help="constant, or cosine: the learning rate falls to 0.")
    ] = "constant",
    record: Annotated[bool, typer.Option(help="Keep the trained slices of every step.")] = False,
    iterations: Iterations = None,
    prototypes: Prototypes = "",
    tune: Tune = None,
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Write the trace here.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the adapted state dict here.")] = None,
    as_json: Json = False,
) -> None:
    """Train in PyTorch under a plan."""
    from modicum.adapt import adapt as train
    from modicum.fewshot import learn_task

    made = load_plan(plan)
    few = is_few_shot(made.graph)
    why = f"does not go with a plan {'for' if few else 'without'} few-shot tasks"
    refuse_flags(context, FOR_EPOCHS if few else FOR_ITERATIONS, why)
    learning = parse_tune(iterations, prototypes, tune or [])
    known = parse_choice(schedule, "schedule", ("constant", "cosine"))
    shown = preprocess_of_plan(lambda: made, model, mean, std)
    samples, held = load_samples(data, shown), load_samples(test, shown, data)
    net = model_of_plan(made, model, weights)
    given = in_memory(samples) or no_data()
    if few:
        queries = in_memory(held)
        trace = learn_task(net, made, given, learning, test=queries, seed=seed, progress=True)
    else:
        trace = train(net, made, given, epochs=epochs, test=held, seed=seed, schedule=known,
                      record=record, progress=True)  # fmt: skip
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
    plan: Annotated[
        list[Path],
        typer.Option("--plan", help="A plan made by `modicum plan`; several make a candidate set."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist or be empty.")],
    name: Annotated[str, typer.Option(help="Prefix of the C symbols.")] = "model",
    data: DataFile = None,
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Write the plan, or several to choose from, as self-contained C99."""
    from modicum.emit import Candidates
    from modicum.emit import emit as write

    plans = [load_plan(path) for path in plan]
    together = Candidates(tuple(plans)) if len(plans) > 1 else None
    samples = load_samples(data, preprocess_of_plan(lambda: plans[0], model, mean, std))
    net = model_of_plan(plans[0], model, weights)
    given: dict[str, Any] = {"plans": plans} if together else {"plan": plans[0]}
    folder = write(net, out=out, name=name, data=in_memory(samples), **given)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    text = f"{folder}: {len(files)} files; try `make -C {folder} check`"
    result: dict[str, Any] = {"folder": str(folder), "name": name, "files": files}
    if together is not None:
        text += f"\n{together}"
        result["candidates"] = together.as_dict()
    _show(as_json, result, text)


def _compare_rules(
    net: Any,
    rules: dict[str, Any],
    data: tuple[Path, Path | None, Path],
    shown: Any,
    config: Any,
    out: Path,
    tasks: int,
    as_json: bool,
) -> None:
    from modicum.meta import Episodes, compare_rules
    from modicum.tasks import load

    parts = [
        None if path is None else Episodes(load(path), shown, config.episode, config.augment)
        for path in data
    ]
    train, validation, test = parts
    assert train is not None and test is not None
    made = compare_rules(
        net, rules, train, test, config, out=out, validation=validation, test_tasks=tasks,
        progress=True,
    )  # fmt: skip
    _show(as_json, made.as_dict(), f"{made}\n{out}: the weights and figures of each rule")


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
    select: Annotated[
        int | None, typer.Option(help="Of a candidate set: the index of the plan to run (0).")
    ] = None,
    support: Annotated[
        Path | None, typer.Option(help="Few-shot: the samples that make prototypes, as --data.")
    ] = None,
    refresh: Annotated[
        int | None,
        typer.Option(help="Training samples between two refreshes of the prototypes, or 0: never."),
    ] = None,
    mean: Mean = "",
    std: Std = "",
    out: Annotated[Path | None, typer.Option(help="Write the trace here.")] = None,
    as_json: Json = False,
) -> None:
    """Build an emitted folder, train on it, and measure.  With --like, also compare."""
    from modicum.run import plan_file
    from modicum.run import run as execute
    from modicum.trace import Trace, compare

    reference = Trace.load(like) if like is not None else None
    shown = preprocess_of_plan(lambda: load_plan(plan_file(folder, select)), None, mean, std)
    trace = execute(
        folder,
        on,
        train=in_memory(load_samples(data, shown)),
        order=reference.order if reference else None,
        test=in_memory(load_samples(test, shown, data or support)),
        support=in_memory(load_samples(support, shown, data)),
        refresh=refresh,
        select=select,
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
    context: typer.Context,
    model: ModelArg,
    data: Annotated[Path, typer.Option(help="Training images: a folder, a zip, or an .npz.")],
    out: Annotated[Path, typer.Option(help="The folder of all results; a rerun goes on there.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, such as full,last:n=3,bias, or JSON files; see `methods`. "
            "With --tasks also none, head and transductive; several if nothing is said."
        ),
    ] = "",
    rules: Annotated[
        str,
        typer.Option(
            help="Rules of `metatrain` in the place of methods, such as "
            "maml:rate=0.1,anil,p-meta: each is meta-trained on --data, judged on --test."
        ),
    ] = "",
    test: Annotated[
        list[Path] | None,
        typer.Option(
            help="Test images; without, a fifth of --data, of each class. With --tasks: "
            "more images to draw tasks from; may be repeated. With --rules: of other classes."
        ),
    ] = None,
    input: Input = "",
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images per update.")] = 8,
    optimizer: Annotated[str, typer.Option(help="sgd or adam (sgd; with --tasks adam).")] = "",
    lr: Annotated[
        str,
        typer.Option(
            help="Learning rate; of several, 0.01,0.1, the best for each method (0.01; "
            "with --tasks 0.001)."
        ),
    ] = "",
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    schedule: Annotated[str, typer.Option(help="cosine or constant.")] = "cosine",
    augment: Annotated[
        str, typer.Option(help="none, resized or pad, with fields: pad:pad=2,flip=false.")
    ] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="So many trainings of each method.")] = 3,
    board: BoardName = "",
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Learn so many few-shot tasks of each set of images.")
    ] = None,
    ways: Annotated[str, typer.Option(help="Classes of a task: 5, or a range.")] = "5-10",
    shots: Annotated[
        str, typer.Option(help="Support images of each class; or various, as in Meta-Dataset.")
    ] = "5",
    queries: Annotated[int, typer.Option(min=1, help="Query images of each class.")] = 10,
    iterations: Iterations = None,
    prototypes: Prototypes = "",
    tune: Tune = None,
    meta: Annotated[
        Path | None, typer.Option(help="Meta-trained weights, to start from as well.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Images to choose rates on; without, a part of the classes of --data."),
    ] = None,
    validation_tasks: Annotated[int, typer.Option(min=1, help="Tasks to choose rates on.")] = 12,
    episodes: Annotated[int, typer.Option(min=1, help="Tasks of an epoch of --rules.")] = 400,
    as_json: Json = False,
) -> None:
    """Train several methods, or rules of meta-learning, alike: accuracy beside memory and work."""
    from modicum.comparison import compare_methods
    from modicum.tasks import load, split

    if not methods and not rules and tasks is not None:
        methods = task_methods(model)
    if bool(methods) == bool(rules):
        raise UsageError("compare what?", hint="--methods full,last:n=3 or --rules maml,p-meta")
    if rules:
        refuse_flags(context, NOT_FOR_RULES, "does not go with --rules")
        if not test or len(test) > 1 or "-" in ways:
            raise UsageError(
                "rules are judged on images of other classes, in tasks of one size",
                hint="--test FOLDER --ways 5",
            )
        rule = parse_episodes(ways, shots, queries)
        shown = preprocess_of(parse_shape(input or default_input(model)), model, mean, std)
        chosen_rules = {spec: parse_rule(spec) for spec in split_methods(rules)}
        config = parse_metatrain({
            "rule": parse_rule("maml"), "epochs": epochs, "episodes": episodes, "episode": rule,
            "augment": parse_augment(augment),
        })  # fmt: skip
        net = load_to_metatrain(model, input, weights, config)
        _compare_rules(net, chosen_rules, (data, validation, test[0]), shown, config, out,
                       tasks or 600, as_json)  # fmt: skip
        return
    refuse_flags(context, ("episodes",), "goes with --rules")
    few, tests = tasks is not None, test or []
    why = f"goes {'without' if few else 'with'} --tasks"
    refuse_flags(context, FOR_TRAININGS if few else FOR_TASKS, why)
    rates = parse_numbers(lr or ("0.001" if few else "0.01"), "--lr")
    kind = optimizer or ("adam" if few else "sgd")
    trained = parse_optimizer(kind, rates[0], momentum, weight_decay)
    if tasks is not None:
        learning = parse_tune(iterations, prototypes, tune or [])
        contenders = parse_contenders(methods, rates, learning)
        drawn = parse_any_episodes(ways, shots, queries)
        shown = preprocess_of(parse_shape(input or default_input(model)), model, mean, std)
        domains = task_domains(data, tests, validation, contenders, drawn)
        nets = few_shot_models(model, input, weights, meta, drawn)
        _compare_on_tasks(nets, contenders, domains, shown, out, tasks=tasks, rule=drawn,
                          optimizer=trained, validation_tasks=validation_tasks,
                          as_json=as_json)  # fmt: skip
        return
    chosen = {spec: parse_method(spec, []) for spec in split_methods(methods)}
    known = parse_choice(schedule, "schedule", ("cosine", "constant"))
    changed, target = parse_augment(augment), load_board(board)
    shape = parse_shape(input or default_input(model))
    train = load(data)
    if len(tests) > 1:
        raise UsageError("several --test go with --tasks", hint="one folder of all test images")
    if tests:
        held = load(tests[0], classes=train.classes)
    else:
        train, held = split(train, (0.8, 0.2), seed=0)
        print(f"{len(train)} images to train, {len(held)} to test, drawn with seed 0 from {data}",
              file=sys.stderr)  # fmt: skip
    classes = None if ":" in model else len(train.classes)
    say_fresh = make_network(model, weights, classes)[1]
    if say_fresh:
        print(say_fresh, file=sys.stderr)
    result = compare_methods(
        lambda: make_network(model, weights, classes)[0],
        chosen,
        train,
        held,
        preprocess_of(shape, model, mean, std),
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


def _compare_on_tasks(
    nets: Any, contenders: Any, domains: Any, shown: Any, out: Path, *, as_json: bool, **more: Any
) -> None:
    from modicum.task_comparison import compare_on_tasks

    tested, chosen_on, said = domains
    if said:
        print(said, file=sys.stderr)
    result = compare_on_tasks(
        nets, contenders, tested, shown, out=out, validation=chosen_on, progress=True, **more
    )
    text = f"{result}\n\n{out / 'tasks.svg'}: accuracy against backward memory"
    _show(as_json, result.as_dict(), text)


@command()
def search(
    model: ModelArg,
    data: Annotated[
        list[Path],
        typer.Option(help="Images to draw validation tasks from; may be repeated."),
    ],
    limit: Annotated[str, typer.Option(help="Backward memory, as the papers count it: 1MiB.")],
    out: Annotated[Path, typer.Option(help="The folder of all results; a rerun goes on there.")],
    input: Input = "",
    mean: Mean = "",
    std: Std = "",
    weights: Weights = None,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of each set of images.")] = 12,
    ways: Annotated[str, typer.Option(help="Classes of a task: 5, or a range as 5-10.")] = "5-10",
    shots: Annotated[
        str, typer.Option(help="Support images of each class; or various, as in Meta-Dataset.")
    ] = "5",
    queries: Annotated[int, typer.Option(min=1, help="Query images of each class.")] = 10,
    iterations: Iterations = None,
    prototypes: Prototypes = "",
    tune: Tune = None,
    optimizer: OptimizerName = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.001,
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Only layers of so many last blocks.")
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="Biases of the last so many layers, twice as many, ...")
    ] = 3,
    generations: Annotated[int, typer.Option(min=1, help="Of 50 schemes each.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the tasks and of the search.")] = 0,
    as_json: Json = False,
) -> None:
    """Find biases and weight slices that gain most under a limit: SparseUpdate's search."""
    from modicum.search import find_scheme

    rule = parse_any_episodes(ways, shots, queries)
    learning = parse_tune(iterations, prototypes, tune or [])
    trained = parse_optimizer(optimizer, lr, momentum, weight_decay)
    shape = parse_shape(input or default_input(model))
    shown = preprocess_of(shape, model, mean, std)
    domains = task_domains(data[0], data[1:], None, {}, rule)[0]
    net = load_few_shot(model, input, weights, rule)
    result = find_scheme(net, domains, shown, limit, out=out, tasks=tasks, rule=rule,
                         tune=learning, optimizer=trained, blocks=blocks, every=every,
                         generations=generations, seed=seed, progress=True)  # fmt: skip
    text = (
        f"{result}\n\n{out / 'sparse_update.json'}: the method, for --method\n"
        f"{out / 'search.svg'}: the gains, layer by layer"
    )
    _show(as_json, result.as_dict(), text)


@command()
def cost(
    plan: PlanFile,
    batch: Annotated[int, typer.Option(help="Samples that pass at once.")] = 1,
    as_json: Json = False,
) -> None:
    """MACs, FLOPs and kept bytes of a plan, by layer and by block."""
    from modicum.accounting import account

    made = account(load_plan(plan), batch)
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

    page = make(load_plan(plan), *(Trace.load(p) for p in traces or []), out=out)
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

    rows = [(n, shape_text(e.input), str(e.classes), e.about) for n, e in MODELS.items()]
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


if __name__ == "__main__":
    main()
