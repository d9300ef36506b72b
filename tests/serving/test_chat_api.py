"""What clients send to a server, and what they get: answers, or errors in OpenAI's form."""

import asyncio
import base64
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.inference.questions import as_records
from raytrain2p.serving.chat_api import ChatApi
from raytrain2p.serving.guard import digest_of_token
from raytrain2p.serving.limits import Limits
from raytrain2p.serving.model import LoadedModel
from tests.serving.serving import ModelHere, Server, image_url, png, request, served, with_image
from tests.waiting import until

LIMITS = Limits(max_queue=4, max_tokens=12, request_bytes=300_000, values=100_000, characters=500, seconds_to_send=0.6)
TOKEN = "a token that nobody guesses"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelHere:
    return ModelHere(LoadedModel(tiny_model))


@pytest.fixture(scope="module")
def running(model: ModelHere) -> Iterator[tuple[Server, ChatApi]]:
    with served(model, LIMITS) as found:
        yield found


@pytest.fixture(autouse=True, scope="module")
def impatient() -> Iterator[None]:
    """Tests of clients that do not send on wait for less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raytrain2p.serving.guard.SECONDS_TO_DISCARD", 0.2)
        yield


@pytest.fixture
def server(running: tuple[Server, ChatApi]) -> Server:
    return running[0]


def expected(model: ModelHere, question: Any, image: bytes | None = None, most: int = 12) -> str:
    fields = {"instruction": question} | ({"image": image} if image else {})
    (answer,) = model.model.loading.result().answers(as_records([fields]), 1, most)
    return answer


def test_an_answer_is_the_predictors_own_and_counts_its_tokens(server: Server, model: ModelHere) -> None:
    reply = server.ask(with_image("Which colour?", image_url(png("blue"))))
    assert reply.status == 200
    assert reply.text == expected(model, "Which colour?<image>", png("blue"))
    found = reply.json
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"
    assert found["choices"][0]["finish_reason"] == "length"
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] > 20
    assert reply.headers["content-security-policy"] == "default-src 'none'"


def test_two_images_give_two_answers_and_the_most_tokens_are_heeded(server: Server, model: ModelHere) -> None:
    texts = {server.ask(with_image("Which?", image_url(png(colour)))).text for colour in ("black", "white")}
    assert len(texts) == 2, "the model sees the images"
    short = server.ask("Which?", max_tokens=3)
    assert short.text == expected(model, "Which?", most=3)
    assert server.ask("Which?", max_completion_tokens=3).text == short.text


def test_a_stream_has_the_same_text_in_pieces(server: Server) -> None:
    question = with_image("Which colour?", image_url(png("green")))
    whole = server.ask(question)
    reply = server.ask(question, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text == whole.text
    events = reply.events
    assert len(events) > 4
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events[-2:-1]] == ["length"]
    assert events[-1] == events[-1] | {"choices": [], "usage": whole.json["usage"], "object": "chat.completion.chunk"}
    assert {event["id"] for event in events} == {events[0]["id"]}


def test_a_conversation_goes_on_after_earlier_answers(server: Server) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image_url(png()), "detail": "low"}}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure?"},
    ]
    body = {"model": "tiny", "messages": messages, "temperature": 0.7, "seed": 1, "n": 1, "stop": None, "presence_penalty": 0.0}
    assert server.post(json.dumps(body).encode()).status == 200


FILES = (
    "/etc/hostname",
    "etc/hostname",
    "../model.pt",
    "file:///etc/hostname",
    "FILE:///etc/hostname",
    "http://127.0.0.1:9/a.png",
    "//h/a.png",
)


@pytest.mark.parametrize("url", [*FILES, "https://example.com/a.png", "ftp://x/y", "\\\\host\\a.png", "", " data:image/png;base64,QUFB"])
def test_what_names_a_file_or_an_address_is_refused_and_no_file_is_opened(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def note(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(str(self))
        raise AssertionError(self)

    for name in ("open", "is_file", "read_bytes", "stat"):
        monkeypatch.setattr(Path, name, note)
    forms: list[Any] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "image": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": url}},
    ]
    replies = [server.ask([{"type": "text", "text": "What?"}, form]) for form in forms]
    monkeypatch.undo()
    assert [reply.status for reply in replies] == [400] * len(forms)
    assert {reply.error["code"] for reply in replies} <= {"invalid_messages", "invalid_media"}  # `etc/hostname` is also base64
    assert opened == []


def test_an_existing_image_is_refused_by_its_path_and_by_its_name(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    for url in (str(tmp_path / "cat.png"), "cat.png", f"file://{tmp_path}/cat.png"):
        reply = server.ask(with_image("What?", url))
        assert (reply.status, reply.error["code"]) == (400, "invalid_messages")
        assert "is not a data URL" in reply.error["message"]


def bomb(width: int, height: int) -> bytes:
    """A small PNG of many black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"\0" * min(height * (width + 1), 1 << 22), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD: dict[str, tuple[bytes, int, str]] = {
    "no body": (b"", 400, "invalid_json"),
    "not JSON": (b"{", 400, "invalid_json"),
    "not UTF-8": (b'{"messages": "\xff"}', 400, "invalid_json"),
    "NaN": (b'{"messages": [], "temperature": NaN}', 400, "invalid_json"),
    "a long number": (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    "deep": (DEEP, 400, "invalid_json"),
    "a list": (b"[]", 400, "invalid_type"),
    "no messages": (b"{}", 400, "missing_parameter"),
    "messages of text": (b'{"messages": "Hello"}', 400, "invalid_messages"),
    "empty messages": (b'{"messages": []}', 400, "invalid_messages"),
    "messages of numbers": (b'{"messages": [1]}', 400, "invalid_messages"),
    "an unknown role": (b'{"messages": [{"role": "tool", "content": "x"}]}', 400, "invalid_messages"),
    "ends with the assistant": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        400,
        "invalid_messages",
    ),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_messages"),
    "a special token": (request("<|im_end|>"), 400, "invalid_messages"),
    "an unknown key": (request("x", teperature=1), 400, "unknown_parameter"),
    "a strange key": (request("x", **{"ab\ud800" * 50: 1}), 400, "unknown_parameter"),
    "several answers": (request("x", n=2), 400, "unsupported_parameter"),
    "tools": (request("x", tools=[{}]), 400, "unsupported_parameter"),
    "true for 1": (request("x", n=True), 400, "unsupported_parameter"),
    "another model": (request("x", model="gpt-4o"), 404, "model_not_found"),
    "a model of a list": (request("x", model=[]), 404, "model_not_found"),
    "no tokens": (request("x", max_tokens=0), 400, "invalid_value"),
    "many tokens": (request("x", max_tokens=13), 400, "invalid_value"),
    "tokens of text": (request("x", max_tokens="3"), 400, "invalid_value"),
    "tokens of true": (request("x", max_tokens=True), 400, "invalid_value"),
    "stream of text": (request("x", stream="yes"), 400, "invalid_type"),
    "options of text": (request("x", stream_options="x"), 400, "invalid_value"),
    "long text": (request("x" * 501), 400, "context_length_exceeded"),
    "a long prompt": (request("x" * 300), 400, "context_length_exceeded"),
    "torn base64": (request(with_image("x", image_url(png())[:-5])), 400, "invalid_messages"),
    "no base64": (request(with_image("x", "data:image/png,abc")), 400, "invalid_messages"),
    "text as an image": (request(with_image("x", "data:image/png;base64,QUFB")), 400, "invalid_media"),
    "half an image": (request(with_image("x", image_url(png()[:-60]))), 400, "invalid_media"),
    "a huge image": (request(with_image("x", image_url(bomb(400, 400)))), 400, "media_too_large"),
    "a bomb": (request(with_image("x", image_url(bomb(60_000, 60_000)))), 400, "invalid_media"),
    "many images": (
        request([*with_image("x", image_url(png(size=(200, 200)))), *with_image("y", image_url(png(size=(250, 250))))]),
        400,
        "media_too_large",
    ),
    "sound": (request([{"type": "input_audio", "input_audio": {"data": "QUFB", "format": "wav"}}]), 400, "invalid_media"),
    "a part of a list": (request([[]]), 400, "invalid_messages"),
    "an url of a number": (request(with_image("x", 7)), 400, "invalid_messages"),  # type: ignore[arg-type]
    "a large body": (request("x", user="y" * 400_000), 413, "request_too_large"),
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bad_request_is_refused_with_what_is_wrong(server: Server, name: str, stream: bool) -> None:
    body, status, code = BAD[name]
    if stream:
        body = body.replace(b'{"messages"', b'{"stream": true, "messages"', 1)
    reply = server.post(body)
    assert (reply.status, reply.error["code"]) == (status, code), reply.content
    assert server.ask("Still there?", max_tokens=1).status == 200


def test_another_kind_of_content_is_refused_for_a_web_page_can_send_it_unasked(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert server.post(request("x"), Content_Type=kind).status == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/", 405),
        ("GET", "/docs", 404),
        ("GET", "/../../etc/passwd", 404),
    ],
)
def test_a_wrong_route_is_an_error_in_the_same_form(server: Server, method: str, path: str, status: int) -> None:
    reply = server.send(method, path)
    assert (reply.status, reply.error["type"]) == (status, "invalid_request_error")


def test_a_name_of_another_host_is_refused_so_that_no_page_can_lead_its_visitor_here(server: Server) -> None:
    assert server.get("/v1/models", Host="evil.example:8000").status == 403
    assert server.get("/v1/models", Host="localhost").status == 200
    assert server.get("/v1/models", Host="[::1]:8000").status == 200


def test_a_chunked_body_that_grows_too_large_is_refused_on_the_way(server: Server) -> None:
    connection = server.connection()
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(7):
        connection.send(b"c350\r\n" + b"x" * 50_000 + b"\r\n")
    assert connection.getresponse().status == 413
    connection.close()


def half_sent(server: Server) -> socket.socket:
    """A connection with the head of a request and half of its body."""
    half = socket.create_connection((server.host, server.port))
    body = request("x" * 100)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    half.sendall(head.encode() + body[:50])
    return half


def test_a_body_that_does_not_arrive_is_given_up(server: Server) -> None:
    half = half_sent(server)
    half.settimeout(10)
    assert b"408 Request Timeout" in half.recv(1000)
    half.close()


def test_one_more_than_the_queue_takes_gets_429_and_an_answer_later(model: ModelHere, running: tuple[Server, ChatApi]) -> None:
    server, api = running
    until(lambda: api.busy == 0)
    model.held.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(server.ask, f"Question {number}", max_tokens=2) for number in range(4)]
        until(lambda: api.busy == 4)
        refused = server.ask("One more")
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (429, "queue_full", "1")
        assert "raytrain2p_queue 4.0" in server.get("/metrics").content.decode()
        assert server.get("/healthz").status == 200
        model.held.set()
        assert [one.result().status for one in waiting] == [200] * 4
    assert server.ask("One more", max_tokens=2).status == 200


def test_clients_that_go_away_leave_no_place_taken(model: ModelHere, running: tuple[Server, ChatApi]) -> None:
    server, api = running
    half = half_sent(server)
    until(lambda: api.busy == 1)
    half.close()
    until(lambda: api.busy == 0)
    closed = model.closed
    connection = server.connection()
    connection.request("POST", "/v1/chat/completions", request("Hello", stream=True), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.read(1)
    connection.close()
    until(lambda: api.busy == 0 and model.closed == closed + 1)


def test_with_a_token_all_but_the_page_and_the_probes_need_it(model: ModelHere) -> None:
    with served(model, LIMITS, digest_of_token(TOKEN)) as (server, _):
        assert [server.get(path).status for path in ("/", "/healthz", "/readyz")] == [200] * 3
        for wrong in (
            {},
            {"Authorization": "Bearer x"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer " + "\xe9"},
        ):
            for reply in (server.get("/v1/models", **wrong), server.get("/metrics", **wrong), server.post(b"{", **wrong)):
                assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
        server.token = TOKEN
        assert server.get("/v1/models", Host="any.example").json["data"][0]["id"] == "tiny"
        assert server.ask("Hello", max_tokens=2).status == 200


def test_it_is_alive_at_once_and_ready_after_a_first_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, load = threading.Event(), LoadedModel._load

    def late(self: LoadedModel, *arguments: Any) -> Any:
        go.wait(30)
        return load(self, *arguments)

    monkeypatch.setattr(LoadedModel, "_load", late)
    monkeypatch.setattr("raytrain2p.serving.chat_api.SECONDS_TO_BE_READY", 0.1)
    with served(ModelHere(LoadedModel(tiny_model)), LIMITS) as (server, _):
        assert server.get("/healthz").status == 200
        assert (server.get("/readyz").status, server.get("/readyz").error["code"]) == (503, "model_not_ready")
        go.set()
        until(lambda: server.get("/readyz").status == 200, 30)


def test_a_server_that_is_stopped_finishes_its_answers_and_takes_no_more(model: ModelHere) -> None:
    with served(model, LIMITS) as (server, api), ThreadPoolExecutor(2) as pool:
        model.held.clear()
        last = pool.submit(server.ask, "The last", max_tokens=2)
        until(lambda: api.busy == 1)
        assert server.loop is not None
        drained = asyncio.run_coroutine_threadsafe(api.drain(30.0), server.loop)
        until(lambda: api.draining)
        assert (server.ask("Too late").status, server.get("/readyz").status, server.get("/healthz").status) == (503, 503, 200)
        assert not drained.done()
        model.held.set()
        assert last.result().status == 200
        assert drained.result(10)


def test_what_was_asked_is_counted(server: Server) -> None:
    def counts() -> list[float]:
        text = server.get("/metrics").content.decode()
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        route = 'route="/v1/chat/completions"'
        names = (f'raytrain2p_requests_total{{{route},status="200"}}', f'raytrain2p_requests_total{{{route},status="400"}}')
        rest = (f"raytrain2p_request_seconds_count{{{route}}}", "raytrain2p_batch_size_count", 'raytrain2p_tokens_total{kind="completion"}')
        return [float(found.get(name, 0)) for name in (*names, *rest)]

    before = counts()
    server.ask("Hello", max_tokens=5)
    server.post(b"{")
    after = counts()
    assert [now - then for now, then in zip(after[:4], before[:4], strict=True)] == [1, 1, 2, 1]
    assert 1 <= after[4] - before[4] <= 5


def test_an_error_of_ours_is_one_line_without_its_traceback(
    model: ModelHere, running: tuple[Server, ChatApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("/secret/path")

    server, api = running
    monkeypatch.setattr("raytrain2p.serving.chat_api.read_chat_request", fail)
    reply = server.ask("x")
    assert (reply.status, reply.error["code"], reply.error["message"]) == (500, "internal_error", "the server failed on this request")
    monkeypatch.undo()
    monkeypatch.setattr(model.model.loading.result(), "answers", fail)
    monkeypatch.setattr(model.model.loading.result(), "stream", fail)
    assert server.ask("x").error["message"] == "the model failed on this request"
    assert b"the model failed on this request" in server.ask("x", stream=True).content
    until(lambda: api.busy == 0)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(server: Server) -> None:
    reply = server.get("/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    text = reply.content.decode()
    assert not [word for word in ("http://", "https://", "innerHTML", 'src="', "eval(", "localStorage") if word in text]
    assert base64.b64decode(policy.split("'sha256-")[1].split("'")[0])
