"""Accelerators that do not load: JAX would go on on the CPU, and a command may not."""

import importlib.metadata
import logging
import sys
import types

import jax
import pytest
from jax._src import hardware_utils, xla_bridge

from glm_jax import accelerators
from glm_jax.configs import UserError

_LOG = logging.getLogger(xla_bridge.__name__)


@pytest.fixture
def of_jax(monkeypatch):
  """of_jax(asked, devices, backends, registered, chips): a JAX that has started so."""

  def begin(asked=None, devices=lambda: [], backends=('cpu',), registered=(), chips=0):
    config = types.SimpleNamespace(jax_platforms=asked)
    fake = types.SimpleNamespace(config=config, devices=devices)
    monkeypatch.setattr(accelerators, 'jax', fake)
    monkeypatch.setattr(xla_bridge, 'backends', lambda: dict.fromkeys(backends))
    # JAX itself is asked which platforms may fail quietly.
    factories = {
      name: xla_bridge._backend_factories['tpu' if name == 'tpu' else 'cpu']
      for name in ('cpu', *registered)
    }
    monkeypatch.setattr(xla_bridge, '_backend_factories', factories)
    monkeypatch.setattr(xla_bridge, '_backend_errors', {'tpu': 'in use by process 7'})
    count = lambda: (chips, None)
    monkeypatch.setattr(hardware_utils, 'num_available_tpu_chips_and_device_id', count)

  return begin


@pytest.fixture
def broken_plugin(monkeypatch):
  """Loads, through JAX itself, the one plugin that is installed; its driver is missing."""

  def initialize():
    try:
      raise OSError('libdriver.so: not found')
    except OSError as error:
      raise RuntimeError('Unable to load it.\nIs it there?') from error

  plugin = types.SimpleNamespace(initialize=initialize)
  monkeypatch.setitem(sys.modules, 'a_plugin', plugin)
  entries = [types.SimpleNamespace(value='a_plugin')]
  monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: entries)
  monkeypatch.setattr(xla_bridge, 'jax_plugins', None)
  return xla_bridge.discover_pjrt_plugins


def test_a_plugin_that_does_not_load_stops_with_the_words_of_its_driver(
  of_jax, broken_plugin
):
  of_jax(devices=broken_plugin)
  said = r'a_plugin: Unable to load it\. Is it there\?: libdriver\.so: not found.*=cpu'
  with pytest.raises(UserError, match=said):
    accelerators.start()


def test_whoever_asks_for_the_cpu_gets_it(of_jax, broken_plugin):
  of_jax('cpu', broken_plugin, registered=('cuda',))
  assert accelerators.start() == []


def test_what_else_was_asked_for_and_is_there_is_enough(of_jax, broken_plugin):
  of_jax('tpu', broken_plugin, backends=('cpu', 'tpu'), registered=('tpu', 'cuda'))
  assert accelerators.start() == []


def test_a_platform_that_jax_leaves_out_is_named(of_jax, broken_plugin):
  """It skips CUDA without a word where no device file of NVIDIA's is."""
  of_jax(registered=('cuda',))
  with pytest.raises(UserError, match='got cuda: JAX sees no device of it'):
    accelerators.start()
  of_jax('cuda,cpu', registered=())
  with pytest.raises(UserError, match='got cuda: JAX sees no device of it'):
    accelerators.start()

  def asserts():
    broken_plugin()
    raise AssertionError

  of_jax('cuda', asserts)
  with pytest.raises(UserError, match=r'a_plugin: .* / JAX_PLATFORMS=cuda has no device'):
    accelerators.start()


def test_libtpu_is_silent_unless_there_is_a_tpu(of_jax):
  of_jax(registered=('tpu',))
  assert accelerators.start() == []
  of_jax(registered=('tpu',), chips=4)
  with pytest.raises(UserError, match='got tpu: in use by process 7'):
    accelerators.start()


def test_what_jax_raises_is_a_line_unless_processes_do_not_meet(of_jax):
  def fails(message):
    def devices():
      raise RuntimeError(message)

    return devices

  of_jax('foo', fails("Unable to initialize backend 'foo': not known"))
  with pytest.raises(UserError, match="'foo': not known"):
    accelerators.start()
  of_jax(devices=fails("Unable to initialize backend 'cuda': DEADLINE_EXCEEDED"))
  with pytest.raises(RuntimeError, match='DEADLINE'):
    accelerators.start()


def test_hardware_without_a_plugin_is_a_warning(of_jax, monkeypatch):
  monkeypatch.setattr(_LOG, 'level', logging.CRITICAL)
  of_jax(devices=lambda: _LOG.warning('An NVIDIA GPU may be present, %s.', 'but'))
  assert accelerators.start() == ['An NVIDIA GPU may be present, but.']
  assert _LOG.level == logging.CRITICAL and not _LOG.handlers


def test_jax_still_has_the_names_that_are_read():
  assert jax.devices()[0].platform in xla_bridge.backends()
  assert xla_bridge._backend_factories['tpu'].fail_quietly
  assert isinstance(xla_bridge._backend_errors, dict)
