"""Close asyncio streams in tests."""

import asyncio
import contextlib


async def close_stream(writer: asyncio.StreamWriter) -> None:
    """Close a connection, also a cut one, and wait for its socket: one that outlives its loop fails a later test."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
