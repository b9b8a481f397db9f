"""Google Cloud Storage on this machine, as much of its JSON API as our libraries use.

A proxy that answers, with a certificate of its own, for the two hosts that TensorFlow's
file system talks to, and TensorStore's endpoint: nothing leaves the machine, and the code
under test is unchanged.
"""

import contextlib
import http.server
import json
import re
import ssl
import threading
import types
import urllib.parse
import zlib

import trustme

HOSTS = ('www.googleapis.com', 'storage.googleapis.com')


@contextlib.contextmanager
def serve(folder, buckets=('bucket',)):
  """Serves empty buckets.

  Args:
    folder: for the certificate.
    buckets: their names.

  Yields:
    (objects, environment, requests): {bucket/name: bytes}; what processes need in their
    environment to find them; and what was asked, 'METHOD path range'.
  """
  authority = trustme.CA()
  authority.cert_pem.write_to_path(str(folder / 'ca.pem'))
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  authority.issue_cert(*HOSTS).configure_cert(context)
  server = http.server.ThreadingHTTPServer(('localhost', 0), _Handler)
  server.daemon_threads = True
  server.context, server.buckets = context, buckets
  server.objects, server.requests, server.lock = {}, [], threading.Lock()
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  environment = {
    'https_proxy': f'http://localhost:{server.server_port}',
    'CURL_CA_BUNDLE': str(folder / 'ca.pem'),
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
    'TENSORSTORE_GCS_HTTP_URL': f'http://localhost:{server.server_port}',
    'STORAGE_EMULATOR_HOST': f'http://localhost:{server.server_port}',
    'NO_GCE_CHECK': 'true',
  }
  try:
    yield server.objects, environment, server.requests
  finally:
    server.shutdown()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    """Says nothing."""

  def do_CONNECT(self):
    self.send_response(200)
    self.end_headers()
    self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
    self.rfile = self.connection.makefile('rb', -1)
    self.wfile = self.connection.makefile('wb', 0)
    self.close_connection = False

  def _answer(self, method):
    """One request; whole requests take turns, as objects change all at once."""
    body = self._body()
    parsed = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(parsed.query))
    with self.server.lock:
      asked = [method, self.path, self.headers.get('Range', '')]
      self.server.requests.append(' '.join(asked).strip())
      code, content, headers = self._route(method, parsed.path, query, body)
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def _body(self):
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def _route(self, method, path, query, body):
    objects = self.server.objects
    found = re.fullmatch(r'/upload/storage/v1/b/([^/]+)/o', path)
    if found and found[1] not in self.server.buckets:
      return 404, b'{}', {}
    if found:
      name = f'{found[1]}/{query["name"]}'
      if method == 'POST':
        wanted = query.get('ifGenerationMatch')
        if wanted is not None and wanted != self._generation(name):
          return 412, b'', {}
        if query.get('uploadType') != 'resumable':
          objects[name] = body
          return 200, _json(self._about(name)), {}
        return 200, b'', {'Location': f'https://{HOSTS[0]}{self.path}'}
      objects[name] = body  # TensorFlow sends a file of these sizes in one piece
      return 200, _json({'name': query['name']}), {}
    media = re.fullmatch(r'/storage/v1/b/([^/]+)/o/([^/]+)', path)
    if media and query.get('alt') == 'media':
      return self._read(f'{media[1]}/{urllib.parse.unquote(media[2])}', query)
    if self.headers['Host'].startswith(HOSTS[1]):
      return self._read(urllib.parse.unquote(path.lstrip('/')))
    found = re.fullmatch(r'/storage/v1/b/([^/]+)', path)
    if found:
      there = found[1] in self.server.buckets
      return (200, _json({'name': found[1]}), {}) if there else (404, b'{}', {})
    if re.fullmatch(r'/storage/v1/b/([^/]+)/storageLayout', path):
      # TensorFlow asks before it renames a folder: here, it does so object by object.
      return 200, _json({'hierarchicalNamespace': {'enabled': False}}), {}
    found = re.fullmatch(r'/storage/v1/b/([^/]+)/o', path)
    if found:
      return 200, _json(_list(objects, found[1] + '/', query)), {}
    found = re.fullmatch(
      r'/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)', path
    )
    if found:
      source, target = (f'{found[i]}/{urllib.parse.unquote(found[i + 1])}' for i in (1, 3))
      if source not in objects:
        return 404, b'{}', {}
      objects[target] = objects[source]
      return 200, _json({'done': True}), {}
    found = re.fullmatch(r'/storage/v1/b/([^/]+)/o/([^/]+)', path)
    if not found:
      return 501, b'{}', {}
    name = f'{found[1]}/{urllib.parse.unquote(found[2])}'
    if name not in objects:
      return 404, b'{}', {}
    if method == 'DELETE':
      if query.get('ifGenerationMatch', self._generation(name)) != self._generation(name):
        return 412, b'', {}
      del objects[name]
      return 204, b'', {}
    return 200, _json(self._about(name)), {}

  def _generation(self, name):
    """Of an object: another one whenever its content is; '0' for none."""
    content = self.server.objects.get(name)
    return '0' if content is None else str(1 + zlib.crc32(content))

  def _about(self, name):
    return {
      'name': name.partition('/')[2],
      'size': str(len(self.server.objects[name])),
      'generation': self._generation(name),
      'updated': '2026-01-01T00:00:00.000Z',
    }

  def _read(self, name, query=types.MappingProxyType({})):
    if name not in self.server.objects:
      return 404, b'', {}
    generation = self._generation(name)
    if query.get('ifGenerationNotMatch') == generation:
      return 304, b'', {}
    about = {'X-Goog-Generation': generation}
    data = self.server.objects[name]
    wanted = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
    if not wanted:
      return 200, data, about
    first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
    if first >= len(data):
      return 416, b'', {}
    about['Content-Range'] = f'bytes {first}-{last}/{len(data)}'
    return 206, data[first : last + 1], about

  do_GET = lambda self: self._answer('GET')
  do_POST = lambda self: self._answer('POST')
  do_PUT = lambda self: self._answer('PUT')
  do_DELETE = lambda self: self._answer('DELETE')


def _list(objects, bucket, query):
  prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
  items, folders = [], set()
  for name in sorted(objects):
    if not name.startswith(bucket + prefix):
      continue
    own = name.removeprefix(bucket)
    if own < query.get('startOffset', '') or own >= query.get('endOffset', '\U0010ffff'):
      continue
    rest = name[len(bucket + prefix) :]
    if delimiter and delimiter in rest:
      folders.add(prefix + rest.split(delimiter)[0] + delimiter)
    else:
      items.append({'name': name.removeprefix(bucket)})
  return {'items': items, 'prefixes': sorted(folders)}


def _json(content):
  return json.dumps(content).encode()
