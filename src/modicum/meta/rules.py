"""All rules by name: a new one is a file and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modicum.meta.anil import ANIL
from modicum.meta.boil import BOIL
from modicum.meta.learner import Rule
from modicum.meta.maml import MAML
from modicum.meta.mamlpp import MAMLPP
from modicum.meta.pmeta import PMeta
from modicum.meta.protonet import ProtoNet
from modicum.meta.reptile import Reptile

_Any = MAML | ANIL | BOIL | MAMLPP | PMeta | Reptile | ProtoNet
AnyRule = Annotated[_Any, Field(discriminator="kind")]
RULES: dict[str, type[Rule]] = {
    "maml": MAML,
    "anil": ANIL,
    "boil": BOIL,
    "maml++": MAMLPP,
    "p-meta": PMeta,
    "reptile": Reptile,
    "protonet": ProtoNet,
}
