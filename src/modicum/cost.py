"""What a program costs: RAM in all its parts, flash, and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.board import Board
from modicum.graph import Frozen
from modicum.lower import Program, lower_inference, saved_key
from modicum.memory import Placement, lower_bound, persistent_bytes
from modicum.ops.base import Const, Expr, Indices, Kept, Struct, count
from modicum.selection import Slice

# Measured on the emulated boards with the emitted port (gcc 12): the deepest stack of a training
# step from reset on, and .data + .bss outside the arena.  tests/qemu checks both.
MCU_STACK = 1024
# A Linux process: the panels that the vector kernels pack weights into lie on the stack.
LINUX_STACK = 32 * 1024
# Code in bytes, Cortex-M4F, gcc 12 -O2: each kernel linked alone, so what two kernels share counts
# twice; start-up, job runner, state blobs and guards; and one call of the schedule.
KERNEL_CODE = {
    **{"mo_conv2d_forward": 3788, "mo_conv2d_dx": 3112, "mo_conv2d_dw": 3876},
    **{"mo_depthwise_forward": 3168, "mo_depthwise_dx": 3656, "mo_depthwise_dw": 3496},
    **{"mo_affine_forward": 136, "mo_affine_dx": 92, "mo_affine_dgamma": 128, "mo_bias_grad": 80},
    **{"mo_clamp_forward": 52, "mo_clamp_backward": 64, "mo_mask_pack": 488},
    **{"mo_mask_backward": 212, "mo_maxpool_forward": 504, "mo_maxpool_backward": 448},
    **{"mo_avgpool_forward": 800, "mo_avgpool_backward": 752},
    **{"mo_adaptive_avgpool_forward": 564, "mo_adaptive_avgpool_backward": 492},
    **{"mo_add": 60, "mo_copy_blocks": 416, "mo_gather": 68, "mo_transpose": 56},
    **{"mo_assemble": 480, "mo_cross_entropy": 736, "mo_mse": 68},
    **{"mo_sgd": 36, "mo_momentum": 52, "mo_adam": 124, "mo_adam_counted": 244, "memset": 160},
    **{"mo_sign_pack": 700, "mo_sign_backward": 240},
    **{"mo_hardswish_forward": 92, "mo_hardswish_backward": 96},
    **{"mo_hardsigmoid_forward": 84, "mo_hardsigmoid_backward": 260},
    **{"mo_sigmoid_forward": 308, "mo_sigmoid_backward": 236},
    **{"mo_silu_forward": 324, "mo_silu_backward": 336, "mo_mul": 240, "mo_mul_dgate": 84},
    **{"mo_batch_norm_forward": 356, "mo_batch_norm_follow": 148, "mo_batch_norm_dx": 212},
    **{
        "mo_group_norm_forward": 444,
        "mo_group_norm_dx": 384,
        "mo_group_norm_dgamma": 192,
        "mo_norm_dgamma_start": 156,
    },
    **{"mo_magnitudes": 84, "mo_gates": 1100, "mo_gather_gated": 240, "mo_gated_dw": 4140},
    **{"mo_gated_bias_grad": 252, "mo_gated_step": 480},
    **{"mo_cosine_forward": 212, "mo_cosine_dx": 368, "mo_prototype_add": 144, "mo_fisher": 132},
    **{"mo_norm_dw_rows": 132, "mo_norm_dw_channels": 128},
    **{"mo_standardise": 224, "mo_standardise_dw": 296},
    **{"mo_resize_nearest_forward": 360, "mo_resize_nearest_backward": 624},
    **{"mo_resize_bilinear_forward": 416, "mo_resize_bilinear_backward": 648},
}
CODE_BASE = 7 * 1024
CALL_BYTES = 32


class LayerCost(Frozen):
    """One node of the prepared graph: what is trained, what is kept and why, and its MACs.

    `others` are the (forward, backward) operations beside MACs, such as a norm's or an
    activation's.
    """

    name: str
    op: str
    module: str
    shape: tuple[int, ...]
    trained: tuple[str, ...] = ()
    kept: tuple[tuple[str, int, str], ...] = ()  # kind, bytes, why
    macs_forward: int = 0
    macs_dx: int = 0
    macs_dw: int = 0
    others: tuple[int, int] = (0, 0)

    @property
    def flops(self) -> tuple[int, int]:
        """(forward, backward): 2 for a MAC, 1 for each other operation."""
        backward = 2 * (self.macs_dx + self.macs_dw) + self.others[1]
        return 2 * self.macs_forward + self.others[0], backward


class StepCost(Frozen):
    """One inner step: its pattern (an index), the layers that it trains, and what it needs.

    saved: bytes kept from the forward to the backward pass; dynamic: the arena without what is
    persistent; macs_look: of the pass before it in which channels are chosen, forward and backward.
    The last step of a plan stands for all later ones.
    """

    step: int
    pattern: int
    trains: tuple[str, ...]
    saved: int
    dynamic: int
    macs_backward: int
    macs_look: int = 0


class Cost(Frozen):
    """Bytes, MACs and other operations of one training step with batch 1.

    Where inner steps differ in what they update, each figure is that of the step with the most.

    floor: live bytes of inference alone, which no selection goes below; lower_bound: the most
    bytes live at once; arena: what was placed, persistent part (trained weights, optimiser
    state, accumulated gradients) included; static: .data and .bss beside the arena; ram: arena +
    static + stack.  saved: bytes kept from the forward to the backward pass.  flash: frozen
    weights, initial values of the trained ones, and an estimate of the code.  macs_look: of the
    pass before a step in which attention chooses channels; the others are of the step itself.
    """

    floor: int
    floor_at: str
    lower_bound: int
    arena: int
    saved: int
    trained_params: int
    trained_bytes: int
    optimizer_bytes: int
    accumulator_bytes: int
    static: int
    stack: int
    ram: int
    flash_weights: int
    flash_code: int
    flash: int
    upload: int
    macs_forward: int
    macs_backward: int
    others_forward: int
    others_backward: int
    macs_look: int = 0

    @property
    def flops_forward(self) -> int:
        """2 for a MAC, 1 for each other operation."""
        return 2 * self.macs_forward + self.others_forward

    @property
    def flops_backward(self) -> int:
        return 2 * self.macs_backward + self.others_backward


def cost(program: Program, placement: Placement, board: Board | None) -> Cost:
    return worst_cost([(program, placement)], board)


def worst_cost(
    placed: Sequence[tuple[Program, Placement]],
    board: Board | None,
    looking: Sequence[tuple[Program, Placement] | None] = (),
) -> Cost:
    """Of the programs of one plan together: each figure is that of the program with the most.

    `looking` are the programs of the first passes of those in which channels are chosen.
    """
    first = [look for look in looking if look]
    programs, placements = [p for p, _ in placed], [at for _, at in (*placed, *first)]
    program, arena = programs[0], max(at.arena for at in placements)
    inference = lower_inference(program.graph)
    by_kind = {kind: 0 for kind in ("weight", "optimizer", "accumulator")}
    for buffer in program.buffers.values():
        if buffer.kind in by_kind:
            by_kind[buffer.kind] += buffer.bytes
    linux = board is not None and board.kind == "linux"
    static = static_bytes(program, arena)
    stack = LINUX_STACK if linux else MCU_STACK
    weights, code = flash(*programs, *(p for p, _ in first))
    trained = sum(t.size for t in program.trained)
    return Cost(
        floor=lower_bound(inference),
        floor_at=_peak_node(inference),
        lower_bound=max(at.lower_bound for at in placements),
        arena=arena,
        saved=max(p.saved_bytes for p in programs),
        trained_params=trained,
        trained_bytes=by_kind["weight"],
        optimizer_bytes=by_kind["optimizer"],
        accumulator_bytes=by_kind["accumulator"],
        static=static,
        stack=stack,
        ram=arena + static + stack,
        flash_weights=weights,
        flash_code=code,
        flash=weights + code,
        upload=4 * sum(t.size for t in program.learned),
        macs_forward=sum(m.forward for m in program.macs.values()),
        macs_backward=max(map(_macs_backward, programs)),
        others_forward=max(sum(m.others[0] for m in p.macs.values()) for p in programs),
        others_backward=max(sum(m.others[1] for m in p.macs.values()) for p in programs),
        macs_look=max((_macs(p) for p, _ in first), default=0),
    )


def _macs_backward(program: Program) -> int:
    return sum(m.dx + m.dw for m in program.macs.values())


def _macs(program: Program) -> int:
    return sum(m.forward for m in program.macs.values()) + _macs_backward(program)


def step_costs(
    placed: Sequence[tuple[Program, Placement]],
    looking: Sequence[tuple[Program, Placement] | None],
) -> tuple[StepCost, ...]:
    """One row per inner step, from the programs of a plan."""
    rows = {}
    for pattern, ((program, at), look) in enumerate(zip(placed, looking, strict=True)):
        both = [(program, at), *([look] if look else [])]
        trains = tuple(n.name for n in program.graph.nodes if program.wanted[n.name].params)
        for step in program.inner:
            rows[step] = StepCost(
                step=step,
                pattern=pattern,
                trains=trains,
                saved=program.saved_bytes,
                dynamic=max(to.arena - persistent_bytes(p, to.offsets) for p, to in both),
                macs_backward=_macs_backward(program),
                macs_look=_macs(look[0]) if look else 0,
            )
    return tuple(rows[step] for step in sorted(rows))


def static_bytes(program: Program, arena: int) -> int:
    """.data + .bss beside the arena, as the emitted job runner has them.

    The net's struct has a head of 32 bytes and is rounded up to 16; the runner keeps a guard of 16
    behind it, and room for one sample's outputs and targets.
    """
    outputs = program.graph.values[program.graph.output].size
    targets = outputs if program.loss == "mse" else 0
    runner = -(-(8 + 4 * (outputs + targets)) // 8) * 8
    return 32 + -arena % 16 + 16 + runner


def flash(*programs: Program) -> tuple[int, int]:
    """(bytes of constant data, estimate of the code's bytes); what several have in common once."""
    calls = [call for p in programs for step in p.steps for call in step.calls]
    params = {name: param for p in programs for name, param in p.graph.params.items()}
    args = {a for call in calls for a in call.args if _constant(a)}
    data = 0
    for a in args:
        if isinstance(a, Const):
            param = params[a.param]
            data += 4 * count(a.channels, param.shape[0]) * (param.size // param.shape[0])
        elif isinstance(a, Indices) and a.channels is not None:
            data += 2 * len(a.channels)
        elif isinstance(a, Struct):
            data += 4 * len(a.fields)
    tables = {a.table for call in calls for a in call.args if isinstance(a, Expr) and a.table}
    data += sum(4 * len(table.values) for table in tables)
    initial = {(t.param, t.layout, t.slice): 4 * t.size for p in programs for t in p.learned}
    frozen = {(a.param, a.layout, Slice()) for a in args if isinstance(a, Const) and not a.channels}
    data += sum(n for key, n in initial.items() if key not in frozen)
    calls += [p.refresh for p in programs if p.refresh is not None]
    kernels = {call.fn for call in calls}
    code = CODE_BASE + sum(KERNEL_CODE[k] for k in kernels) + CALL_BYTES * len(calls)
    return data, code


def _constant(a: object) -> bool:
    return isinstance(a, Const | Indices | Struct)


def _peak_node(program: Program) -> str:
    from modicum.memory import live_bytes

    live = live_bytes(program)
    return program.steps[live.index(max(live))].node


def layer_costs(program: Program) -> tuple[LayerCost, ...]:
    """One row per node of the prepared graph, in order; a thing kept is listed once."""
    rows, seen = [], set()
    for node in program.graph.nodes:
        kept = []
        for k in program.kept[node.name]:
            key = saved_key(program.graph, node, k)
            shared = key in seen
            seen.add(key)
            kept.append((k.kind, 0 if shared else k.bytes, _why(k, shared)))
        macs = program.macs[node.name]
        slices = program.wanted[node.name].params
        rows.append(
            LayerCost(
                name=node.name,
                op=node.op,
                module=node.module,
                shape=program.graph.shape(node.name),
                trained=tuple(
                    f"{role}{_describe(s, program.graph.params[node.params[role]].shape)}"
                    for role, s in slices.items()
                ),
                kept=tuple(kept),
                macs_forward=macs.forward,
                macs_dx=macs.dx,
                macs_dw=macs.dw,
                others=macs.others,
            )
        )
    return tuple(rows)


def _why(k: Kept, shared: bool) -> str:
    return f"{k.why} (counted above)" if shared else k.why


def _describe(s: Slice, shape: tuple[int, ...]) -> str:
    parts = []
    if s.out is not None:
        parts.append(f"{len(s.out)}/{shape[0]} out")
    if s.inp is not None:
        parts.append(f"{len(s.inp)}/{shape[1]} in")
    return f"[{', '.join(parts)}]" if parts else ""
