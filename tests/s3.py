"""An object store for tests: moto's S3 server in a process of its own, spoken to over HTTP."""

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pyarrow.fs as pafs
import pytest

from tests.clusters import free_port

SECRET = "nobody-may-write-this-down"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "pictures"


def give_keys(patch: pytest.MonkeyPatch) -> None:
    """Put KEYS into this process's environment for as long as a test runs."""
    for name, value in KEYS.items():
        patch.setenv(name, value)


class Store:
    """One bucket of a running server."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.fs = pafs.S3FileSystem(access_key="testing", secret_key=SECRET, endpoint_override=endpoint,
                                    region="us-east-1", allow_bucket_creation=True, allow_bucket_deletion=True)
        self.fs.create_dir(BUCKET)

    def uri(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}?endpoint_override={self.endpoint}&region=us-east-1"

    def upload(self, folder: Path, path: str) -> None:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            with self.fs.open_output_stream(f"{BUCKET}/{path}/{file.relative_to(folder)}") as stream:
                stream.write(file.read_bytes())

    def download(self, path: str, folder: Path) -> None:
        for name, data in self.objects(path).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

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
        """Under any name (that pyarrow would not give some, others may)."""
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id="testing",
                              aws_secret_access_key=SECRET)
        client.put_object(Bucket=BUCKET, Key=path, Body=data)


class Line(Store):
    """The same store at the end of a line of its own."""

    def __init__(self, store: Store, loop: asyncio.AbstractEventLoop, seconds: float, host: str):
        self.target, self.loop, self.seconds = store.endpoint.removeprefix("http://").split(":"), loop, seconds
        self.host = host
        self.server: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()
        self.requests: list[str] = []
        """Method and path of those that came over it."""
        self.before: Callable[[str], object] = lambda request: None
        """Called with each before it is passed on, and nothing else passes meanwhile."""
        self.port = 0
        self.mend()
        super().__init__(f"http://{host}:{self.port}")

    def mend(self) -> None:
        """Take connections (again)."""
        self._run(self._listen())

    @contextlib.contextmanager
    def cut(self, seconds: float = 3600.0) -> Iterator[None]:
        """Connections are broken off and refused while the block runs, but no longer than some seconds."""
        self._run(self._hang_up())
        timer = threading.Timer(seconds, self.mend)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            self.mend()

    def end(self) -> None:
        """Break off all connections, for good."""
        self._run(self._hang_up())
        self._run(self._await_all())

    def _run(self, task) -> None:
        asyncio.run_coroutine_threadsafe(task, self.loop).result()

    async def _listen(self) -> None:
        if self.server is None:
            self.server = await asyncio.start_server(self._connect, self.host, self.port)
            self.port = self.server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        self.server.close()
        self.server = None
        for writer in self.writers:
            writer.transport.abort()

    async def _await_all(self) -> None:
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=10)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection(self.target[0], int(self.target[1]))
        self.writers |= {writer, onward}
        await asyncio.gather(self._carry(reader, onward), self._carry(there, writer))
        self.writers -= {writer, onward}

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if request := re.match(rb"([A-Z]+ \S+) HTTP/1.1\r\n", data):
                    self.requests.append(request[1].decode())
                    self.before(self.requests[-1])
                await asyncio.sleep(self.seconds)
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def forwarded(store: Store, seconds: float = 0.0, host: str = "127.0.0.1") -> Iterator[Line]:
    """The store behind a line that can be cut, and on which a packet of at most 64 kB takes so many seconds."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    line = Line(store, loop, seconds, host)
    try:
        yield line
    finally:
        line.end()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    port = free_port()
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
