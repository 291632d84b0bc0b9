"""Meta-training: inner and outer rules, and the loop around them."""

from __future__ import annotations

from modicum.meta.protonet import ProtoNet
from modicum.meta.train import MetaTrace, MetaTrain, metatrain

__all__ = ["MetaTrace", "MetaTrain", "ProtoNet", "metatrain"]
