"""A file comes from the network once, goes on where a connection broke, and is under its name only when it is whole.

The network is a server in this process; nothing outside is asked.
"""

import hashlib
import random
import re
import socket
import threading
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino import load_backbone
from dino.errors import UserError
from dino.models import VisionTransformer, ViTSpec
from dino.models.weights import download
from dino.models.weights.download import fetch
from dino.models.weights.released import RELEASED, Released

CONTENT = random.Random(0).randbytes(3_500_000)  # some chunks of a mebibyte, and a bit
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2
SPEC = ViTSpec(64, 1, 1, 8, 32, position_interpolation="offset")


class Server(ThreadingHTTPServer):
    """Serves one file at every path, and can misbehave.

    Attributes:
        content: the file.
        asked: the Range header of every request, None where there was none.
        cut: after how many bytes to drop the connection: of the first answer, of the second …; then no more.
        ranges: answer 206 to a Range header; otherwise the whole file, as servers may.
        status: to answer with, instead of the file.
        chunked: send in chunks, without the length in advance, as proxies may.
        moved: answer a request for /old with a redirection to /new.
        half_way: called with the number of the request when half of its bytes are out.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.asked: list[str | None] = []
        self.cut: list[int] = []
        self.ranges = True
        self.status: int | None = None
        self.chunked = False
        self.moved = False
        self.half_way: Callable[[int], object] = lambda number: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/old/weights.pth"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        self.close_connection = True
        if server.moved and self.path.startswith("/old"):
            return self.answer(302, {"Location": server.url.replace("/old", "/new")})
        server.asked.append(wanted)
        number = len(server.asked)
        if server.status:
            return self.answer(server.status)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        size = len(server.content)
        if start >= size > 0:
            return self.answer(416, {"Content-Range": f"bytes */{size}"})
        body = server.content[start:]
        headers = {"Transfer-Encoding": "chunked"} if server.chunked else {"Content-Length": str(len(body))}
        if wanted and server.ranges:
            self.answer(206, headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"})
        else:
            self.answer(200, headers)
        cut = server.cut.pop(0) if server.cut else None
        sent, middle = body[:cut], len(body) // 2
        self.send(sent[:middle])
        server.half_way(number)
        self.send(sent[middle:])
        if server.chunked and cut is None:
            self.wfile.write(b"0\r\n\r\n")
        return None

    def answer(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, body: bytes) -> None:
        if body:
            with suppress(ConnectionError):  # who asked may have gone
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) if self.server.chunked else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _directly(monkeypatch):
    """Without proxies, which could not reach this machine's own server."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "cache" / "deep" / "weights.pth"


def partial_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial")


@contextmanager
def refused(match: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """pytest.raises, after which the answer of the server, which the exception holds, is closed."""
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    if isinstance(caught.value.__cause__, urllib.error.HTTPError):
        caught.value.__cause__.close()


class TestWhole:
    def test_arrives_once_and_nothing_else_is_left(self, server, file):
        for _ in range(2):
            assert fetch(server.url, file).read_bytes() == CONTENT
        assert server.asked == [None]
        assert not partial_of(file).exists()

    @pytest.mark.parametrize("digest", ["", DIGEST[:8], DIGEST])
    def test_a_file_put_there_by_hand_needs_no_server(self, digest, file):
        file.parent.mkdir(parents=True)
        file.write_bytes(CONTENT)
        assert fetch("http://127.0.0.1:1/weights.pth", file, digest).read_bytes() == CONTENT

    @pytest.mark.parametrize("content", [b"", b"by hand", CONTENT[:-1], CONTENT + b"\n"])
    def test_another_put_there_by_hand_is_refused_and_left_alone(self, content, file):
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{re.escape(str(file))} has another digest .*: remove it, and it is"):
            fetch("http://127.0.0.1:1/weights.pth", file, DIGEST[:8])
        assert file.read_bytes() == content

    def test_is_not_under_its_name_before_it_is_whole(self, server, file):
        seen = []
        server.half_way = lambda _: seen.append(file.exists())
        fetch(server.url, file)
        assert seen == [False]

    @pytest.mark.parametrize("chunked", [False, True], ids=["length told", "length not told"])
    @pytest.mark.parametrize("size", [1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2 << 20])
    def test_of_any_size(self, size, chunked, server, file):
        server.content, server.chunked = CONTENT[:size], chunked
        assert fetch(server.url, file).read_bytes() == CONTENT[:size]

    @pytest.mark.parametrize("characters", [8, 64])
    def test_with_the_digest_it_should_have(self, characters, server, file):
        assert fetch(server.url, file, DIGEST[:characters]).read_bytes() == CONTENT


BROKEN: dict[str, tuple[dict[str, bool], list[int], list[str | None] | None]] = {
    "once": ({}, [HALF], [None, f"bytes={HALF}-"]),
    "many times": (
        {}, [1000, 0, 5, 2_000_000], [None, "bytes=1000-", "bytes=1000-", "bytes=1005-", "bytes=2001005-"]
    ),
    "after a redirection": ({"moved": True}, [HALF], [None, f"bytes={HALF}-"]),
    "of a server without ranges, which begins anew": ({"ranges": False}, [HALF], [None, f"bytes={HALF}-"]),
    "of untold length": ({"chunked": True}, [HALF], None),
}  # fmt: skip


class TestBroken:
    @pytest.mark.parametrize("case", BROKEN)
    def test_goes_on_where_the_connection_broke(self, case, server, file):
        options, server.cut, asked = BROKEN[case]
        for name, value in options.items():
            setattr(server, name, value)
        for cut in list(server.cut):
            with pytest.raises(UserError, match="start again") as caught:
                fetch(server.url, file)
            assert str(file) in str(caught.value)
            assert not file.exists()
            assert case != "once" or partial_of(file).read_bytes() == CONTENT[:cut]
        server.cut = []
        assert fetch(server.url, file, DIGEST).read_bytes() == CONTENT
        assert asked is None or server.asked == asked

    @pytest.mark.parametrize("more", [b"", b"more"], ids=["whole but not yet renamed", "more than the file has"])
    def test_nothing_is_beyond_what_has_arrived(self, more, server, file):
        """The process ended before the renaming; or two downloads at once, or another version, left too much."""
        file.parent.mkdir(parents=True)
        partial_of(file).write_bytes(CONTENT + more)
        if more:
            with pytest.raises(UserError, match="not of this file"):
                fetch(server.url, file)
            assert not file.exists()
        assert fetch(server.url, file).read_bytes() == CONTENT

    def test_a_silent_server(self, server, file, monkeypatch):
        monkeypatch.setattr(download, "TIMEOUT", 0.2)
        go_on = threading.Event()
        server.half_way = lambda _: go_on.wait(10)
        try:
            with pytest.raises(UserError, match=r"timed out.*start again"):
                fetch(server.url, file)
            assert not file.exists()
            assert CONTENT.startswith(partial_of(file).read_bytes())
        finally:
            go_on.set()

    @pytest.mark.parametrize("begun", [False, True], ids=["from nothing", "both going on"])
    def test_two_at_once(self, begun, server, file):
        """Processes of one evaluation, which ask for the same weights: the second comes while the first waits."""
        file.parent.mkdir(parents=True)
        if begun:
            partial_of(file).write_bytes(CONTENT[:1000])
        first_waits, go_on = threading.Event(), threading.Event()

        def half_way(number: int) -> None:
            if number == 1:
                first_waits.set()
                go_on.wait(1)  # a second that waits for the first must not wait for ever

        server.half_way = half_way
        problems: list[BaseException] = []

        def fetch_in_thread() -> None:
            try:
                assert fetch(server.url, file).read_bytes() == CONTENT
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=fetch_in_thread) for _ in range(2)]
        threads[0].start()
        assert first_waits.wait(10)
        threads[1].start()
        threads[1].join(0.3)
        go_on.set()
        for thread in threads:
            thread.join(10)
        assert problems == []
        assert file.read_bytes() == CONTENT


class TestRefused:
    @pytest.mark.parametrize("status", [404, 403, 500])
    def test_the_server_has_it_not(self, status, server, file):
        server.status = status
        with refused(str(status)) as caught:
            fetch(server.url, file)
        assert server.url in str(caught.value)
        assert f"put it at {file}" in str(caught.value)
        assert not file.exists()
        assert not partial_of(file).exists()

    def test_a_refusal_leaves_no_connection_open(self, server, file):
        server.status = 404
        with pytest.raises(UserError) as caught:
            fetch(server.url, file)
        answer = caught.value.__cause__
        try:
            assert answer.closed
        finally:
            answer.close()

    def test_what_had_arrived_stays_for_a_better_day(self, server, file):
        server.cut = [HALF]
        with pytest.raises(UserError):
            fetch(server.url, file)
        server.status = 503
        with refused("503"):
            fetch(server.url, file)
        server.status = None
        assert fetch(server.url, file).read_bytes() == CONTENT
        assert server.asked[-1] == f"bytes={HALF}-"

    def test_nobody_answers(self, file):
        with socket.socket() as taken:  # bound, but not listening: a port at which a connection is refused
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/weights.pth"
            with pytest.raises(UserError, match="refused") as caught:
                fetch(url, file)
        assert f"put it at {file}" in str(caught.value)
        assert not file.exists()

    def test_what_answers_is_no_web_server(self, file):
        def speak(listening: socket.socket) -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example.com ESMTP\r\n")

        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=speak, args=[listening], daemon=True)
            thread.start()
            with pytest.raises(UserError) as caught:
                fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/weights.pth", file)
            thread.join()
        assert f"put it at {file}" in str(caught.value)

    @pytest.mark.parametrize("arrived", [b"", b"x" * 1000], ids=["", "of which the first part was of another file"])
    def test_another_digest(self, arrived, server, file):
        if arrived:
            file.parent.mkdir(parents=True)
            partial_of(file).write_bytes(arrived)
        with pytest.raises(UserError, match="0123abcd") as caught:
            fetch(server.url, file, "0123abcd")
        assert f"put it at {file}" in str(caught.value)
        assert list(file.parent.glob("weights.pth*")) == []  # the next call begins anew
        assert fetch(server.url, file, DIGEST[:8]).read_bytes() == CONTENT

    def test_no_place_for_it(self, server, file):
        file.parent.parent.mkdir()
        file.parent.write_text("a file where the folder should be")
        with pytest.raises(UserError, match=re.escape(str(file))):
            fetch(server.url, file)
        assert server.asked == []


class TestByName:
    """From a released name to a network, with one entry of which this server is the publisher."""

    @pytest.fixture
    def published(self, server, tmp_path, monkeypatch) -> dict[str, Tensor]:
        """The tensors that `load_backbone("small")` should give."""
        tensors = VisionTransformer(SPEC).state_dict()
        torch.save(tensors, tmp_path / "made.pth")
        server.content = (tmp_path / "made.pth").read_bytes()
        monkeypatch.setitem(RELEASED, "small", Released(server.url, SPEC))
        return tensors

    @pytest.mark.parametrize(
        ("environment", "folder"),
        [
            ({"DINO_CACHE": "own"}, "own"),
            ({"XDG_CACHE_HOME": "xdg"}, "xdg/dino-pretrain"),
            ({"DINO_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
            ({"DINO_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/dino-pretrain"),
            ({}, "home/.cache/dino-pretrain"),
        ],
        ids=str,
    )
    def test_into_the_cache_once(self, environment, folder, published, server, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for name in ("DINO_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(tmp_path / value) if value else "")
        for _ in range(2):
            loaded = load_backbone("small").state_dict()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in published.items())
        assert (tmp_path / folder / "weights.pth").read_bytes() == server.content
        assert server.asked == [None]

    def test_the_digest_of_the_table_counts(self, published, server, tmp_path, monkeypatch):
        monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
        monkeypatch.setitem(RELEASED, "small", Released(server.url, SPEC, sha256="0123abcd"))
        with pytest.raises(UserError, match="0123abcd"):
            load_backbone("small")
        assert list((tmp_path / "cache").glob("weights.pth*")) == []
