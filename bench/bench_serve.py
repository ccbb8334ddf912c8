"""The serving path without a network: parsing, the session, and a request through the application.

No exact figures: what a request costs in bytes is the client's, and imports have a test.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmopt.serve.app import create_app
from mmopt.serve.protocol import parse_request
from mmopt.serve.queue import RunQueue
from mmopt_export.runtime import Runner

LENGTH = 32


@pytest.fixture(scope="module", params=["fp32", "int8"])
def runner(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Runner:
    """An open artifact, one thread."""
    return Runner(artifacts[request.param], threads=1)


def ids(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 512, size=(rows, LENGTH), dtype=np.int64)


def text_body(rows: int) -> bytes:
    texts = [" ".join(f"w{word}" for word in row) for row in ids(rows)[:, : LENGTH - 2]]
    tensor = {"name": "text", "datatype": "BYTES", "shape": [rows], "data": texts}
    return json.dumps({"id": "1", "inputs": [tensor]}).encode()


def tensor_body(rows: int, runner: Runner) -> bytes:
    tensors = [
        {
            "name": spec.name,
            "datatype": "INT64",
            "shape": [rows, LENGTH],
            "data": (ids(rows) if spec.name == "input_ids" else np.ones((rows, LENGTH), int))
            .ravel()
            .tolist(),
        }
        for spec in runner.manifest.inputs
    ]
    return json.dumps({"id": "1", "inputs": tensors}).encode()


class InProcess:
    """The application on an event loop of its own, called as a server would call it."""

    def __init__(self, runner: Runner) -> None:
        self._loop = asyncio.new_event_loop()
        self._queue = RunQueue(waiting=4, service_seconds=0.01)
        self._app = create_app(runner, self._queue)
        self._path = f"/v2/models/{runner.manifest.name}/infer"

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        return self._loop.run_until_complete(self._post(body))

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-length", str(len(body)).encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        arriving = iter([{"type": "http.request", "body": body, "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            for message in arriving:
                return message
            return await asyncio.Event().wait()  # the client stays

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)

    def close(self) -> None:
        self._queue.close()
        self._loop.close()


@pytest.fixture(scope="module")
def server(runner: Runner) -> Iterator[InProcess]:
    """The application around `runner`."""
    in_process = InProcess(runner)
    yield in_process
    in_process.close()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("form", ["text", "tensors"])
def bench_parse(benchmark: Any, artifacts: dict[str, Path], form: str, rows: int) -> None:
    # Times a body's bytes becoming a checked request.
    benchmark.group = f"serve parse {form}"
    benchmark.extra_info |= {"batch": rows, "length": LENGTH}
    runner = Runner(artifacts["fp32"], threads=1)
    body = text_body(rows) if form == "text" else tensor_body(rows, runner)
    benchmark(lambda: parse_request(body, runner.manifest))


@pytest.mark.parametrize("rows", [1, 8])
def bench_session(benchmark: Any, runner: Runner, rows: int) -> None:
    # Times ONNX Runtime on tensors that exist already.
    benchmark.group = f"serve session batch {rows}"
    benchmark.extra_info |= {"batch": rows, "length": LENGTH}
    feeds = {spec.name: np.ones((rows, LENGTH), np.int64) for spec in runner.manifest.inputs}
    feeds["input_ids"] = ids(rows)
    benchmark(lambda: runner.run(feeds))


@pytest.mark.parametrize("rows", [1, 8])
def bench_request(benchmark: Any, server: InProcess, rows: int) -> None:
    # Times a request of texts through the application: parse, queue, tokenize, run, answer.
    benchmark.group = f"serve request batch {rows}"
    benchmark.extra_info |= {"batch": rows, "length": LENGTH}
    body = text_body(rows)
    status, answer = server.post(body)
    assert status == 200, answer
    benchmark(lambda: server.post(body))
