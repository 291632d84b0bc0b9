"""Meta-training: inner and outer rules, and the loop around them."""

from __future__ import annotations

from modicum.meta.anil import ANIL
from modicum.meta.boil import BOIL
from modicum.meta.comparison import compare_rules
from modicum.meta.config import MetaTrace, MetaTrain, Scores
from modicum.meta.costs import adaptation_cost
from modicum.meta.learner import Learner, Rule
from modicum.meta.maml import MAML
from modicum.meta.mamlpp import MAMLPP
from modicum.meta.plans import method_of
from modicum.meta.pmeta import PMeta
from modicum.meta.protonet import ProtoNet
from modicum.meta.reptile import Reptile
from modicum.meta.rules import RULES, AnyRule
from modicum.meta.sources import Episodes, Sines, TaskSource
from modicum.meta.train import judge, load_learner, metatrain

__all__ = [
    "ANIL",
    "BOIL",
    "MAML",
    "MAMLPP",
    "RULES",
    "AnyRule",
    "Episodes",
    "Learner",
    "MetaTrace",
    "MetaTrain",
    "PMeta",
    "ProtoNet",
    "Reptile",
    "Rule",
    "Scores",
    "Sines",
    "TaskSource",
    "adaptation_cost",
    "compare_rules",
    "judge",
    "load_learner",
    "metatrain",
    "method_of",
]
