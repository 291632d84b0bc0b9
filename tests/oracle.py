"""PyTorch's own autograd as the judge of what modicum computes and keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.apply import Tuned, _slot
from modicum.graph import Graph, Node
from modicum.heads import cosine_logits
from modicum.plan import Plan
from modicum.selection import Selection, Slice


class GraphModel(nn.Module):
    """A graph in plain torch.nn.functional, with random weights."""

    def __init__(self, graph: Graph, seed: int = 0) -> None:
        super().__init__()
        self.graph = graph
        for name, param in graph.params.items():
            *path, role = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            value = torch.zeros(param.shape)
            if param.trainable:
                owner.register_parameter(role, nn.Parameter(value))
            else:
                owner.register_buffer(role, value)
        randomise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return run_graph(self.graph, self, x, Selection(updates=()))


def run_graph(graph: Graph, model: nn.Module, x: Tensor, selection: Selection) -> Tensor:
    """The graph with the model's parameters, and the selection's norms and activations."""
    return run_values(graph, model, x, selection)[graph.output]


def run_values(
    graph: Graph, model: nn.Module, x: Tensor, selection: Selection
) -> dict[str, Tensor]:
    """All values of the graph by name."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {graph.input: x}
    for node in graph.nodes:
        inputs = [values[v] for v in node.inputs]
        params = {role: state[name] for role, name in node.params.items()}
        batch, sign = node.name in selection.batch_norms, node.name in selection.sign
        values[node.name] = run_node(node, inputs, params, batch, sign)
    return values


class SignMask(torch.autograd.Function):
    """The identity on the activation's output; its gradient g * 1[a >= 0] goes to its input a."""

    @staticmethod
    def forward(ctx, a: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return y.clone()

    @staticmethod
    def backward(ctx, g: Tensor):
        return g * (ctx.saved_tensors[0] >= 0), None


def run_node(
    node: Node, x: list[Tensor], p: Mapping[str, Tensor], batch: bool = False, sign: bool = False
) -> Tensor:
    a = node.attrs
    if sign:
        return SignMask.apply(x[0], run_node(node, [x[0].detach()], p))
    match node.op:
        case "hardswish":
            return F.hardswish(x[0])
        case "hardsigmoid":
            if x[0].dtype == torch.float32:
                return F.hardsigmoid(x[0])
            return F.relu6(x[0] + 3.0) / 6.0  # PyTorch's double one divides by a float 6
        case "sigmoid":
            return torch.sigmoid(x[0])
        case "silu":
            return F.silu(x[0])
        case "mul":
            return x[0] * x[1]
        case "group_norm":
            return F.group_norm(x[0], a["groups"], p.get("weight"), p.get("bias"), a["eps"])
        case "resize":
            scales = any(a["scales"])
            how = {"scale_factor": a["scales"]} if scales else {"size": a["size"]}
            align = a["align"] if a["mode"] == "bilinear" else None
            return F.interpolate(x[0], **how, mode=a["mode"], align_corners=align)
        case "conv2d":
            top, left, bottom, right = a["padding"]
            if (top, left) == (bottom, right):
                padding, image = (top, left), x[0]
            else:
                padding, image = (0, 0), F.pad(x[0], (left, right, top, bottom))
            w = p["weight"]
            if "standardise" in a:
                w = F.layer_norm(w, w.shape[1:], None, None, a["standardise"])
            return F.conv2d(
                image, w, p.get("bias"), a["stride"], padding, a["dilation"], a["groups"]
            )
        case "linear":
            return F.linear(x[0], p["weight"], p.get("bias"))
        case "cosine":
            if torch.compiler.is_compiling():  # as capture knows it
                return cosine_logits(x[0], p["prototypes"], p["scale"], p["bias"])
            similar = F.cosine_similarity(x[0][:, None], p["prototypes"], dim=-1)
            return p["scale"] * (similar + p["bias"])
        case "batch_norm":
            norm = (p["mean"], p["var"], p.get("weight"), p.get("bias"))
            if batch:
                return F.batch_norm(x[0], *norm, True, a["momentum"], a["eps"])
            return F.batch_norm(x[0], *norm, training=False, eps=a["eps"])
        case "clamp":
            if a["hi"] is None:
                return F.relu(x[0])
            return F.hardtanh(x[0], a["lo"], a["hi"])
        case "max_pool2d":
            window = (a["kernel"], a["stride"], a["pad"], a["dilation"], a["ceil"])
            return F.max_pool2d(x[0], *window)
        case "avg_pool2d":
            window = (a["kernel"], a["stride"], a["pad"], a["ceil"], a["include_pad"])
            return F.avg_pool2d(x[0], *window, a["divisor"] or None)
        case "adaptive_avg_pool2d":
            return F.adaptive_avg_pool2d(x[0], a["size"])
        case "add":
            return x[0] + x[1]
        case "concat":
            return torch.cat(x, a["dim"])
        case "reshape":
            return x[0].reshape(x[0].shape[0], *a["shape"][1:])
    raise NotImplementedError(node.op)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, shifts, scales of either sign and statistics; deterministic."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not t.is_floating_point():
                continue
            role = name.rpartition(".")[2]
            noise = torch.randn(t.shape, generator=g)
            if role.endswith("var"):
                t.copy_(0.5 + noise.abs())
            elif t.dim() > 1:
                t.copy_(noise * (1.5 / t[0].numel()) ** 0.5)
            elif role == "weight":
                t.copy_((1.0 + 0.3 * noise) * torch.where(noise > 1.0, -1.0, 1.0))
            else:
                t.copy_(0.3 * noise)
    return model.eval()


def samples(graph: Graph, loss: str, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs, and labels or targets."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *graph.shape(graph.input)[1:], generator=g)
    outputs = graph.values[graph.output].size
    if loss == "mse":
        return x, torch.randn(n, outputs, generator=g)
    return x, torch.arange(n) % outputs


def total_loss(loss: str, output: Tensor, y: Tensor) -> Tensor:
    """The sum of the samples' losses."""
    if loss == "mse":
        error = (output.flatten(1) - y.to(output.dtype)) ** 2
        return error.mean(1).sum()
    return F.cross_entropy(output, y, reduction="sum")


def autograd_gradients(model: nn.Module, plan: Plan, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """In double precision, on the original model; each cut to the slice that the plan trains."""
    net = copy.deepcopy(model).double().eval()
    params = dict(net.named_parameters())
    names = [u.param for u in plan.selection.updates]
    for name, p in params.items():
        p.requires_grad_(name in names)
    if plan.selection.batch_norms or plan.selection.sign:
        output = run_graph(plan.graph, net, x.double(), plan.selection)
    else:
        output = net(x.double())
    total_loss(plan.loss, output, y).backward()
    return {
        u.param: cut(gradient(params[u.param]), u.slice).detach() for u in plan.selection.updates
    }


def tuned_gradients(tuned: Tuned, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    tuned.zero_grad()
    total_loss(tuned.plan.loss, tuned(x), y).backward()
    return {name: gradient(p).clone() for name, p in tuned.trained.items()}


def gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def in_double(tuned: Tuned, model: nn.Module) -> Tuned:
    """`tuned` in double precision, its folded weights computed again from the equations."""
    tuned = copy.deepcopy(tuned).double()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    buffers = dict(tuned.named_buffers())
    with torch.no_grad():
        for param in tuned.plan.program.graph.params.values():
            if param.derived is not None and _slot(param.name) in buffers:
                wide = {r: state[n].double() for r, n in param.derived.sources.items()}
                value = derived(param.derived.kind, param.derived.eps, param.derived.fill, wide)
                buffers[_slot(param.name)].copy_(value)
    return tuned


def derived(kind: str, eps: float, fill: float, s: Mapping[str, Tensor]) -> Tensor:
    if kind == "full":
        return torch.tensor(fill, dtype=torch.float64)
    if kind == "standardise":
        var, mean = torch.var_mean(s["weight"], (1, 2, 3), correction=0, keepdim=True)
        return (s["weight"] - mean) / (var + eps).sqrt()
    scale = s.get("bn_weight", torch.ones(())) / (s["bn_var"] + eps).sqrt()
    if kind == "rstd":
        return 1.0 / (s["bn_var"] + eps).sqrt()
    if kind == "fold_weight":
        return torch.einsum("o...,o->o...", s["weight"], scale.double())
    shift = s.get("bias", torch.zeros(())) - s["bn_mean"]
    return s.get("bn_bias", torch.zeros(())) + shift * scale


def cut(t: Tensor, s: Slice) -> Tensor:
    if s.out is not None:
        t = t[list(s.out)]
    return t if s.inp is None else t[:, list(s.inp)]


def difference(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], floor: float = 1e-6
) -> tuple[float, str]:
    """The largest difference relative to the tensor's largest magnitude, and where."""
    assert a.keys() == b.keys()
    worst = (0.0, "")
    for name, p in a.items():
        q = b[name]
        assert p.shape == q.shape, name
        scale = max(float(p.abs().max()), float(q.abs().max()), floor)
        worst = max(worst, (float((p.double() - q.double()).abs().max()) / scale, name))
    return worst


def kept_bytes(plan: Plan, step: int | None = None) -> int:
    """What autograd has to keep in an inner step, by default in one that needs most memory.

    Not statistics that only follow the batch, and a value and its reshape once: in C a reshape
    of an image moves its elements, in PyTorch it does not.
    """
    found: dict[tuple[str, str], int] = {}
    program = plan.program if step is None else plan.programs[plan.pattern_of(step)]
    for node in program.graph.nodes:
        for k in program.kept[node.name]:
            value = k.value
            while (by := program.graph.by_name.get(value)) and by.op in ("reshape", "probe"):
                value = by.inputs[0]
            if k.kind != "stats" or program.wanted[node.name].any:
                found[("value", value) if k.kind == "value" else (k.kind, node.name)] = k.bytes
    return sum(found.values())


def held_bytes(tuned: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that autograd keeps between the passes, parameters not counted."""
    own = [*tuned.parameters(), *tuned.buffers()]
    excluded = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # the reference keeps the address taken
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = tuned(x)
    held = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in excluded)
    assert output.requires_grad
    return held
