"""Routes for operators: health, metrics, configuration, tokens; and keys, CORS, ids, logs."""

import logging
import re
import shutil
import ssl
import subprocess

import httpx
import pytest
from pydantic import SecretStr
from quire import NOT_FINITE, ConfigError, OutputDelta
from quire_server.listener import check_tls
from quire_server.settings import ServerSettings

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def test_health_readiness_and_version(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert re.fullmatch(r"\d+\.\d+\..*", http.get("/version").json()["version"])


def test_a_server_whose_model_spoils_answers_is_not_ready(serve, llm, monkeypatch):
    run, now = llm.run, [0.0]

    async def spoiled(submission, take):
        take(OutputDelta(submission.request_id, finish_reason="error", finished=True, error=NOT_FINITE))

    monkeypatch.setattr("quire_server.faults.time.monotonic", lambda: now[0])
    with serve() as (url, _, _):
        monkeypatch.setattr(llm, "run", spoiled)
        for count in range(1, 5):
            now[0] += 10
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert (answer.status_code, NOT_FINITE in answer.json()["error"]["message"]) == (503, True)
            assert httpx.get(f"{url}/ready").status_code == (200 if count < 4 else 503)
        monkeypatch.setattr(llm, "run", run)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        now[0] += 31  # the first of the four is 61 seconds old
        assert httpx.get(f"{url}/ready").status_code == 200


def test_tokens_there_and_back(http):
    text = "What is 27+45? Grüße, 世界!"
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()
    assert text in http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    thinking = {"messages": [{"role": "user", "content": text}], "chat_template_kwargs": {"enable_thinking": True}}
    assert http.post("/tokenize", json=thinking).json()["tokens"] != chat["tokens"]
    begun = {"messages": [*thinking["messages"], {"role": "assistant", "content": "7"}], "continue_final_message": True}
    ids = http.post("/tokenize", json=begun | {"add_generation_prompt": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("7")
    info = http.get("/tokenizer_info").json()
    assert info["chat_template"]
    assert set(map(str, info["stop_token_ids"])) <= set(info["special_tokens"])


def test_every_answer_has_an_id(http):
    assert http.get("/version").headers["x-request-id"].startswith("req_")
    assert http.get("/version", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 129):
        assert http.get("/version", headers={"X-Request-Id": odd}).headers["x-request-id"].startswith("req_")


def test_keys_are_asked_for_everywhere_but_on_public_paths(serve, tmp_path, caplog):
    (tmp_path / "keys").write_text("# of the team\nsecond-key-22\n\n")
    with serve(api_keys=(SecretStr("first-key-11"),), api_keys_file=tmp_path / "keys") as (url, state, _):
        with httpx.Client(base_url=url) as client, caplog.at_level(logging.DEBUG):
            for path in ("/health", "/ready", "/version", "/", "/docs", "/page/page.js"):
                assert client.get(path).status_code == 200
            for path in (
                "/metrics",
                "/server_info",
                "/v1/models",
                "/nowhere",
                "/openapi.json",
                "/engine",
                "/engine/stream",
                "/page/x",
            ):
                refused = client.get(path)
                assert refused.status_code == 401, path
                assert refused.headers["www-authenticate"] == "Bearer"
                assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
            for key in ("first-key-11", "second-key-22"):
                assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
                assert client.get("/v1/models", headers={"X-Api-Key": key}).status_code == 200
            wrong = client.get("/v1/models", headers={"Authorization": "Bearer first-key-12"})
            assert wrong.json()["error"]["code"] == "invalid_api_key"
            assert "first-key-12" not in wrong.text
            shown = client.get("/server_info", headers={"X-Api-Key": "first-key-11"}).text
        assert "first-key-11" not in shown + caplog.text
        assert "first-key-11" not in repr(state.settings)


def test_no_prompt_stands_in_the_log(server, caplog):
    with caplog.at_level(logging.DEBUG), httpx.Client(base_url=server) as client:
        client.post("/v1/completions", json={"prompt": "canary-prompt", "max_tokens": 1})
        client.get("/version?canary-query=1%0Aforged")
    assert "canary" not in "".join(r.getMessage() for r in caplog.records if not r.name.startswith("httpx"))
    lines = [r.getMessage() for r in caplog.records if r.name == "quire.server.access"]
    assert len(lines) == 2
    assert "POST '/v1/completions' 200" in lines[0]


def test_browsers_from_elsewhere_are_let_in_only_if_named(serve, server):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serve(cors_origins=("https://a.example",)) as (url, _, _):
        allowed = httpx.options(f"{url}/v1/completions", headers=asked)
        other = httpx.options(f"{url}/v1/completions", headers=asked | {"Origin": "https://b.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx.get(f"{server}/version", headers=asked).headers


def test_keys_share_no_prefixes(serve):
    """How many tokens were found would tell one what another has asked."""
    body = {"prompt": "a prompt that fills a block or two, whoever it is that asks for it", "max_tokens": 1}
    with serve(api_keys=(SecretStr("first-key-11"), SecretStr("second-key-22"))) as (url, _, _):

        def cached(key, **more):
            answer = httpx.post(f"{url}/v1/completions", json=body | more, headers={"X-Api-Key": key}).json()
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("first-key-11") == cached("second-key-22") == 0
        assert cached("first-key-11") == cached("second-key-22") > 0
        assert cached("first-key-11", cache_salt="mine") == 0


def test_tls(serve, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    subprocess.run([*made, "-keyout", key, "-out", cert], check=True, capture_output=True)
    with serve(ssl_certfile=cert, ssl_keyfile=key) as (url, _, _):
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=cert)
        assert httpx.get(f"{url}/ready", verify=trusting).json() == {"status": "ready"}
    check_tls(ServerSettings(ssl_certfile=cert, ssl_keyfile=key))
    for bad in (
        {"ssl_certfile": tmp_path / "nowhere"},
        {"ssl_certfile": key, "ssl_keyfile": cert},
        {"ssl_keyfile": key},
    ):
        with pytest.raises(ConfigError, match=r"ssl-certfile|ssl_certfile"):
            check_tls(ServerSettings(**bad))


def test_served_names(serve):
    with serve(served_names=("small", "tiny")) as (url, _, _), httpx.Client(base_url=url) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["small", "tiny"]
        assert client.post("/v1/chat/completions", json=HELLO | {"model": "tiny"}).json()["model"] == "tiny"
        assert client.post("/v1/chat/completions", json=HELLO | {"model": "quire-tiny"}).status_code == 404


@pytest.mark.parametrize("path", ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fsecret"])
def test_names_are_no_paths(http, path):
    assert http.get(path).status_code == 404
