"""HTTP/2 by hand: streams that stop where a well-behaved client would continue."""

import functools
import gzip
import socket
import time
import zlib

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

FRAME = 16384
IMAGEGPT = "/imagegpt.v1.ImageGptService/"
KSERVE = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/"


@functools.lru_cache(maxsize=64)
def framed(message, encoding=None):
    """Returns a message in gRPC framing, compressed if an encoding is named."""
    packers = {None: bytes, "gzip": functools.partial(gzip.compress, compresslevel=6), "deflate": zlib.compress}
    packed = packers[encoding](message)
    return bytes([encoding is not None]) + len(packed).to_bytes(4, "big") + packed


class Wire:
    """A connection whose client answers settings and pings by itself, and does everything else only when told.

    With `window` 0 the client accepts no answers: the worker may send headers, but no message.
    """

    def __init__(self, port, window=65535):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: window,
                # h2 needs a value here to accept longer header lists.
                SettingCodes.MAX_HEADER_LIST_SIZE: 1 << 16,
            },
        )
        self.takes = window > 0
        # The worker's answers, by stream.
        self.status, self.bytes, self.ended = {}, {}, {}
        self.closed = False
        self.h2.initiate_connection()
        self.pump()

    def pump(self, seconds=0.0):
        """Sends pending data and reads for `seconds`; returns whether the connection is open."""
        until = time.monotonic() + seconds
        while not self.closed:
            try:
                self.socket.settimeout(5)
                self.socket.sendall(self.h2.data_to_send())
                left = until - time.monotonic()
                self.socket.settimeout(max(left, 0.0005))
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                if time.monotonic() >= until:
                    break
                continue
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            try:
                for event in self.h2.receive_data(data):
                    self._take(event)
            except ProtocolError:
                self.closed = True
        return not self.closed

    def _take(self, event):
        if isinstance(event, (ResponseReceived, TrailersReceived)):
            status = dict(event.headers).get("grpc-status")
            if status is not None:
                self.status[event.stream_id] = int(status)
        elif isinstance(event, DataReceived):
            self.bytes[event.stream_id] = self.bytes.get(event.stream_id, b"") + event.data
            if self.takes and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, (StreamEnded, StreamReset)):
            self.ended[event.stream_id] = type(event).__name__
        elif isinstance(event, ConnectionTerminated):
            self.closed = True

    def open(self, path, body=b"", end=False, encoding=None, patience=5.0, headers=()):
        """Opens a call, sends as much of the body as windows allow within `patience`, and returns the stream's id."""
        stream = self.h2.get_next_available_stream_id()
        head = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *([("grpc-encoding", encoding)] if encoding else []),
            *headers,
        ]
        try:
            self.h2.send_headers(stream, head, end_stream=end and not body)
        except ProtocolError:
            self.closed = True
        self.send(stream, body, end, patience)
        return stream

    def send(self, stream, body, end=False, patience=5.0):
        """Sends data on a stream; returns how many bytes the windows allowed."""
        sent, until = 0, time.monotonic() + patience
        while sent < len(body) and not self.closed and stream not in self.ended:
            try:
                room = min(self.h2.local_flow_control_window(stream), FRAME, len(body) - sent)
                if room <= 0:
                    if time.monotonic() > until:
                        break
                    self.pump(0.005)
                    continue
                last = end and sent + room == len(body)
                self.h2.send_data(stream, body[sent : sent + room], end_stream=last)
            except ProtocolError:
                break
            sent += room
            if sent % (16 * FRAME) < room:
                self.pump()
        self.pump()
        return sent

    def reset(self, stream):
        """Cancels a call, as a client does whose own caller has disconnected."""
        try:
            self.h2.reset_stream(stream, ErrorCodes.CANCEL)
        except ProtocolError:
            pass

    def unfinished(self, streams):
        """Returns the streams that the worker has not ended."""
        return [stream for stream in streams if stream not in self.ended and not self.closed]

    def close(self):
        self.socket.close()
        self.closed = True
