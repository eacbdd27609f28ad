"""An object store for tests: moto's S3 server in a process of its own, spoken to over HTTP."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "pictures"


class Store:
    """One bucket of a running server."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.fs = pafs.S3FileSystem(access_key="testing", secret_key="testing", endpoint_override=endpoint,
                                    region="us-east-1", allow_bucket_creation=True, allow_bucket_deletion=True)
        self.fs.create_dir(BUCKET)

    def uri(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}?endpoint_override={self.endpoint}&region=us-east-1"

    def upload(self, folder: Path, path: str) -> None:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            with self.fs.open_output_stream(f"{BUCKET}/{path}/{file.relative_to(folder)}") as stream:
                stream.write(file.read_bytes())

    def objects(self, path: str) -> dict[str, bytes]:
        """Content of the objects below a path, by name, without those that go away meanwhile."""
        infos = self.fs.get_file_info(pafs.FileSelector(f"{BUCKET}/{path}", recursive=True, allow_not_found=True))
        found = {}
        for info in infos:
            if info.is_file:
                with contextlib.suppress(FileNotFoundError):
                    found[info.path.removeprefix(f"{BUCKET}/{path}/")] = self.fs.open_input_file(info.path).read()
        return found

    def times(self, path: str) -> dict[str, int]:
        infos = self.fs.get_file_info(pafs.FileSelector(f"{BUCKET}/{path}", recursive=True, allow_not_found=True))
        return {i.path.removeprefix(f"{BUCKET}/{path}/"): i.mtime_ns for i in infos if i.is_file}

    def put(self, path: str, data: bytes) -> None:
        with self.fs.open_output_stream(f"{BUCKET}/{path}") as stream:
            stream.write(data)


@contextlib.contextmanager
def slowed(store: Store, seconds: float, packet_bytes: int = 65536) -> Iterator[Store]:
    """The same store behind a line on which each packet, in each direction, takes so many seconds."""
    host, port = store.endpoint.removeprefix("http://").split(":")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(packet_bytes):
                await asyncio.sleep(seconds)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(connect, "127.0.0.1", 0), loop).result()
    try:
        yield Store(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert process.poll() is None, "the server did not start"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield Store(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
