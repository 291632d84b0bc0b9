"""What other projects call the modules of our networks: one mapping per source of weights.

A mapping is {their module: our module}; what lies below a module (weight, bias, running_mean,
running_var) is called the same by all.  A name is made from the net's structure, never from the
order of a file's entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from modicum.errors import InvalidInput, UsageError
from modicum.models.inverted_residual import Backbone, InvertedResidual
from modicum.models.mobile import EfficientNetLite0, MobileNetV2, MobileNetV3, ProxylessMobile

Names = Iterator[tuple[str, str]]


def names(net: Backbone, source: str) -> dict[str, str]:
    """Return {their module: our module} for every module of `net` that has parameters.

    Raises InvalidInput where `source` has no such net.

    >>> names(MobileNetV2(10), "timm")["blocks.2.0.conv_pw"]
    'blocks.3.expand.conv'
    """
    if source not in SOURCES:
        raise UsageError(f"no source of weights is called {source!r}", hint=", ".join(SOURCES))
    if not isinstance(net, SOURCES[source].nets):
        known = [name for name, other in SOURCES.items() if isinstance(net, other.nets)]
        raise InvalidInput(
            f"there are no weights of {source} for {type(net).__name__}",
            hint=f"{type(net).__name__} loads weights of {', '.join(known)}",
        )
    return dict(SOURCES[source].mapping(net))


def _torchvision(net: Backbone) -> Names:
    """features.I.conv.J (V2) or features.I.block.J (V3): J counts the parts of a block."""
    v3 = isinstance(net, MobileNetV3)
    yield from _pair("features.0.0", "features.0.1", "stem")
    for i, block in _blocks(net):
        theirs = f"features.{i + 1}.{'block' if v3 else 'conv'}"
        for j, (part, _) in enumerate(block.named_children()):
            ours = f"blocks.{i}.{part}"
            if part == "se":
                yield f"{theirs}.{j}.fc1", f"{ours}.reduce"
                yield f"{theirs}.{j}.fc2", f"{ours}.expand"
            elif part == "project" and not v3:
                yield from _pair(f"{theirs}.{j}", f"{theirs}.{j + 1}", ours)
            else:
                yield from _pair(f"{theirs}.{j}.0", f"{theirs}.{j}.1", ours)
    mix = f"features.{len(net.blocks) + 1}"
    yield from _pair(f"{mix}.0", f"{mix}.1", "mix")
    if v3:
        yield "classifier.0", "hidden.linear"
    yield ("classifier.3" if v3 else "classifier.1"), "classifier"


TIMM_EXPANDED = {
    "expand": ("conv_pw", "bn1"),
    "depthwise": ("conv_dw", "bn2"),
    "project": ("conv_pwl", "bn3"),
}
TIMM_SEPARABLE = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}


def _timm(net: Backbone) -> Names:
    """blocks.STAGE.BLOCK; in V3 our mix is one more stage and our hidden layer is conv_head."""
    yield from _pair("conv_stem", "bn1", "stem")
    places = [(stage, b) for stage, count in enumerate(net.stages) for b in range(count)]
    for (i, block), (stage, b) in zip(_blocks(net), places, strict=True):
        theirs, ours = f"blocks.{stage}.{b}", f"blocks.{i}"
        parts = TIMM_EXPANDED if hasattr(block, "expand") else TIMM_SEPARABLE
        for part, (conv, norm) in parts.items():
            yield from _pair(f"{theirs}.{conv}", f"{theirs}.{norm}", f"{ours}.{part}")
        if hasattr(block, "se"):
            yield f"{theirs}.se.conv_reduce", f"{ours}.se.reduce"
            yield f"{theirs}.se.conv_expand", f"{ours}.se.expand"
    if isinstance(net, MobileNetV3):
        mix = f"blocks.{len(net.stages)}.0"
        yield from _pair(f"{mix}.conv", f"{mix}.bn1", "mix")
        yield "conv_head", "hidden.linear"
    else:
        yield from _pair("conv_head", "bn2", "mix")
    yield "classifier", "classifier"


LITE = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


def _lite(net: Backbone) -> Names:
    yield from _pair("_conv_stem", "_bn0", "stem")
    for i, block in _blocks(net):
        for part, _ in block.named_children():
            conv, norm = LITE[part]
            yield from _pair(f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}", f"blocks.{i}.{part}")
    yield from _pair("_conv_head", "_bn1", "mix")
    yield "_fc", "classifier"


PROXYLESS = {
    "expand": "inverted_bottleneck",
    "depthwise": "depth_conv",
    "project": "point_linear",
}


def _proxyless(net: Backbone) -> Names:
    """blocks.I.mobile_inverted_conv; I also counts the two blocks that the search left empty."""
    yield from _pair("first_conv.conv", "first_conv.bn", "stem")
    for i, block in _blocks(net):
        number = i if i < 3 else i + 2
        for part, _ in block.named_children():
            theirs = f"blocks.{number}.mobile_inverted_conv.{PROXYLESS[part]}"
            yield from _pair(f"{theirs}.conv", f"{theirs}.bn", f"blocks.{i}.{part}")
    yield from _pair("feature_mix_layer.conv", "feature_mix_layer.bn", "mix")
    yield "classifier.linear", "classifier"


INT8 = {"expand": "pointwise1", "depthwise": "depthwise", "project": "pointwise2"}


def _int8(net: Backbone) -> Names:
    """Folded: convolutions only."""
    yield "first_conv", "stem.conv"
    for i, block in _blocks(net):
        for part, _ in block.named_children():
            yield f"blocks.{i}.{INT8[part]}", f"blocks.{i}.{part}.conv"
    if hasattr(net.mix, "conv"):
        yield "feature_mix", "mix.conv"
    yield "classifier", "classifier"


def _blocks(net: Backbone) -> Iterable[tuple[int, InvertedResidual]]:
    return enumerate(net.blocks)


def _pair(conv: str, norm: str, ours: str) -> Names:
    yield conv, f"{ours}.conv"
    yield norm, f"{ours}.norm"


@dataclass(frozen=True)
class Source:
    """Whose names: an entry that tells them from all others, the nets that it has, the mapping."""

    mark: str
    nets: tuple[type[Backbone], ...]
    mapping: Callable[[Backbone], Names]


V2, V3, LITE0 = MobileNetV2, MobileNetV3, EfficientNetLite0
SOURCES = {
    "torchvision": Source("features.0.0.weight", (V2, V3), _torchvision),
    "timm": Source("conv_stem.weight", (V2, V3, LITE0), _timm),
    "efficientnet-lite-pytorch": Source("_conv_stem.weight", (LITE0,), _lite),
    "proxylessnas": Source("first_conv.conv.weight", (ProxylessMobile,), _proxyless),
    "int8": Source("first_conv.weight", (Backbone,), _int8),
}
