"""Attention over intervals of keys: one function, several backends behind it."""

from glm_jax.attention.api import BACKENDS, attend

__all__ = ['BACKENDS', 'attend']
