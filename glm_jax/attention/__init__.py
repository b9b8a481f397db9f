"""Attention over intervals of keys: one function, several backends behind it."""

from glm_jax.attention.api import BACKENDS, DENSE, Seen, attend, choose, prepare

__all__ = ['BACKENDS', 'DENSE', 'Seen', 'attend', 'choose', 'prepare']
