"""The examples of clients, run against a live server; what they print is compared."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "server"
PRINTED = {
    "openai_python.py": '72  (3 tokens)\nget_weather {"city": "Paris"}\n7, 19, 42\n',
    "anthropic_python.py": "72\nthe question has 26 tokens\n",
    "langchain_chat.py": "72\n45\n['30', '32']\n",
}


@pytest.mark.parametrize("name", PRINTED)
def test_python(server, name, monkeypatch, capsys):
    if name == "langchain_chat.py":
        pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    monkeypatch.setattr(sys, "argv", [name, server])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out == PRINTED[name]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server):
    command = ["sh", str(EXAMPLES / "curl.sh"), server]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    whole, *stream, tokens, error = [line for line in told.splitlines() if line]
    assert json.loads(whole)["choices"][0]["message"]["content"] == "72"
    assert stream[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "72"
    assert json.loads(tokens)["count"] == 9
    assert json.loads(error)["error"]["param"] == "temperature"


def test_every_example_is_run():
    assert {file.name for file in EXAMPLES.iterdir()} - {"__pycache__"} == {*PRINTED, "curl.sh"}
