"""What is around Ray Serve's own HTTP, in a replica and in its fallback; without Ray."""

import asyncio
import json

from model.serving.ingress_connection import HEADER, AroundRay
from tests.ways import assert_plain


class Client:
    """One request at a port: what Ray Serve was given of it, and what the client gets."""

    def __init__(self, around: AroundRay, port: int, **headers: str) -> None:
        named = [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()]
        self.scope = {"type": "http", "server": ("127.0.0.1", port), "headers": named}
        self.said: list[dict] = []
        self.task = asyncio.ensure_future(around(self.scope, None, self.send))

    async def send(self, message: dict) -> None:
        """What the server says."""
        self.said.append(message)


def test_in_a_replica_ray_hands_the_connection_over():
    """However long the body is."""

    async def main():
        seen = []

        async def ray(scope, receive, send):
            seen.append((HEADER, b"?1") in scope["headers"])

        around = AroundRay(ray, fallback=2, largest=6, most=10)
        await Client(around, 1, content_length="1000").task
        await Client(around, 1, transfer_encoding="chunked").task
        assert seen == [True, True]

    asyncio.run(main())


def test_in_the_fallback_bodies_are_bounded():
    """What is too much gets 503 at once, and is not read; room is given back."""

    async def main():
        go, seen = asyncio.Event(), []

        async def ray(scope, receive, send):
            seen.append((HEADER, b"?1") in scope["headers"])
            await go.wait()

        around = AroundRay(ray, fallback=2, largest=6, most=10)
        waiting = [Client(around, 2, content_length=size) for size in ("4", "6")]
        await asyncio.sleep(0)
        refused = [Client(around, 2, content_length="1")]
        refused.append(Client(around, 2, transfer_encoding="chunked"))
        for client in refused:
            await client.task
            start, body = client.said
            assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
            assert_plain(json.loads(body["body"])["error"])
        large = Client(around, 2, content_length="7")
        await large.task
        assert large.said[0]["status"] == 413
        assert seen == [False, False]
        waiting[0].task.cancel()  # its client has gone
        await asyncio.sleep(0)
        small = Client(around, 2, content_length="4")
        go.set()
        await asyncio.gather(waiting[1].task, small.task)
        assert len(seen) == 3 and around._held == 0

    asyncio.run(main())
