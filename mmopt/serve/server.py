"""`mmopt serve`: opens the artifact, listens, serves until SIGTERM or SIGINT, and drains."""

import os
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from rich.console import RenderableType
from rich.table import Table

from mmopt.serve.app import create_app, probe
from mmopt.serve.protocol import Model, require_servable
from mmopt.serve.queue import RunQueue
from mmopt_export.runtime import Runner
from mmopt_kernels.errors import InputError, MmoptError

# What is accepted may take this long after a signal; then it is cut off. Kubernetes kills after
# 30 s unless told otherwise.
_DRAIN_SECONDS = 25

_BACKLOG = 2048  # connections that the kernel holds for us; uvicorn's default


@dataclass(frozen=True)
class ServeReport:
    """What a server did from its start to its end.

    Attributes:
        served: requests answered.
        rejected: requests refused with 503 because the queue was full.
        abandoned: requests whose client left before the answer.
        failed: requests answered with 500.
        latency_p50_seconds: median from acceptance to result; None when nothing was served.
        uptime_seconds: from ready to stopped.
    """

    model: str
    url: str
    provider: str
    served: int
    rejected: int
    abandoned: int
    failed: int
    latency_p50_seconds: float | None
    uptime_seconds: float

    exit_code = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def render(self) -> RenderableType:
        """The report for a terminal."""
        table = Table(title=f"served {self.model}", show_header=False)
        latency = self.latency_p50_seconds
        for name, value in (
            ("provider", self.provider),
            ("served", self.served),
            ("rejected, queue full", self.rejected),
            ("abandoned by the client", self.abandoned),
            ("failed", self.failed),
            ("median latency", "-" if latency is None else f"{latency * 1e3:.1f} ms"),
            ("uptime", f"{self.uptime_seconds:.1f} s"),
        ):
            table.add_row(name, str(value))
        return table


def serve(
    artifact: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    queue: int = 64,
    threads: int | None = None,
    api_key_env: str | None = None,
) -> ServeReport:
    """Serve an artifact until SIGTERM or SIGINT, then finish what was accepted.

    Call it on the main thread. It prints one line on stderr when it is ready.

    Args:
        artifact: a folder that `mmopt export` wrote.
        host: the address to listen on.
        port: 0 takes a free one.
        queue: requests that may wait while one runs; more are refused with 503.
        threads: ONNX Runtime's threads; None takes every core that this process may use.
        api_key_env: the environment variable that holds the key every request must carry.

    Raises:
        InputError: the artifact or an option cannot be used.
        CheckFailedError: a file of the artifact differs from its manifest.
        MmoptError: the address cannot be listened on, or the model does not run here.
    """
    if queue < 1:
        raise InputError(f"--queue is {queue}, expected 1 or more.")
    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}, expected 1 or more.")
    api_key = None if api_key_env is None else _read_key(api_key_env)
    with _bind(host, port) as listener:
        return serve_model(
            Runner(artifact, threads=threads), listener, waiting=queue, api_key=api_key
        )


def serve_model(
    model: Model, listener: socket.socket, *, waiting: int, api_key: str | None = None
) -> ServeReport:
    """Serve an opened model on a bound socket; `serve` says how it ends."""
    require_servable(model.manifest)
    probe(model)  # fails before anything listens; it is also slower than what follows
    began = time.monotonic()
    probe(model)
    queue = RunQueue(waiting, service_seconds=time.monotonic() - began)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(model, queue, api_key=api_key),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    # uvicorn raises the signals that it caught once more after it has stopped, so that they end
    # the process; with this handler they do not, and we end with a report and exit code 0.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _listen(listener)
        url = _url(listener)
        started = time.monotonic()
        print(f"serving {model.manifest.name} at {url}", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    finally:
        queue.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return ServeReport(
        model=model.manifest.name,
        url=url,
        provider=model.provider,
        served=queue.served,
        rejected=queue.rejected,
        abandoned=queue.abandoned,
        failed=queue.failed,
        latency_p50_seconds=queue.median_latency(),
        uptime_seconds=time.monotonic() - started,
    )


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(
            f"--api-key-env names {variable}, which is not set or not printable ASCII, expected "
            f"the key there. Run `export {variable}=...` first."
        )
    return key


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound before the model loads: a port in use is said at once."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port is {port}, expected 0 to 65535.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise MmoptError(
            f"--host {host} is no address of this machine ({error.strerror}), expected one, such "
            "as 127.0.0.1."
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(f"{host}:{port}", error) from error
    return listener


def _listen(listener: socket.socket) -> None:
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _cannot_listen("{}:{}".format(*listener.getsockname()[:2]), error) from error


def _cannot_listen(address: str, error: OSError) -> MmoptError:
    return MmoptError(
        f"cannot listen on {address} ({error.strerror}), expected a free port of this machine. "
        "Stop what uses it, or pass another --port; 0 takes a free one."
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return (
        f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
    )
