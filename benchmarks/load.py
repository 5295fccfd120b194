"""A lean HTTP load generator: closed-loop clients over keep-alive connections, nothing but the standard library.

    python benchmarks/load.py bodies.json --url http://127.0.0.1:8000/v1/embeddings --clients 64

``bodies.json`` is a list of request bodies; each is sent once, by whichever client is free. Prints one JSON object: seconds,
the client's own CPU seconds, and for each request its latency and status.
"""

import argparse
import asyncio
import json
import time
from urllib.parse import urlsplit


class Client(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, feed):
        self.feed, self.buffer, self.needed, self.done = feed, bytearray(), None, asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        self.next()

    def next(self):
        self.number = self.feed.take()
        if self.number is None:
            self.transport.close()
            return
        self.start = time.perf_counter()
        self.transport.write(self.feed.requests[self.number])

    def data_received(self, data):
        self.buffer += data
        if self.needed is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end]).lower()
            place = head.index(b"content-length:") + len(b"content-length:")
            self.needed = end + 4 + int(head[place:].split(b"\r\n", 1)[0])
            self.status = int(head[9:12])
        if len(self.buffer) >= self.needed:
            self.feed.latencies[self.number] = time.perf_counter() - self.start
            self.feed.statuses[self.number] = self.status
            self.buffer.clear()
            self.needed = None
            self.next()

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_result(error)


class Feed:
    """Requests as bytes, handed out one by one."""

    def __init__(self, bodies, url):
        parts = urlsplit(url)
        head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n".encode()
        encoded = [json.dumps(body).encode() for body in bodies]
        self.requests = [head + b"content-length: %d\r\n\r\n" % len(body) + body for body in encoded]
        self.latencies, self.statuses = [None] * len(bodies), [0] * len(bodies)
        self.taken = 0

    def take(self):
        if self.taken == len(self.requests):
            return None
        self.taken += 1
        return self.taken - 1


async def run(bodies, url, clients):
    """Returns the figures of one run."""
    feed, parts = Feed(bodies, url), urlsplit(url)
    loop = asyncio.get_running_loop()
    cpu, start = time.process_time(), time.perf_counter()
    made = await asyncio.gather(
        *(loop.create_connection(lambda: Client(feed), parts.hostname, parts.port) for _ in range(clients))
    )
    await asyncio.gather(*(client.done for _, client in made))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "client_cpu_s": time.process_time() - cpu,
        "latencies": feed.latencies,
        "statuses": feed.statuses,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bodies")
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    with open(options.bodies, encoding="utf-8") as file:
        bodies = json.load(file)
    print(json.dumps(asyncio.run(run(bodies, options.url, options.clients))))


if __name__ == "__main__":
    main()
