"""Federated meta-learning: many devices make one initialisation that adapts from a few samples."""
