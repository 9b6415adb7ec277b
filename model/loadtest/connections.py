"""HTTP/1.1 connections to one server, kept and used again: all that a load generator needs."""

import asyncio


class Connections:
    """Keep-alive connections to a host and port; one request at a time on each."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def exchange(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request and read the response: (status, headers, body).

        The connection used last is used again, or a new one made. Raises OSError or EOFError when
        the connection is refused or lost, and ValueError, LookupError or
        asyncio.LimitOverrunError when what comes is no HTTP/1.1 response.
        """
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                break
            writer.close()  # the server has closed it while it was idle: no request is lost
        else:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            status, headers, body = await _read_response(reader)
        except BaseException:
            writer.transport.abort()
            raise
        if headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return status, headers, body


async def _read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and body of an HTTP/1.1 response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    parts = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in parts}
    if headers.get("transfer-encoding", "").lower() != "chunked":
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = b""
        while size := int((await reader.readline()).partition(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        while await reader.readline() not in (b"\r\n", b""):
            pass  # headers may follow the last chunk
    return int(first.split()[1]), headers, body
