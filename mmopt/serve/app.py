"""The routes: a Starlette application around one model and its queue."""

import asyncio
import hmac
import json
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mmopt.serve.protocol import (
    MAX_BODY_BYTES,
    InferRequest,
    Model,
    ModelError,
    RequestError,
    infer,
    infer_response,
    model_metadata,
    parse_request,
)
from mmopt.serve.queue import QueueFullError, RunQueue
from mmopt_kernels import __version__
from mmopt_kernels.errors import MmoptError

T = TypeVar("T")

# A client that sends slower holds a place that others wait for. 4 MiB in 10 s is 3.4 Mbit/s.
_BODY_SECONDS = 10.0

# An inference that succeeded this recently is proof enough that the next one will; it keeps
# frequent probes of a busy server out of the queue.
_READY_SECONDS = 5.0

# A probe that takes longer finds the server not ready, whether the session hangs or the queue is
# this slow. Kubernetes waits 1 s unless told otherwise.
_PROBE_SECONDS = 10.0

_PROBE = InferRequest(id=None, texts=("ready",), feeds=None, outputs=())


def create_app(model: Model, queue: RunQueue, *, api_key: str | None = None) -> Starlette:
    """The application that serves `model`.

    Args:
        model: an opened artifact; only the queue's worker thread runs it.
        queue: its owner closes it after the server has stopped.
        api_key: what every request must carry as `Authorization: Bearer`; None asks for none.
    """
    name = model.manifest.name
    readiness = _Readiness(model, queue)

    async def server(_request: Request) -> Response:
        return _json({"name": "mmopt", "version": __version__, "extensions": []})

    async def live(_request: Request) -> Response:
        return _json({"live": True})

    async def ready(_request: Request) -> Response:
        return await readiness.answer({})

    async def model_ready(request: Request) -> Response:
        _require_model(request, name)
        return await readiness.answer({"name": name})

    async def metadata(request: Request) -> Response:
        _require_model(request, name)
        return _json(model_metadata(model))

    async def infer_route(request: Request) -> Response:
        _require_model(request, name)
        with queue.place():
            parsed = parse_request(await _read_body(request), model.manifest)
            outputs = await _unless_gone(request, queue.run(lambda: run_request(model, parsed)))
        return _json(infer_response(name, parsed.id, outputs))

    return Starlette(
        routes=[
            Route("/v2", server),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            Route("/v2/models/{name}", metadata),
            Route("/v2/models/{name}/ready", model_ready),
            Route("/v2/models/{name}/infer", infer_route, methods=["POST"]),
        ],
        middleware=[] if api_key is None else [Middleware(_RequireKey, api_key=api_key)],
        exception_handlers={
            RequestError: _bad_request,
            QueueFullError: _queue_full,
            ModelError: _model_failed,
            ClientDisconnect: _client_gone,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
    )


def run_request(model: Model, request: InferRequest) -> list[dict[str, Any]]:
    """Run a request on the calling thread and return the `outputs` of its response.

    Raises:
        RequestError: ONNX Runtime refuses the values, a token id beyond the vocabulary say.
        ModelError: the run fails (out of memory, say), or the output is not finite.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        return infer(model, request)
    except state.InvalidArgument as error:
        raise RequestError(f"the model refuses the input: {_reason(error)}") from error
    except (state.EPFail, state.Fail, state.NotImplemented, state.RuntimeException) as error:
        raise ModelError(
            f"ONNX Runtime failed on {model.provider}: {_reason(error)}. Run `mmopt doctor`."
        ) from error


def _reason(error: Exception) -> str:
    """What ONNX Runtime says, without the name of the node and the like before it."""
    return str(error).rpartition("Status Message: ")[2]


def probe(model: Model) -> None:
    """Run one short text; raises whatever keeps the model from answering."""
    run_request(model, _PROBE)


class _Readiness:
    """Whether the model answers, found out by a real inference on its declared provider."""

    def __init__(self, model: Model, queue: RunQueue) -> None:
        self._model = model
        self._queue = queue
        self._probing: asyncio.Task[None] | None = None

    async def answer(self, document: dict[str, Any]) -> Response:
        """`document` with 200 when the model answers, with 503 and the reason otherwise."""
        proof = self._queue.last_success
        if proof is not None and time.monotonic() - proof < _READY_SECONDS:
            return _json({**document, "ready": True})
        # Whoever asks meanwhile shares the probe. It is not cancelled when it takes too long: a
        # run that hangs cannot be, and this answer must not hang with it.
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())
        probing = self._probing
        await asyncio.wait({probing}, timeout=_PROBE_SECONDS)
        retry_after = None
        if not probing.done():
            reason = f"an inference took more than {_PROBE_SECONDS:g} s."
        elif (error := probing.exception()) is None:
            return _json({**document, "ready": True})
        elif isinstance(error, MmoptError):
            reason = str(error)
            retry_after = error.retry_after if isinstance(error, QueueFullError) else None
        else:
            raise error
        return _error(503, reason, retry_after=retry_after, **document, ready=False)

    async def _probe(self) -> None:
        with self._queue.place():
            await self._queue.run(lambda: probe(self._model), counts=False)


async def _read_body(request: Request) -> bytes:
    """The body, read only as far as the cap."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RequestError(f"Content-Encoding is {encoding!r}, expected none. Send plain JSON.")
    if "inference-header-content-length" in request.headers:
        raise RequestError(
            "the request holds binary tensors, expected JSON data. With tritonclient pass "
            "binary_data=False."
        )
    too_large = HTTPException(
        413, f"the body is too large, expected at most {MAX_BODY_BYTES} bytes. Send fewer rows."
    )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise HTTPException(
            408, f"the body did not arrive within {_BODY_SECONDS:.0f} s. Send it faster."
        ) from None
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up first."""
    running = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hangs_up(request))
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            running.cancel()
            await asyncio.wait({running})  # a run that has begun keeps its place to the end
            raise ClientDisconnect
        return running.result()
    finally:
        running.cancel()
        gone.cancel()


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _require_model(request: Request, name: str) -> None:
    asked = request.path_params["name"]
    if asked != name:
        raise HTTPException(404, f"there is no model {asked!r} here, expected {name!r}.")


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return Response(content, status, headers, media_type="application/json")


def _error(status: int, message: str, *, retry_after: int | None = None, **fields: Any) -> Response:
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return _json({"error": message, **fields}, status, headers)


async def _bad_request(_request: Request, error: Exception) -> Response:
    return _error(400, str(error))


async def _queue_full(_request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    return _error(503, str(error), retry_after=error.retry_after)


async def _model_failed(_request: Request, error: Exception) -> Response:
    return _error(500, str(error))


async def _client_gone(_request: Request, _disconnect: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; 499 is what nginx logs for this


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and "name" not in request.path_params:
        message = f"there is nothing at {request.url.path}, expected a path of the V2 protocol."
    return _json({"error": message}, error.status_code, dict(error.headers or {}))


async def _internal_error(_request: Request, _unexpected: Exception) -> Response:
    # Starlette raises it again behind the response, and uvicorn logs the traceback on stderr.
    return _error(500, "the server failed to answer. Its log on stderr says why.")


class _RequireKey:
    """Answers 401 unless the request carries the key, whatever the route."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                response = _error(
                    401, "the API key is missing or wrong, expected Authorization: Bearer KEY."
                )
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
