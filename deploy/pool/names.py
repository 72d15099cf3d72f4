"""A name server on loopback that answers as a headless Service does: one address
for each pod that is ready."""

import asyncio
import socket
import struct

# CoreDNS gives records of Services so many seconds.
TTL_SECONDS = 5


class NameServer(asyncio.DatagramProtocol):
    def __init__(self):
        self.addresses = []
        self.transport = None
        self.port = None

    async def start(self):
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        self.port = self.transport.get_extra_info("sockname")[1]
        return self

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        end = data.index(0, 12) + 5
        (kind,) = struct.unpack("!H", data[end - 4:end - 2])
        # Of other kinds (AAAA, TXT) there is nothing.
        answers = list(self.addresses) if kind == 1 else []
        header = data[:2] + struct.pack("!HHHHH", 0x8580, 1, len(answers), 0, 0)
        records = b"".join(struct.pack("!HHHIH", 0xC00C, 1, 1, TTL_SECONDS, 4) + socket.inet_aton(address)
                           for address in answers)
        self.transport.sendto(header + data[12:end] + records, addr)
