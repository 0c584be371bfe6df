"""The limits around MLflow's app, with another app behind them and limits that a test can wait for."""

import asyncio
import codecs
import contextlib
import json
import socket
import time

import pytest
import uvicorn

from eval.server import Connection, Limits, guarded

LIMITS = Limits(body=1000, head_seconds=1.5, body_seconds=1.5, answer_seconds=1.5, unread_seconds=1.5)
COLUMNS = ("history", "k", "exclude")
TRACE = 'Traceback (most recent call last):\n  File "/srv/code/eval/served.py", line 7'


async def app(scope: dict, receive, send) -> None:
    """Answers with the body that it got, or as its path says."""
    body, status = (await receive())["body"], 200
    if scope["path"] == "/slow":
        await asyncio.sleep(60)
    if scope["path"] == "/broken":
        raise KeyError("secret")
    if scope["path"] == "/trace":
        status, body = 400, json.dumps({"message": "no", "stack_trace": TRACE}).encode()
    if scope["path"] == "/repeats":
        message = "Failed to predict data 'history\n0 [i3]'. \nError: row 1: no such item " + "x" * 100_000
        status, body = 400, json.dumps({"message": message}).encode()
    if scope["path"] == "/much":
        body = b"x" * (64 << 20)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


async def exchange(port: int, *pieces: bytes, pause: float = 0) -> tuple[int, str, float]:
    """Sends them, the last of them as the last; HTTP status, body, seconds. Status 0: closed without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begin = time.monotonic()
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = await asyncio.wait_for(reader.read(1 << 20), 20)
    seconds = time.monotonic() - begin
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body.decode(), seconds


def post(path: str, body: bytes, length: int | None = None, kind: str = "application/json") -> bytes:
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body


def serving(work) -> None:
    """Awaits work(port), with the app served there."""

    async def both() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(
                guarded(app, COLUMNS, LIMITS),
                port=port,
                http=type("Quick", (Connection,), {"limits": LIMITS}),
                ws="none",
                log_level="critical",
            )
        )
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            await work(port)
        finally:
            server.should_exit = True
            await running

    asyncio.run(both())


def test_what_is_within_the_limits_goes_through():
    async def work(port: int) -> None:
        body = b'{"dataframe_records": [{"history": ["i3"], "k": 2}, {"history": ["x"]}]}'
        assert (await exchange(port, post("/invocations", body)))[:2] == (200, body.decode())
        in_parts = post("/invocations", body)
        assert (await exchange(port, in_parts[:90], in_parts[90:120], in_parts[120:], pause=0.1))[:2] == (
            200,
            body.decode(),
        )
        capitals = post("/invocations", codecs.BOM_UTF8 + body, kind='APPLICATION/JSON; charset="UTF-8"')
        assert (await exchange(port, capitals))[:2] == (200, body.decode())
        assert (await exchange(port, b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 200

    serving(work)


def test_clients_that_stop_in_the_middle_hold_nothing():
    """Half a head, half a body, half of another request, an answer that is not read."""

    async def halves(port: int) -> None:
        half = post("/invocations", b'{"dataframe_records": [', 500)
        stops = [[half], [b""], [b"POST /invocations HT"], [b"G", *[b"E"] * 100]]
        answers = await asyncio.gather(*(exchange(port, *pieces, pause=0.02) for pieces in stops))
        assert [status for status, _, _ in answers] == [408, 0, 0, 0]
        assert "did not come within 1.5 seconds" in answers[0][1]
        assert all(1 < seconds < 15 for _, _, seconds in answers)

    async def half_of_another(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\nGET /pi")
        assert b"200 OK" in await asyncio.wait_for(reader.read(1 << 20), 15)
        with contextlib.suppress(ConnectionError):
            while await asyncio.wait_for(reader.read(1 << 20), 15):
                pass

    async def unread(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(post("/much", b"{}"))
        await asyncio.sleep(4)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(64 << 20)

    async def work(port: int) -> None:
        await asyncio.gather(halves(port), half_of_another(port), unread(port))

    serving(work)


REFUSED = [
    (post("/invocations", b"x" * 5000), 413, "the body of the request is larger than 1,000 bytes"),
    (post("/invocations", b"x" * 5000, 6000), 413, "larger than 1,000 bytes"),
    (post("/ping", b"x" * 5000), 413, "larger than 1,000 bytes"),
    (post("/invocations", b"history\ni3", kind="text/csv"), 415, "Content-Type 'text/csv': send JSON in UTF-8"),
    (post("/invocations", b"{}", kind="application/json; charset=latin-1"), 415, "send JSON in UTF-8"),
    (post("/invocations", b"{}", kind="x" * 5000), 415, "Content-Type 'xxxxx"),
    (post("/invocations", b""), 400, "the body is not JSON"),
    (post("/invocations", b'{"dataframe_records": [{"history": [Infinity]}]}'), 400, "Infinity is no JSON"),
    (post("/invocations", b'"caf\xe9"'), 400, "the body is not JSON"),
    (post("/invocations", b"[1]"), 400, "the body must be"),
    (post("/invocations", b'{"instances": [{"history": ["i3"]}]}'), 400, "the body must be"),
    (post("/invocations", b'{"dataframe_records": [], "params": {}}'), 400, "the body must be"),
    (post("/invocations", b'{"dataframe_records": []}'), 400, "dataframe_records holds no rows"),
    (post("/invocations", b'{"dataframe_records": {"history": []}}'), 400, "must be a list of objects"),
    (post("/invocations", b'{"dataframe_records": [["i3"]]}'), 400, "must be a list of objects"),
    (post("/invocations", b'{"dataframe_records": [{"histori": ["i3"]}]}'), 400, "did you mean 'history'?"),
    (post("/invocations", b'{"dataframe_records": [{"k": 1}]}'), 400, "row 1: history is missing"),
    (post("/invocations", b'{"dataframe_split": {"columns": ["k", 7], "data": [[1, 2]]}}'), 400, "'7' is unknown"),
    (
        post("/invocations", b'{"dataframe_split": {"columns": ["history"], "data": [7]}}'),
        400,
        "a list of 1 values",
    ),
    (post("/invocations", b'{"dataframe_split": {"columns": ["k", "k"], "data": [[1, 2]]}}'), 400, "twice"),
    (post("/invocations", b'{"dataframe_split": [1]}'), 400, "dataframe_split must be"),
    (post("/slow", b"{}"), 504, "there was no answer within 1.5 seconds"),
    (post("/broken", b"{}"), 500, "an error of the server, which its log tells"),
    (post("/trace", b"{}"), 400, "the rows cannot be read"),
    (post("/repeats", b"{}"), 400, '"row 1: no such item xxx'),
]


def test_what_is_not_is_refused_in_few_words():
    async def work(port: int) -> None:
        answers = await asyncio.gather(*(exchange(port, request) for request, _, _ in REFUSED))
        for (request, status, reason), (found, body, seconds) in zip(REFUSED, answers, strict=True):
            assert (found, reason in body.replace('\\"', '"')) == (status, True), (request[:200], body)
            assert len(body) < 700
            assert "secret" not in body
            assert "/srv" not in body
            assert seconds < 15

    serving(work)
