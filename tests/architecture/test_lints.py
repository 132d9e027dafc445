"""Small rules that keep the core portable, safe and free of hidden waits. Each rule is tried on a bad line too."""

from __future__ import annotations

import ast
import re

import pytest

CODE_LOADERS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
HOST_WAIT = re.compile(r"\.(item|tolist|cpu|nonzero)\(")
SYNC_OK = re.compile(r"# sync-ok: \S+")


def names_torch_cuda(tree):
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.cuda"] + [
        n.lineno
        for n in ast.walk(tree)
        if (isinstance(n, ast.ImportFrom) and (n.module or "").startswith("torch.cuda"))
        or (isinstance(n, ast.Import) and any(alias.name.startswith("torch.cuda") for alias in n.names))
    ]


def reads_environment(tree):
    wanted = ("os.environ", "os.getenv", "os.environb")
    found = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) in wanted]
    return found + [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        and n.module == "os"
        and any(alias.name in ("environ", "getenv", "environb") for alias in n.names)
    ]


def runs_foreign_code(tree):
    """Deserialisers that run code, and evaluation of text."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [node.lineno for module in modules if module.split(".")[0] in CODE_LOADERS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            unsafe = called in ("eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load")
            trusting = any(
                keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
                for keyword in node.keywords
            )
            found += [node.lineno] if unsafe or trusting else []
    return found


def prints(tree):
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]


def host_waits(text):
    return [
        number
        for number, line in enumerate(text.splitlines(), 1)
        if HOST_WAIT.search(line) and not SYNC_OK.search(line)
    ]


def offenders(found):
    return [f"{path}:{line}" for path, lines in found for line in lines]


def test_the_core_does_not_name_torch_cuda(sources):
    assert offenders((path, names_torch_cuda(tree)) for path, _, tree in sources("framework")) == []


def test_the_environment_is_read_in_one_place(sources):
    files = sources("framework", "plugins", "server")
    places = ["framework/quire/config.py", "framework/quire/waiting.py"]  # the second sets a variable for torch
    assert [path for path, _, tree in files if reads_environment(tree)] == places


def test_nothing_runs_foreign_code(sources):
    files = sources("framework", "plugins", "server")
    assert offenders((path, runs_foreign_code(tree)) for path, _, tree in files) == []


def test_the_library_does_not_print(sources):
    files = [item for item in sources("framework", "plugins", "server") if "/cli/" not in item[0]]
    assert offenders((path, prints(tree)) for path, _, tree in files) == []


def test_the_engine_waits_for_the_device_only_where_it_says_so(sources):
    assert offenders((path, host_waits(text)) for path, text, _ in sources("framework/quire/engine")) == []


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (names_torch_cuda, "torch.cuda.synchronize()", "device.synchronize()"),
        (names_torch_cuda, "from torch.cuda import Stream", "from torch import Stream"),
        (names_torch_cuda, "import torch.cuda", "import torch"),
        (reads_environment, "x = os.environ['A']", "x = environ['A']"),
        (reads_environment, "from os import getenv", "from os import path"),
        (runs_foreign_code, "import pickle", "import json"),
        (runs_foreign_code, "from dill import loads", "from json import loads"),
        (runs_foreign_code, "torch.load('x')", "safetensors.load('x')"),
        (runs_foreign_code, "eval(text)", "model.eval()"),
        (runs_foreign_code, "f(trust_remote_code=flag)", "f(trust_remote_code=False)"),
        (prints, "print(1)", "logger.info(1)"),
    ],
)
def test_the_rules_themselves(rule, bad, good):
    assert rule(ast.parse(bad)) == [1]
    assert rule(ast.parse(good)) == []


def test_a_wait_needs_a_reason():
    assert host_waits("a = b.item()\nc.tolist()  # sync-ok: its one wait\nd.cpu()  # sync-ok:\n") == [1, 3]
