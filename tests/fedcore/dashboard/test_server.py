"""The live page over HTTP: what it answers, whom it refuses, and that it never outlives the run."""
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing

import pytest

from fedcore.dashboard import serve_dashboard
from fedcore.dashboard.server import MOST_VIEWERS
from fedcore.errors import BadInput
from tests.fedcore.dashboard.conftest import link, node, rows_of_a_run


@pytest.fixture
def dashboard(run_folder):
    with serve_dashboard(lambda: link(node(0), node(1)), run_folder, 0) as dashboard:
        yield dashboard


def get(url, **headers):
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20)


def events(stream):
    """Yield what a stream of events brings: pairs of kind and data."""
    kind = "message"
    for line in stream:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            kind = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield kind, text.removeprefix("data: ")
            kind = "message"


def test_the_page_has_its_content_inside_and_allows_no_script_but_its_own(dashboard):
    answer = get(dashboard.url)
    html = answer.read().decode()
    assert "fedbuff on digits" in html and "site-1" in html
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert html.count(f'nonce="{nonce}"') == 1
    assert nonce not in get(dashboard.url).read().decode()


def test_news_come_by_themselves_and_only_what_changed(dashboard):
    with closing(get(dashboard.url + "events")) as stream:
        news = events(stream)
        first = json.loads(next(news)[1])
        assert {"title", "state", "cards", "clients", "learning", "timeline", "bytes", "troubles"} == first.keys()
        for row in rows_of_a_run(updates=3)[0]:
            dashboard.on_row(row)
        second = json.loads(next(news)[1])
        assert "version 3" in second["state"] and "<figure" in second["learning"]
        assert "title" not in second


def test_the_end_of_the_run_is_the_last_news(dashboard):
    with closing(get(dashboard.url + "events")) as stream:
        news = events(stream)
        next(news)
        dashboard.on_row({"time_s": 5.0, "event": "stop", "version": 3, "reason": "rounds"})
        closing_thread = threading.Thread(target=dashboard.close)
        closing_thread.start()
        rest = list(news)
        closing_thread.join(timeout=20)
    assert not closing_thread.is_alive()
    assert "The run is over" in "".join(data for _, data in rest)
    assert rest[-1] == ("over", "")
    with pytest.raises(OSError):
        get(dashboard.url)


@pytest.mark.parametrize("host", ["evil.example.org", "evil.example.org:80", "127.0.0.1.evil.org", ""])
def test_other_host_names_are_refused(dashboard, host):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(dashboard.url, Host=host)
    assert refused.value.code == 403
    assert get(dashboard.url, Host="localhost:1234").status == 200


@pytest.mark.parametrize("path", ["etc/passwd", "../config.yaml", "events/", "?x=1", "%2e%2e/config.yaml"])
def test_there_is_nothing_but_the_page_and_its_news(dashboard, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(dashboard.url + path)
    assert refused.value.code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_can_be_sent_to_it(dashboard, method):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(dashboard.url, method=method, data=b"x"), timeout=20)
    assert refused.value.code == 501


def test_too_many_viewers_are_turned_away_and_room_is_made_when_they_leave(dashboard):
    streams = [get(dashboard.url + "events") for _ in range(MOST_VIEWERS)]
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(dashboard.url + "events")
    assert refused.value.code == 503
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 30
    while True:
        try:
            get(dashboard.url + "events").close()
            break
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_port_in_use_is_bad_input(dashboard):
    port = int(dashboard.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(BadInput, match=f"--dashboard {port}: .* cannot be listened on"):
        serve_dashboard(lambda: {}, None, port)


def test_garbage_on_the_port_harms_nobody(dashboard, capfd):
    host, port = "127.0.0.1", int(dashboard.url.rstrip("/").rpartition(":")[2])
    for garbage in (b"", b"\x16\x03\x01" + b"\x00" * 300, b"GET " + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, port), timeout=20) as connection:
            connection.sendall(garbage)
    assert get(dashboard.url).status == 200
    assert capfd.readouterr().err == ""
