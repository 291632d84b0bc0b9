"""What to update and how: parameter slices with their step sizes, norms, activations."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from modicum.errors import UsageError
from modicum.graph import Frozen, Graph, Shape

MOST_STEPS = 256
"""Inner steps whose step sizes may differ from the ones before."""

Rate = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]  # a float of the C side
Rates = Annotated[tuple[Rate, ...], Field(min_length=1, max_length=MOST_STEPS)]


class Slice(Frozen):
    """Channels of one parameter; None means all of them.

    `out` indexes dimension 0 (output channels, biases, norm scales), `inp` dimension 1 (input
    channels; of a grouped convolution the channels within each group).  Output slices shrink
    gradients and optimiser state; input slices shrink the stored activation too, and so do output
    slices that leave groups of a grouped convolution untouched.
    """

    out: tuple[int, ...] | None = None
    inp: tuple[int, ...] | None = None

    @field_validator("out", "inp")
    @classmethod
    def _ascending(cls, channels: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if channels is not None and (
            not channels or channels[0] < 0 or list(channels) != sorted(set(channels))
        ):
            raise ValueError("channels must be ascending, distinct, non-negative and not empty")
        return channels

    @property
    def whole(self) -> bool:
        return self.out is None and self.inp is None

    def shape(self, full: Shape) -> Shape:
        """The shape of the slice of a parameter of shape `full`."""
        out = full[0] if self.out is None else len(self.out)
        if len(full) == 1:
            return (out,)
        inp = full[1] if self.inp is None else len(self.inp)
        return (out, inp, *full[2:])


class Update(Frozen):
    """One trained parameter: which slice, and its step size relative to the optimiser's.

    `rates` holds one factor per inner step, the last one repeated; 0 means "not in this step"
    (p-Meta, Qu et al., KDD 2022), and learned step sizes may turn out negative.  An inner step is
    an update of the optimiser, counted from 0 where a task begins.
    """

    param: str
    slice: Slice = Slice()
    rates: Rates = (1.0,)

    def rate(self, step: int) -> float:
        """The factor of an inner step."""
        return self.rates[min(step, len(self.rates) - 1)]


class Selection(Frozen):
    """What a method decides.

    `updates` says which parameters are trained.  So a norm without updates is frozen, one whose
    shift alone is updated is "shift only", one with both is "affine"; all of them use the
    statistics that the model came with.  `batch_norms` names the norms that use the statistics of
    the batch instead, and follow them with their running ones.  `sign` names the activations
    whose backward pass is the mask 1[a >= 0] of their input a, instead of the exact derivative
    (MobileTL, Chiang et al., AAAI 2023).  `probes` names the values whose channels are scored by
    Fisher information on the way back (TinyTrain, Kwon et al., ICML 2024).  All are names of nodes.
    `attended` names the updated weights whose channels are chosen by the attention that their
    layers have (p-Meta); elsewhere a layer's attention does nothing.
    """

    updates: tuple[Update, ...]
    batch_norms: tuple[str, ...] = ()
    sign: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    attended: tuple[str, ...] = ()

    @property
    def inner_steps(self) -> int:
        """From the last of them on, all steps are alike."""
        return max((len(u.rates) for u in self.updates), default=1)

    @property
    def patterns(self) -> tuple[tuple[int, ...], ...]:
        """The inner steps, those that update the same parameters together; in order of use."""
        together: dict[frozenset[str], list[int]] = {}
        for step in range(self.inner_steps):
            together.setdefault(self.updated_in(step), []).append(step)
        return tuple(map(tuple, together.values()))

    def updated_in(self, step: int) -> frozenset[str]:
        """The parameters whose step size is not 0 in an inner step."""
        return frozenset(u.param for u in self.updates if u.rate(step))

    def without_idle(self) -> Selection:
        """Without the updates whose step size is 0 in every step."""
        moving = tuple(u for u in self.updates if any(u.rates))
        return self if moving == self.updates else self.model_copy(update={"updates": moving})


def check_selection(graph: Graph, selection: Selection) -> None:
    """Raise UsageError unless every update names a trainable parameter and channels it has.

    Also for an update that never moves its parameter, and for an inner step that updates nothing.
    """
    if not selection.updates and not selection.probes:
        raise UsageError(
            "the method selects nothing to update",
            hint="choose a larger method, or patterns that match: " + some(graph.trainable()),
        )
    seen: set[str] = set()
    for update in selection.updates:
        param = graph.params.get(update.param)
        if param is None or not param.trainable:
            raise UsageError(
                f"no trainable parameter is called {update.param!r}",
                hint="the trainable parameters are " + some(graph.trainable()),
            )
        if update.param in seen:
            raise UsageError(f"{update.param!r} is selected twice")
        seen.add(update.param)
        if not any(update.rates):
            raise UsageError(f"{update.param!r} is selected, but its step size is 0 in every step")
        if update.slice.inp is not None and len(param.shape) < 2:
            raise UsageError(f"{update.param!r} has no input channels to slice")
        for axis, channels in ((0, update.slice.out), (1, update.slice.inp)):
            if channels is not None and channels[-1] >= param.shape[axis]:
                side = ("output", "input")[axis]
                raise UsageError(
                    f"{update.param!r} has no {side} channel {channels[-1]}",
                    why=f"its shape is {param.shape}",
                )
    for step, *_ in selection.patterns:
        if not selection.updated_in(step) and not selection.probes:
            raise UsageError(
                f"inner step {step} updates nothing",
                why="every step size is 0 in it",
                hint="a step size above 0, or one inner step less",
            )


def some(names: list[str], most: int = 8) -> str:
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
