"""The demo's server, before a studio that only pretends to draw."""

import http.client
import json
import threading

import pytest

from sana_jax.pages.server import MAX_BODY, Server
from sana_jax.pages.studio import Drawn
from sana_jax.runtime.errors import UserError
from tests.pages import made
from tests.pages.chromium import opened


class Pretender:
    form = {"checkpoint": made.EVIL}
    stopped = None

    def draw(self, given, on_turn, on_step):
        if given.get("prompt") == "bug":
            raise KeyError("bug")
        if given.get("prompt") == "bad":
            raise UserError("seed is wrong")
        on_turn()
        if given.get("prompt") == "long":
            self.stopped = threading.Event()
            try:
                for step in range(10**7):
                    on_step(step, 10**7)
            except ConnectionError:
                self.stopped.set()
                raise
        on_step(1, 1)
        return [Drawn("000000_7.png", b"PNG", {"seed": 7})]

    def command(self, given):
        return f"draw {given['prompt']}"


@pytest.fixture
def server():
    with Server(Pretender(), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method="POST", path="/draw", body=b'{"prompt": "a"}', **headers):
    connection = http.client.HTTPConnection(*server.server_address[:2])
    headers = {"Content-Type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def events(server, body: bytes) -> list[dict]:
    status, content = ask(server, body=body)
    assert status == 200
    return [json.loads(line) for line in content.splitlines()]


def test_the_page_is_served_with_its_data(server):
    status, content = ask(server, "GET", "/", body=None)
    assert status == 200 and made.data_of(content) == Pretender.form


def test_events_come_in_order_and_end_with_the_pictures(server):
    *steps, last = events(server, b'{"prompt": "a"}')
    assert steps == [{"turn": True}, {"step": 1, "steps": 1}]
    picture = {"file": "000000_7.png", "uri": "data:image/png;base64,UE5H", "settings": {"seed": 7}}
    assert last == {"pictures": [picture], "command": "draw a"}


@pytest.mark.parametrize(
    "body, words",
    [
        (b"{", "the form is not JSON"),
        (b"[1]", "the form is no object"),
        (b"[" * 10**5, "nested too deeply"),
        (b'{"prompt": "bad"}', "seed is wrong"),
        (b'{"prompt": "bug"}', "a bug of the demo"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_error_is_an_event(server, body, words, capfd):
    (event,) = events(server, body)
    assert words in event["error"]
    assert ("KeyError" in capfd.readouterr().err) == (b"bug" in body)


@pytest.mark.parametrize(
    "request_, status",
    [
        (dict(method="GET", path="/etc/passwd", body=None), 404),
        (dict(path="/"), 404),
        (dict(Content_Type="text/plain"), 404),
        (dict(Content_Length=str(MAX_BODY + 1), body=b""), 413),
        (dict(Content_Length="-1", body=b""), 413),
        (dict(Host="evil.example:80"), 403),
        (dict(Host=""), 403),
        (dict(Origin="http://evil.example"), 403),
        (dict(method="PUT"), 501),
    ],
    ids=str,
)
def test_what_another_site_could_send_is_refused(server, request_, status):
    assert ask(server, **request_)[0] == status


def test_a_browser_may_call_it_localhost(server):
    port = server.server_address[1]
    for name in "localhost", "127.0.0.1":
        host = f"{name}:{port}"
        assert ask(server, "GET", "/", None, Host=host, Origin=f"http://{host}")[0] == 200


def test_a_browser_that_goes_away_ends_its_drawing(server, capfd):
    connection = http.client.HTTPConnection(*server.server_address[:2])
    connection.request("POST", "/draw", b'{"prompt": "long"}', {"Content-Type": "application/json"})
    connection.getresponse().read(20)
    connection.close()
    assert server.studio.stopped.wait(30)
    assert ask(server)[0] == 200 and capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_one_line(server):
    host, port = server.server_address[:2]
    with pytest.raises(UserError, match=f"--host={host} --port={port}: Address already in use"):
        Server(Pretender(), host, port)
    for name in "no.such.host.", "two..dots", "x" * 64:
        with pytest.raises(UserError, match=f"--host={name}"):
            Server(Pretender(), name, 0)


def test_chromium_stops_a_drawing_and_shows_what_is_wrong(server):
    usual = dict(num_steps=2, guidance_scale=4.5, size=512, multiple=32, most=8, devices="1 x cpu")
    server.studio.form = dict(usual, checkpoint=made.EVIL, is_sprint=True)
    with opened() as page:
        page.goto(server.url)
        assert page.inner_text("h1").startswith("</script><img") and page.title() != "1"
        assert not page.is_visible("[name=negative_prompt]") and page.is_visible("[name=prompt]")
        assert page.input_value("[name=width]") == "512" and page.is_disabled("#stop")
        page.fill("[name=prompt]", "long")
        page.click("#draw")
        state = page.locator("#state")
        state.filter(has_text="step").wait_for()
        page.click("#stop")
        assert server.studio.stopped.wait(30)
        state.filter(has_text="stopped").wait_for()
        for prompt, words in ("bad", "seed is wrong"), ("bug", "a bug of the demo"):
            page.fill("[name=prompt]", prompt)
            page.click("#draw")
            state.filter(has_text=words).wait_for()
        seeds = set()
        for _ in range(2):
            page.click("#dice")
            seeds.add(page.input_value("[name=seed]"))
        assert len(seeds) == 2
