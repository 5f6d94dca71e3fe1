"""TLS handshakes that fail in gRPC's core are heard of, and said in words that help."""
import pytest

from fedcore.transport.handshakes import ABOUT_CLIENTS, TraceReader, about_client, about_server

STARTED = b"I1121 09:36:19.853835   27723 "
PEER = b"args={endpoint=0x1, args={grpc.internal.endpoint_peer_address=ipv4:10.0.0.7:49204, grpc.primary=none}}\n"
VERIFY = b"SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: unable to get local"
FAILED = [
    STARTED + b"trace.cc:91] gRPC Tracers: handshaker\n",
    STARTED + b"handshaker.cc:155] CallNextHandshakerLocked: error=OK shutdown=false index=1, " + PEER,
    STARTED + b"ssl_transport_security.cc:2563] Handshake failed with error " + VERIFY + b" issuer\n",
    STARTED + b"handshaker.cc:155] CallNextHandshakerLocked: error=UNKNOWN: Ssl failed: " + VERIFY + b": OK\n",
    b"=== Source Location Trace: === \n", b"src/core/util/status_helper.cc:68\n",
    b" shutdown=false index=2, " + PEER,
    STARTED + b"channel_trace.h:396] handshake manager 0x1: Failed with error: UNKNOWN: Ssl handshake failed\n",
    b"=== Source Location Trace: === \n", b"src/core/util/status_helper.cc:68\n", b"\n",
]


def read(lines: list[bytes]) -> tuple[list[tuple[str, str]], bytes]:
    told: list[tuple[str, str]] = []
    reader = TraceReader(lambda peer, error: told.append((peer, error)))
    return told, b"".join(reader.feed(line) for line in lines)


def test_a_failed_handshake_is_told_once_with_its_peer_and_nothing_of_the_trace_is_shown():
    told, shown = read(FAILED)
    assert [peer for peer, _ in told] == ["10.0.0.7:49204"] and "CERTIFICATE_VERIFY_FAILED" in told[0][1]
    assert shown == b""


def test_what_others_write_passes_unchanged_wherever_it_comes():
    others = [b"Traceback (most recent call last):\n", b"W1121 09:36:19.853835   27723 chttp2.cc:9] something\n", b"\n"]
    for place in (1, 3, 7, len(FAILED)):
        told, shown = read(FAILED[:place] + others + FAILED[place:])
        assert shown == b"".join(others) and len(told) == 1


def test_without_the_trace_the_core_itself_is_heard():
    told, shown = read([FAILED[2]])
    assert len(told) == 1 and told[0][0] == "" and shown == b""


@pytest.mark.parametrize("error, words", [
    ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "has expired"),
    ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "fedcore certs node"),
    ("OPENSSL_internal:WRONG_VERSION_NUMBER: Invalid", "does not speak TLS"),
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "--tls"),
    ("Handshake read failed (Socket closed)", "ca.crt"),
    ("something that nobody has seen", "something that nobody has seen"),
])
def test_a_failure_is_said_in_words_that_help(error, words):
    assert words in about_client(error)


def test_no_sign_is_hidden_by_a_vaguer_one():
    for sign, meaning in ABOUT_CLIENTS:
        assert about_client(f"error: {sign}!") == meaning


def test_a_client_is_told_what_may_be_wrong_and_other_errors_stay_as_they_are():
    assert "wants TLS" in about_server("UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed")
    assert about_server("connection refused") == "connection refused"
