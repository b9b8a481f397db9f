"""Compiler options of each kind of chip: one table, with a reason for each.

`train` compiles its step with them, and so does `plan`: no environment variable is needed.
"""

from __future__ import annotations

# Collectives run beside the matrix units instead of before them. A v5e's compiler does
# so by itself; on v5p and v6e, without them, 0.1 s more of a step is waiting for gathers.
_ASYNC = {
  'xla_tpu_enable_async_collective_fusion': 'true',
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
  'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
  'xla_tpu_overlap_compute_collective_tc': 'true',
  'xla_enable_async_all_gather': 'true',
}
# No "collective matmul": where weights are large it replaces a gather by a loop of small
# products, at twice the time.
_NO_WINDOWED_EINSUM = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}

_OPTIONS = {
  'TPU v4': {**_ASYNC, **_NO_WINDOWED_EINSUM},
  'TPU v5 lite': _NO_WINDOWED_EINSUM,
  'TPU v5': {**_ASYNC, **_NO_WINDOWED_EINSUM},
  'TPU v6 lite': {**_ASYNC, **_NO_WINDOWED_EINSUM},
  'TPU7x': {**_ASYNC, **_NO_WINDOWED_EINSUM},
}


def compiler_options(device_kind: str) -> dict[str, str]:
  """Options for `jax.jit`; none for a chip that is not in the table.

  Args:
    device_kind: as JAX names it.

  Example:
    >>> compiler_options('cpu')
    {}
  """
  return dict(_OPTIONS.get(device_kind, {}))
