"""Serves a logged model over HTTP: MLflow's scoring server, behind limits of size, of time, and of what an error says.

MLFLOW_TRACKING_URI=sqlite:///runs/mlflow.db python eval/server.py models:/demo/1 --port 5001

eval/serving.py logs a model and runs this. Nothing of ours is imported here: MLflow puts the code that was logged with
the model on the path, and that is what answers. What a row may ask for is checked there, by eval/served.py.
"""

import argparse
import asyncio
import codecs
import difflib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlflow
import uvicorn
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from uvicorn.protocols.http.h11_impl import H11Protocol

ROWS, SPLIT = "dataframe_records", "dataframe_split"
MAX_MESSAGE = 500  # characters

logger = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """Of a request and its connection."""

    body: int = 4 << 20  # bytes
    head_seconds: float = 10  # from when a connection is made, or used again, to the end of a request's head
    body_seconds: float = 20  # to the end of its body
    answer_seconds: float = 60  # of the model, the requests before it included
    unread_seconds: float = 30  # that a client does not read the answer
    connections: int = 256


class Refused(Exception):
    """A request that the model is not asked. Its arguments: the HTTP status and the reason."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="URI", help="models:/NAME/VERSION, or the folder of a logged model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine alone")
    parser.add_argument("--port", type=int, default=5001)
    given = parser.parse_args(argv)
    try:
        model = mlflow.pyfunc.load_model(given.model)
    except (MlflowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sys.exit(f"error: {given.model} of {mlflow.get_tracking_uri()} cannot be loaded: {reason}")
    serve(scoring_server.init(model), model.metadata.get_input_schema().input_names(), given.host, given.port)


def serve(app: Callable, columns: Sequence[str], host: str, port: int, limits: Limits = Limits()) -> None:
    """Answers requests until the process is stopped. app, columns: see `guarded`."""
    uvicorn.run(
        guarded(app, columns, limits),
        host=host,
        port=port,
        http=type("Connection", (Connection,), {"limits": limits}),
        ws="none",
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=10,
    )


def guarded(app: Callable, columns: Sequence[str], limits: Limits) -> Callable:
    """An ASGI app that asks `app`, MLflow's, what is within the limits.

    Args:
        columns: that a row may have.
    """

    async def answer(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = {}
        try:
            body = await _read_body(scope, receive, limits)
            if body is None:  # the client went away
                return None
            if scope["path"] == "/invocations" and scope["method"] == "POST":
                _check_type(scope)
                body = body.removeprefix(codecs.BOM_UTF8)  # PowerShell's files begin with one
                _check_body(body, columns)
                others = [header for header in scope["headers"] if header[0] != b"content-type"]
                # MLflow knows one way to write it.
                scope = scope | {"headers": [*others, (b"content-type", b"application/json")]}
            status, headers, answered = await _ask(app, scope, body, receive, limits)
        except Refused as refused:
            status, reason = refused.args
            headers, answered = {b"content-type": b"application/json"}, _error(status, reason)
        if status in (408, 413):
            headers[b"connection"] = b"close"  # the rest of the body is not waited for
        headers[b"content-length"] = str(len(answered)).encode()
        await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
        await send({"type": "http.response.body", "body": answered})

    return answer


async def _read_body(scope: dict, receive: Callable, limits: Limits) -> bytes | None:
    """None: the client went away. Raises Refused for one that is too large or does not come."""
    parts, size = [], 0

    async def read() -> bytes | None:
        nonlocal size
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            # What is too large is read to its end all the same: most clients read no answer before.
            parts.append(part) if size <= limits.body else parts.clear()
            if not message.get("more_body"):
                return b"".join(parts)

    try:
        body = await asyncio.wait_for(read(), limits.body_seconds)
    except TimeoutError:
        if size <= limits.body:
            raise Refused(408, f"the body of the request did not come within {limits.body_seconds:g} seconds") from None
    if size > limits.body:
        raise Refused(413, f"the body of the request is larger than {limits.body:,} bytes; send fewer rows at once")
    return body


def _check_type(scope: dict) -> None:
    given = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    kind, *parameters = [part.strip().lower() for part in given.split(";")]
    charset = [parameter for parameter in parameters if parameter]
    if kind != "application/json" or charset not in ([], ["charset=utf-8"], ['charset="utf-8"']):
        said = f"Content-Type {given[:60]!r}" if given else "no Content-Type"
        raise Refused(415, f"{said}: send JSON in UTF-8, with Content-Type: application/json")


def _check_body(body: bytes, columns: Sequence[str]) -> None:
    """The form alone. Raises Refused."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        request = json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # of digits, nesting, UTF-8 or the grammar
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(request, dict) or len(request) != 1 or not request.keys() <= {ROWS, SPLIT}:
        raise Refused(400, f'the body must be {{"{ROWS}": [{{"history": [...]}}, ...]}} and hold nothing else')
    ((form, rows),) = request.items()
    if form == ROWS:
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Refused(400, f"{ROWS} must be a list of objects, one for each person")
        names, data = {name: None for row in rows for name in row}, rows
    else:
        names, data = (rows.get(part) for part in ("columns", "data")) if isinstance(rows, dict) else (None, None)
        if not isinstance(names, list) or not isinstance(data, list):
            raise Refused(400, f'{SPLIT} must be {{"columns": [...], "data": [[...], ...]}}')
        if any(not isinstance(row, list) or len(row) != len(names) for row in data):
            raise Refused(400, f"{SPLIT}: each row of data must be a list of {len(names)} values, one for each column")
    if not data:
        raise Refused(400, f"{form} holds no rows")
    for name in names:
        if name not in columns:
            near = difflib.get_close_matches(str(name)[:60], columns, n=1, cutoff=0)[0]
            raise Refused(
                400, f"{str(name)[:60]!r} is unknown; did you mean {near!r}? A row may have {', '.join(columns)}"
            )
    if len(set(names)) < len(names):
        raise Refused(400, f"{SPLIT} names a column twice")
    if "history" not in names:
        raise Refused(400, "row 1: history is missing: give at least one item id or text")


async def _ask(
    app: Callable, scope: dict, body: bytes, receive: Callable, limits: Limits
) -> tuple[int, dict[bytes, bytes], bytes]:
    """The status, headers and body of the app's answer. Raises Refused for one that takes too long or fails."""
    given, start, parts = False, {}, []

    async def receive_body() -> dict:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def keep(message: dict) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    try:
        await asyncio.wait_for(app(scope, receive_body, keep), limits.answer_seconds)
    except TimeoutError:
        raise Refused(504, f"there was no answer within {limits.answer_seconds:g} seconds; send fewer rows") from None
    except Exception:
        logger.exception("a request could not be answered")
        raise Refused(500, "the request could not be answered: an error of the server, which its log tells") from None
    status, answered = start["status"], b"".join(parts)
    if status >= 400:
        raise Refused(status, _reason(answered))
    return status, dict(start["headers"]), answered


def _reason(answered: bytes) -> str:
    """What an error of MLflow's says, without the stack trace and the data that it puts before and behind it."""
    try:
        said = json.loads(answered)
        message = said.get("message") or str(said.get("detail", ""))
    except (ValueError, AttributeError):
        said, message = {}, answered.decode(errors="replace")
    if "stack_trace" in said:
        logger.error("a request could not be read:\n%s", said["stack_trace"])
        return "the rows cannot be read: they are not as docs/serving.md says"
    # Of the rows that MLflow repeats before it no line begins so: pandas writes theirs with \n.
    message = message.rpartition("\nError: ")[2]
    return message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."


def _error(status: int, reason: str) -> bytes:
    """As MLflow's clients read it."""
    code = "INTERNAL_ERROR" if status >= 500 else "BAD_REQUEST"
    return json.dumps({"error_code": code, "message": reason}).encode()


class Connection(H11Protocol):
    """uvicorn waits for ever for the head of a request, and for a client that does not read its answer."""

    limits = Limits()
    _head = _unread = None  # timers

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_unread")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel("_head")
        self._cancel("_unread")

    def _watch_head(self) -> None:
        """Many small pieces of one head do not lengthen its time."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel("_head")
        elif self._head is None:
            self._head = self.loop.call_later(self.limits.head_seconds, self.transport.abort)

    def _cancel(self, timer: str) -> None:
        if getattr(self, timer) is not None:
            getattr(self, timer).cancel()
            setattr(self, timer, None)


if __name__ == "__main__":
    main(sys.argv[1:])
