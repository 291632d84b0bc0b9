"""The generated C files of a folder: of a plan, whatever its patterns, or of a candidate set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modicum.emit.candidates import Candidates
from modicum.emit.constants import Constants
from modicum.emit.schedule import Schedule
from modicum.graph import Graph
from modicum.plan import Plan
from modicum.state import Array
from modicum.units import kib

API = ("init", "input", "predict", "train", "export_state", "import_state", "trained", "size",
       "error")  # fmt: skip
PROTOTYPES = ("prototypes_clear", "prototypes_add")
SELECT = ("select", "selected")
STEPS = ("steps_clear",)
ATTEND = ("attend",)


def one_plan(plan: Plan, name: str, values: Mapping[str, Array]) -> dict[str, str]:
    """Files by name; `values` are the parameters of the prepared graph."""
    if len(plan.patterns) > 1 or plan.attends:
        return _by_pattern(plan, name, values)
    constants = Constants(name, values, _symbols(plan, name, ()))
    schedule = Schedule(plan, constants)
    common = _common(plan, name, [schedule])
    tables = constants.table_definitions("static const")
    header, definitions = _weights(name, constants)
    parts = {"part": "whole", "many": False, "s": schedule, "tables": tables}
    return {
        f"{name}.h": render("net.h.j2", **common, members=()),
        f"{name}.c": render("net.c.j2", **common, **parts),
        f"{name}_weights.h": header,
        f"{name}_weights.c": definitions,
        "net.h": _shim(plan, name, ()),
        "README.md": _readme(common, (), plan.cost.flash_weights),
    }


def _by_pattern(plan: Plan, name: str, values: Mapping[str, Array]) -> dict[str, str]:
    """A schedule for each pattern, and for each first pass, in a file of its own; the net goes from
    one to the next."""
    patterns = [f"{name}_pattern{i}" for i in range(len(plan.patterns))]
    constants = Constants(name, values, _symbols(plan, name, ()), shared=True)
    schedules = [Schedule(plan, constants, i) for i in range(len(patterns))]
    common = _common(plan, name, schedules)
    looks = {
        i: (f"{name}_look{i}", Schedule(plan, constants, i, look=True))
        for i, look in enumerate(plan.looks)
        if look is not None
    }
    header, definitions = _weights(name, constants, tables=True)
    steps = [plan.pattern_of(step) for step in range(plan.inner_steps)]
    parts = {
        **{"part": "net", "many": False, "s": schedules[0], "names": [patterns[i] for i in steps]},
        "looks": [looks[i][0] if i in looks else None for i in steps],
    }
    files = {
        f"{name}.h": render("net.h.j2", **common, members=()),
        f"{name}.c": render("patterns.c.j2", **common, **parts),
        f"{name}_weights.h": header,
        f"{name}_weights.c": definitions,
        "net.h": _shim(plan, name, ()),
        "README.md": _readme(common, (), plan.cost.flash_weights),
    }
    files |= _schedules(
        "pattern", common, patterns, schedules, [name for name, _ in looks.values()]
    )
    for i, (symbol, s) in looks.items():
        files[f"{symbol}.c"] = _schedule("pattern", common, symbol, i, s)
    return files


def _schedules(
    part: str,
    common: dict[str, Any],
    names: Sequence[str],
    schedules: Sequence[Schedule],
    others: Sequence[str] = (),
) -> dict[str, str]:
    """The files of members or patterns, and the header that they share with `others`."""
    header = f"{common['net']}_{part}s.h"
    declared = ", ".join([*names, *others])
    files = {header: render("members.h.j2", **common, part=part, names=declared)}
    for i, (name, s) in enumerate(zip(names, schedules, strict=True)):
        files[f"{name}.c"] = _schedule(part, common, name, i, s)
    return files


def _schedule(part: str, common: dict[str, Any], symbol: str, index: int, s: Schedule) -> str:
    more = {"plan": s.plan, "part": part, "symbol": symbol, "index": index, "s": s}
    return render("member.c.j2", **{**common, **more})


def candidate_set(candidates: Candidates, name: str, values: Mapping[str, Array]) -> dict[str, str]:
    """Files by name; `values` are the parameters of all prepared graphs."""
    plans = candidates.plans
    members = [f"{name}_member{i}" for i in range(len(plans))]
    constants = Constants(name, values, _symbols(plans[0], name, plans), shared=True)
    schedules = [Schedule(p, constants) for p in plans]
    common = _common(plans[0], name, schedules)
    header, definitions = _weights(name, constants, tables=True)
    parts = {"part": "set", "many": True, "hash": candidates.hash, "names": members}
    files = {
        f"{name}.h": render("net.h.j2", **common, members=plans),
        f"{name}.c": render("set.c.j2", **common, **parts),
        f"{name}_weights.h": header,
        f"{name}_weights.c": definitions,
        "net.h": _shim(plans[0], name, plans),
        "README.md": _readme(common, plans, candidates.flash_weights),
    }
    return {**files, **_schedules("member", common, members, schedules)}


def functions(plan: Plan, members: Sequence[Plan]) -> tuple[str, ...]:
    """What the header declares, without the prefix."""
    refreshed = PROTOTYPES if plan.program.refresh is not None else ()
    counted = STEPS if _paced(plan) else ()
    attending = ATTEND if plan.attends else ()
    return (*API, *refreshed, *counted, *attending, *(SELECT if members else ()))


def _paced(plan: Plan) -> bool:
    """Whether a task has a beginning that the net has to be told of."""
    return plan.inner_steps > 1 or plan.attends


def _symbols(plan: Plan, name: str, members: Sequence[Plan]) -> list[str]:
    more = [f"member{i}" for i in range(len(members))]
    more += [f"{part}{i}" for i in range(len(plan.patterns)) for part in ("pattern", "look")]
    words = ("t", "member_t", "pattern_t", *functions(plan, members), *more)
    return [f"{name}_{word}" for word in words]


def _common(plan: Plan, name: str, schedules: Sequence[Schedule]) -> dict[str, Any]:
    """What all templates may use."""
    graph, mse = plan.graph, plan.loss == "mse"
    outputs = graph.values[graph.output].size
    last = plan.inner_steps - 1
    return {
        "net": name,
        "NET": name.upper(),
        "plan": plan,
        "inputs": graph.values[graph.input].size,
        "outputs": outputs,
        "targets": outputs if mse else 0,
        "mse": mse,
        "target": "const float *target" if mse else "int32_t label",
        "prototypes": plan.program.refresh is not None,
        "image_order": _image_order(graph),
        "arena": max(s.plan.cost.arena for s in schedules),
        "learned": max(s.learned for s in schedules),
        "learned_floats": max(s.learned_floats for s in schedules),
        "inner_steps": plan.inner_steps,
        "inner": f"m->progress.steps < {last}u ? m->progress.steps : {last}u" if last else "0u",
        "attends": plan.attends,
        "paced": _paced(plan),
        "forget": _paced(plan) and schedules[0].forget,
    }


def _weights(name: str, constants: Constants, tables: bool = False) -> tuple[str, str]:
    """(header, definitions) of the constants, and with `tables` of the geometry."""
    guard = f"{name.upper()}_WEIGHTS_H"
    declared, defined = constants.declarations(), constants.definitions()
    if tables:
        declared = f'#include "mo_kernels.h"\n\n{declared}\n{constants.table_declarations()}'
        defined += "\n" + constants.table_definitions("const")
    header = f"#ifndef {guard}\n#define {guard}\n\n{declared}\n\n#endif\n"
    return header, f'#include "{name}_weights.h"\n\n{defined}'


def _shim(plan: Plan, name: str, members: Sequence[Plan]) -> str:
    """net.h: the generic names that the port uses."""
    macros = ("INPUTS", "OUTPUTS", "TARGETS", "ARENA", "STATE")
    lines = ["/* The generic names that the port uses, mapped to those of this net. */"]
    lines += ["#ifndef NET_H", "#define NET_H", "", f'#include "{name}.h"', ""]
    lines += [f"#define MO_NET_{x} {name.upper()}_{x}" for x in macros]
    lines += [f"#define MO_NET_MEMBERS {len(members)} /* 0: one plan, nothing to select */"]
    lines += [f"#define MO_NET_PROTOTYPES {int(plan.program.refresh is not None)}"]
    lines += [f"#define MO_NET_ATTEND {plan.accumulate if plan.attends else 0} /* samples */"]
    if _paced(plan):
        lines.append(f"#define MO_NET_INNER_STEPS {name.upper()}_INNER_STEPS")
    names = ("t", *(f for f in functions(plan, members) if f != "size"))
    lines += [f"#define mo_net_{x} {name}_{x}" for x in names]
    return "\n".join([*lines, "", "#endif", ""])


def _readme(common: dict[str, Any], members: Sequence[Plan], weights: int) -> str:
    worst = max(members, key=lambda p: p.cost.arena, default=common["plan"])
    sizes = {
        "arena": kib(worst.cost.arena),
        "stack": kib(worst.cost.stack),
        "weights": kib(weights),
        "target": "target" if common["mse"] else "label",
    }
    return render("readme.md.j2", **{**common, **sizes, "members": members})


def _image_order(graph: Graph) -> str:
    shape = graph.shape(graph.input)
    return f", [{shape[2]}][{shape[3]}][{shape[1]}]" if len(shape) == 4 else ""


def render(template: str, **values: object) -> str:
    """A template of this package, filled in; an unknown name in it is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("modicum.emit", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # C and Markdown, not HTML
    )
    return environment.get_template(template).render(**values)
