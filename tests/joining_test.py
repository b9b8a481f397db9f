"""Processes that meet before JAX joins them, as threads: who is missing, who differs."""

import contextlib
import json
import socket
import threading
import time

import jax
import pytest

from glm_jax import distributed, joining, leaving
from glm_jax.configs import UserError

ABOUT = {'configuration': 'TrainConfig.seed = 0\nOther.value = 1', 'jax': '1.0'}


def _port():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def _meet(*abouts, indices=None, counts=None, seconds=20.0, before=lambda port: None):
  """What each process is told, '' for nothing; and the seconds that it took."""
  port, said = _port(), {}
  address = f'localhost:{port}'

  def run(place, about):
    index = place if indices is None else indices[place]
    count = len(abouts) if counts is None else counts[place]
    try:
      joining.meet(address, address, count, index, about, seconds)
      said[place] = ''
    except (UserError, leaving.Again) as error:
      said[place] = f'{type(error).__name__}: {error}'

  threads = [threading.Thread(target=run, args=a) for a in enumerate(abouts) if a[1]]
  before(port)
  began = time.perf_counter()
  for thread in reversed(threads):  # process 0 is late
    thread.start()
    time.sleep(0.05)
  for thread in threads:
    thread.join()
  return said, time.perf_counter() - began


def test_all_that_come_alike_go_on_and_the_port_is_free():
  said, seconds = _meet(*[ABOUT] * 5)
  assert said == dict.fromkeys(range(5), '') and seconds < 10


def test_who_does_not_come_is_named_to_those_that_did():
  said, seconds = _meet(ABOUT, None, ABOUT, None, counts=[4] * 4, seconds=1.0)
  assert said.keys() == {0, 2} and seconds < 10
  for words in said.values():
    assert words.startswith('Again: of 4 processes, 1, 3 did not come to localhost:')


def test_without_process_0_the_others_say_so():
  said, seconds = _meet(None, ABOUT, seconds=1.0)
  assert said[1].startswith('Again: process 0 did not come to localhost:') and seconds < 10


@pytest.mark.parametrize(
  'changed,words',
  [
    (
      {'configuration': 'TrainConfig.seed = 1\nOther.value = 1'},
      'TrainConfig.seed: 0 in process 0, 1 in process 1',
    ),
    (
      {'configuration': 'TrainConfig.seed = 0'},
      'Other.value: 1 in process 0, nothing in process 1',
    ),
    ({'jax': '1.1'}, 'jax: 1.0 in process 0, 1.1 in process 1'),
    ({'own': 'x'}, 'own: nothing in process 0, x in process 1'),
  ],
)
def test_a_difference_is_named_to_all(changed, words):
  said, _ = _meet(ABOUT, {**ABOUT, **changed}, ABOUT)
  told = said.values()
  assert all(text.startswith('UserError: ') and words in text for text in told), said


def test_another_count_is_a_difference_and_an_index_has_one_process():
  said, _ = _meet(ABOUT, ABOUT, counts=[2, 3])
  assert all('process_count: 2 in process 0, 3 in' in text for text in said.values())
  said, _ = _meet(ABOUT, ABOUT, ABOUT, indices=[0, 1, 1], counts=[3] * 3)
  assert len(said) == 3, said
  assert all('got --process_index=1 twice' in text for text in said.values()), said


def test_who_is_no_process_of_the_run_disturbs_nobody():
  def stray(port):
    def connect():
      for content in (b'GET / HTTP/1.1\r\n\r\n', b'[' * 10**5 + b'\n', b'{"index": 1}\n'):
        for _ in range(200):
          with contextlib.suppress(OSError):
            with socket.create_connection(('localhost', port), timeout=1) as other:
              other.sendall(content)
            break
          time.sleep(0.01)

    threading.Thread(target=connect).start()

  said, _ = _meet(ABOUT, ABOUT, before=stray)
  assert said == {0: '', 1: ''}


def test_a_port_in_use_and_a_foreign_address_are_one_sentence():
  with socket.create_server(('localhost', 0)) as taken:
    address = f'localhost:{taken.getsockname()[1]}'
    with pytest.raises(UserError, match=r'a port that is free, got .*; choose another'):
      joining.meet(address, address, 2, 0, ABOUT, 5.0)
  for bind in ('192.0.2.1:1234', 'no.such.host.invalid:1234'):
    with pytest.raises(UserError, match=r'able to listen at .* --coordinator_bind_address'):
      joining.meet(bind, bind, 2, 0, ABOUT, 5.0)


def test_it_listens_where_the_others_look_for_it_and_nowhere_else(monkeypatch):
  where = distributed._bind_address
  for address in ('localhost:1', '127.0.0.1:1', '[::1]:1', '192.0.2.1:1'):
    assert where(address, False) == address
  # Of a cluster's word for process 0, which may be in front of another machine.
  assert where('127.0.0.1:1', True) == '127.0.0.1:1'
  assert where('192.0.2.1:1', True) == '[::]:1'
  found = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.1.1', 1))]
  monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: found)
  assert where('myhost:1', False) == '[::]:1'


@pytest.mark.parametrize(
  'environment,found',
  [
    (
      {
        'SLURM_JOB_ID': '4100',
        'SLURM_STEP_NODELIST': 'n[3-4]',
        'SLURM_NTASKS': '2',
        'SLURM_PROCID': '1',
        'SLURM_LOCALID': '0',
        'SLURM_STEP_NUM_NODES': '2',
      },
      ('n3:61444', 2, 1),
    ),
    (
      {
        'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
        'OMPI_COMM_WORLD_SIZE': '4',
        'OMPI_COMM_WORLD_RANK': '3',
        'OMPI_COMM_WORLD_LOCAL_RANK': '1',
      },
      ('10.96.0.1:', 4, 3),
    ),
  ],
)
def test_a_cluster_is_detected_and_met_like_an_explicit_one(
  monkeypatch, environment, found
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  met, joined = [], []
  monkeypatch.setattr(joining, 'meet', lambda *a: met.append(a))
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *a, **k: joined.append((a, k)))
  distributed.initialize(distributed.Processes(multiprocess=True, join_seconds=7), ABOUT)
  [(address, _, count, index, about, seconds)] = met
  assert address.startswith(found[0]) and (count, index) == found[1:]
  assert about == ABOUT and seconds == 7
  [(arguments, more)] = joined
  assert arguments[:3] == (address, count, index)
  assert more['heartbeat_timeout_seconds'] == 30


def test_code_is_compared_by_what_is_in_the_files(tmp_path, monkeypatch):
  (tmp_path / 'own_code.py').write_text('x = 1')
  monkeypatch.syspath_prepend(tmp_path)
  import own_code

  before = joining.code(['own_code'])
  (tmp_path / 'own_code.py').write_text('x = 2')
  after = joining.code(['own_code'])
  assert own_code.x == 1 and {k for k in before if before[k] != after[k]} == {
    '--import=own_code'
  }
  assert {'jax', 'jaxlib', 'glm_jax', 'python'} <= before.keys()
  json.dumps(before)
