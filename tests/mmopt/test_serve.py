"""`mmopt serve` as a process on loopback: routes, errors, overload, readiness, drain."""

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import models, pre_tokenizers

from mmopt.serve.app import create_app
from mmopt.serve.protocol import ModelError
from mmopt.serve.queue import RunQueue
from mmopt_export.manifest import record_files
from mmopt_export.runtime import Runner
from tiny_artifacts import make_manifest, text_component

WORDS = ("[PAD]", "[UNK]", "good", "bad", "nan", "hold", "fail", "ready")
INFER = "/v2/models/tiny/infer"

# The command as the user runs it, with a model that can be held and broken from outside: while
# the file `gate` is missing, a text that says "hold" waits for it. What runs is appended to
# `ran`.
HELD_SERVER = """
import sys, time
from pathlib import Path
import typer
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from mmopt.cli import serve as cli
from mmopt.cli.output import command
from mmopt.serve import server

work = Path(sys.argv.pop(1))

class Held(server.Runner):
    broken = False

    def tokenize(self, texts):
        with (work / "ran").open("a") as file:
            file.write(" ".join(texts) + "\\n")
        if "crash" in texts:
            raise RuntimeError("a bug")
        if "fail" in texts:
            self.broken = True
        return super().tokenize(texts)

    def run(self, feeds):
        if self.broken:
            raise Fail("[ONNXRuntimeError] : 1 : FAIL : Status Message: the device is lost")
        if 5 in feeds["input_ids"]:
            limit = time.monotonic() + 20
            while not (work / "gate").exists() and time.monotonic() < limit:
                time.sleep(0.01)
        return super().run(feeds)

server.Runner = Held
typer.run(command(cli.serve))
"""

PLAIN_SERVER = """
import typer
from mmopt.cli.output import command
from mmopt.cli.serve import serve
typer.run(command(serve))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of words: each row's logits are the sum of its words' rows in a table."""
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    folder.mkdir()
    table = np.array(
        [[0, 0], [0, 0], [0, 2], [2, 0], [np.nan, 0], [0, 1], [0, 1], [0, 1]], np.float32
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
            helper.make_node("Mul", ["rows", "column"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "one"], ["logits"], keepdims=0),
        ],
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([2]), "last"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding()
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    make_manifest(
        "tiny",
        {"model": text_component(2)},
        labels=("negative", "positive"),
        max_length=8,
        files=record_files(folder),
    ).write(folder)
    return folder


def text_request(*texts: str, **fields: Any) -> dict[str, Any]:
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}
    return {"inputs": [tensor], **fields}


class Server:
    """A server process; `client` talks to it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=20, trust_env=False)

    def infer(self, *texts: str, **fields: Any) -> httpx.Response:
        return self.client.post(INFER, json=text_request(*texts, **fields))

    def stop(self, number: int = signal.SIGTERM) -> dict[str, Any]:
        """Ask for a clean stop; the report."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        report: dict[str, Any] = json.loads(out)
        return report


@contextmanager
def running(
    artifact: Path, *options: str, work: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server on a free port, with the held model where `work` names its folder."""
    script = [PLAIN_SERVER] if work is None else [HELD_SERVER, str(work)]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", *script, str(artifact)),
            *("--port", "0", "--threads", "1", "--json", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline().strip()
        assert line.startswith("serving tiny at http://127.0.0.1:"), line + process.stderr.read()
        server = Server(process, line.rpartition(" ")[2])
        # Nobody reads further, so whatever it logs must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with server.client:
            yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < limit, "the condition never held"
        time.sleep(0.01)


def ran(work: Path) -> list[str]:
    path = work / "ran"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    """One plain server for all tests that leave it as it is."""
    with running(artifact) as one:
        yield one


def test_text_is_tokenized_and_classified(server: Server) -> None:
    response = server.infer("good", "bad bad good", id="7")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    logits, label, score = document.pop("outputs")
    assert document == {"model_name": "tiny", "id": "7"}
    assert logits["data"] == [0, 2, 4, 2]
    assert label["data"] == ["positive", "negative"]
    assert score["data"] == pytest.approx([1 / (1 + np.exp(-2))] * 2)


def test_tensors_give_the_same_answer_as_their_text(server: Server) -> None:
    inputs = [
        {"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "data": [2, 0, 0, 3, 3, 2]},
        {
            "name": "attention_mask",
            "shape": [2, 3],
            "datatype": "INT64",
            "data": [[1, 0, 0], [1, 1, 1]],
        },
    ]
    response = server.client.post(INFER, json={"inputs": inputs})
    assert response.json() == server.infer("good", "bad bad good").json()


def test_only_the_selected_outputs_are_returned(server: Server) -> None:
    response = server.infer("good", outputs=[{"name": "label"}])
    assert response.json()["outputs"] == [
        {"name": "label", "shape": [1], "datatype": "BYTES", "data": ["positive"]}
    ]


def test_metadata_and_health_routes_answer(server: Server) -> None:
    get = server.client.get
    assert get("/v2").json()["name"] == "mmopt"
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    assert get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    metadata = get("/v2/models/tiny").json()
    assert metadata["parameters"]["provider"] == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/other", 404, "there is no model 'other' here, expected 'tiny'"),
        ("GET", "/v2/models/other/ready", 404, "there is no model 'other' here"),
        ("POST", "/v2/models/other/infer", 404, "there is no model 'other' here"),
        ("GET", "/metrics", 404, "there is nothing at /metrics, expected a path of the V2"),
        ("GET", INFER, 405, "Method Not Allowed"),
        ("POST", INFER, 400, "the body is not JSON"),
    ],
)
def test_a_wrong_route_is_a_json_error(
    server: Server, method: str, path: str, status: int, message: str
) -> None:
    response = server.client.request(method, path)
    assert response.status_code == status
    assert message in response.json()["error"]


def test_a_token_beyond_the_vocabulary_is_the_clients_error(server: Server) -> None:
    inputs = [
        {"name": name, "shape": [1, 1], "datatype": "INT64", "data": [8]}
        for name in ("input_ids", "attention_mask")
    ]
    response = server.client.post(INFER, json={"inputs": inputs})
    assert response.status_code == 400
    assert "out of data bounds" in response.json()["error"]


def test_a_nan_is_a_500_and_not_invalid_json(server: Server) -> None:
    response = server.infer("nan")
    assert response.status_code == 500
    assert "logits holds NaN or infinity" in response.json()["error"]
    assert server.infer("good").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_cap_is_413(server: Server, chunked: bool) -> None:
    body = b" " * ((4 << 20) + 1)
    parts = (body[start : start + 65536] for start in range(0, len(body), 65536))
    # One client per request: the server answers before it has read the body, and closes.
    response = httpx.post(server.url + INFER, content=parts if chunked else body, trust_env=False)
    assert response.status_code == 413
    assert f"expected at most {4 << 20} bytes" in response.json()["error"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"Content-Encoding": "gzip"}, "Content-Encoding is 'gzip', expected none"),
        ({"Inference-Header-Content-Length": "10"}, "binary tensors, expected JSON data"),
    ],
)
def test_compressed_and_binary_bodies_are_refused_by_name(
    server: Server, header: dict[str, str], message: str
) -> None:
    response = server.client.post(INFER, content=b"{}", headers=header)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_every_route_asks_for_the_key(artifact: Path) -> None:
    with running(artifact, "--api-key-env", "TINY_KEY", env={"TINY_KEY": "s3cret"}) as server:
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny", "/x"):
            assert server.client.get(path).status_code == 401
        server.client.headers["Authorization"] = "Bearer s3cre"
        assert server.infer("good").status_code == 401
        server.client.headers["Authorization"] = "Bearer s3cret"
        assert server.infer("good").status_code == 200


def test_a_full_queue_answers_503_with_retry_after(artifact: Path, tmp_path: Path) -> None:
    with (
        running(artifact, "--queue", "1", work=tmp_path) as server,
        ThreadPoolExecutor(3) as threads,
    ):
        first = threads.submit(server.infer, "hold")
        wait_until(lambda: "hold" in ran(tmp_path))
        # One runs and one may wait, so of two more exactly one is refused, at once.
        answers: queue.Queue[httpx.Response] = queue.Queue()
        others = [threads.submit(lambda: answers.put(server.infer("good"))) for _ in range(2)]
        refused = answers.get(timeout=10)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "all 2 places in the queue are taken" in refused.json()["error"]
        (tmp_path / "gate").touch()
        assert answers.get(timeout=10).status_code == 200
        assert first.result().status_code == 200
        for other in others:
            other.result()
        report = server.stop()
    assert (report["served"], report["rejected"], report["failed"]) == (2, 1, 0)
    assert report["latency_p50_seconds"] > 0
    assert report["uptime_seconds"] > 0


def test_a_request_whose_client_left_never_runs(artifact: Path, tmp_path: Path) -> None:
    with running(artifact, work=tmp_path) as server, ThreadPoolExecutor(1) as threads:
        held = threads.submit(server.infer, "hold")
        wait_until(lambda: "hold" in ran(tmp_path))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + INFER, json=text_request("bad"), timeout=0.5, trust_env=False)
        time.sleep(0.2)  # for the server to see the closed connection
        (tmp_path / "gate").touch()
        assert held.result().status_code == 200
        assert server.infer("good").status_code == 200
        report = server.stop()
    assert "bad" not in ran(tmp_path)
    assert (report["served"], report["abandoned"]) == (2, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains_what_was_accepted_and_accepts_no_more(
    artifact: Path, tmp_path: Path, number: int
) -> None:
    with running(artifact, work=tmp_path) as server, ThreadPoolExecutor(2) as threads:
        held = threads.submit(server.infer, "hold")
        wait_until(lambda: "hold" in ran(tmp_path))
        waiting = threads.submit(server.infer, "bad")
        time.sleep(0.3)  # for the second request to arrive
        server.process.send_signal(number)

        def refuses() -> bool:
            try:
                httpx.get(server.url + "/v2/health/live", timeout=2, trust_env=False)
            except httpx.ConnectError:
                return True
            except httpx.TransportError:
                return False  # the stop cut this very connection, before its request arrived
            return False

        wait_until(refuses)
        (tmp_path / "gate").touch()
        assert held.result().status_code == 200
        assert waiting.result().status_code == 200
        out, _ = server.process.communicate(timeout=30)
        assert server.process.returncode == 0
    report = json.loads(out)
    assert report["served"] == 2
    assert report["model"] == "tiny"


def test_readiness_is_lost_with_the_session(artifact: Path, tmp_path: Path) -> None:
    with running(artifact, work=tmp_path) as server:
        assert server.client.get("/v2/health/ready").status_code == 200
        failed = server.infer("fail")
        assert failed.status_code == 500
        assert failed.json()["error"].startswith(
            "ONNX Runtime failed on CPUExecutionProvider: the device is lost."
        )
        # No success since the failure, so readiness runs an inference and finds out.
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            response = server.client.get(path)
            assert response.status_code == 503
            assert response.json()["ready"] is False
            assert "the device is lost" in response.json()["error"]
        assert server.client.get("/v2/health/live").status_code == 200
        report = server.stop()
    assert (report["served"], report["failed"]) == (0, 1)


def test_a_bug_is_a_json_500_and_the_server_lives_on(artifact: Path, tmp_path: Path) -> None:
    with running(artifact, work=tmp_path) as server:
        response = httpx.post(
            server.url + INFER, json=text_request("crash"), timeout=20, trust_env=False
        )
        assert response.status_code == 500
        assert "Its log on stderr says why" in response.json()["error"]
        assert "bug" not in response.text
        assert server.infer("good").status_code == 200
        report = server.stop()
    assert (report["served"], report["failed"]) == (1, 1)


def test_readiness_does_not_hang_with_the_session(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmopt.serve.app._PROBE_SECONDS", 0.5)
    released = threading.Event()

    class Hung(Runner):
        def run(self, feeds: Any) -> Any:
            released.wait(20)
            return super().run(feeds)

    async def ask_twice() -> list[httpx.Response]:
        runs = RunQueue(4, service_seconds=0.01)
        transport = httpx.ASGITransport(create_app(Hung(artifact, threads=1), runs))
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            answers = [await client.get("/v2/health/ready")]
            released.set()
            answers.append(await client.get("/v2/health/ready"))
        runs.close()
        return answers

    hung, well = asyncio.run(ask_twice())
    assert hung.status_code == 503
    assert hung.json() == {"error": "an inference took more than 0.5 s.", "ready": False}
    assert well.status_code == 200


def run_plain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PLAIN_SERVER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_proof_of_readiness_grows_old(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A success of a while ago is asked for again, and a probe counts as no request."""
    runner = Runner(artifact)
    runs = RunQueue(1, 0.1)
    probed: list[float] = []
    monkeypatch.setattr("mmopt.serve.app.probe", lambda _model: probed.append(time.monotonic()))

    async def ask(age: float) -> int:
        runs.last_success = time.monotonic() - age
        transport = httpx.ASGITransport(create_app(runner, runs))
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return (await client.get("/v2/health/ready")).status_code

    try:
        for age, probes in ((1.0, 0), (6.0, 1)):
            assert asyncio.run(ask(age)) == 200
            assert len(probed) == probes
        assert runs.served == 0
    finally:
        runs.close()


def test_a_probe_that_failed_is_tried_again(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = RunQueue(1, 0.1)
    faults = iter([ModelError("the device is lost"), None])

    def probe(_model: Any) -> None:
        if fault := next(faults):
            raise fault

    monkeypatch.setattr("mmopt.serve.app.probe", probe)

    async def ask_twice() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(Runner(artifact), runs))
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            return [await client.get("/v2/health/ready") for _ in range(2)]

    try:
        lost, back = asyncio.run(ask_twice())
    finally:
        runs.close()
    assert (lost.status_code, lost.json()["error"]) == (503, "the device is lost")
    assert back.status_code == 200


def test_a_port_in_use_is_one_message_and_exit_3(artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_plain(str(artifact), "--port", port)
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queue", "0"], "--queue is 0, expected 1 or more"),
        (["--threads", "0"], "--threads is 0, expected 1 or more"),
        (["--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY, which is not set"),
    ],
)
def test_a_wrong_option_is_one_message_and_exit_2(
    artifact: Path, options: list[str], message: str
) -> None:
    result = run_plain(str(artifact), *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_serve_extra_the_message_names_it(missing: str) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules[{missing!r}] = None\n{PLAIN_SERVER}",
            "somewhere",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 3
    assert f"{missing} is not installed" in result.stderr
    assert "pip install 'mmopt[serve]'" in result.stderr
