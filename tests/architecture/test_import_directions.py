"""Who may import whom: plugins and the server use the doors made for them, the core uses neither."""

from __future__ import annotations

import ast

import pytest

PLUGIN_DOORS = ("quire.plugin", "quire.commands", "quire.testing")
SERVER_DOORS = ("quire", "quire.plugin", "quire.commands")
HEAVY = {"triton", "fastapi", "uvicorn", "transformers", "tokenizers", "huggingface_hub"}
"""What importing the core must not import: inside functions only."""


def imported(tree, package=""):
    """Names of imported modules; `from a import b` counts as `a` and, since b may be a module, as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: it stays within its own package
                yield f"{package}.{base}", node
                continue
            yield base, node


def core_problem(module, packages):
    return module.split(".")[0] in packages


def plugin_problem(module, own):
    top = module.split(".")[0]
    if top == own:
        return False
    if top == "quire":
        return not any(module == door or module.startswith(f"{door}.") for door in PLUGIN_DOORS)
    return top.startswith("quire_")


def server_problem(module, own):
    top = module.split(".")[0]
    return (top == "quire" and module not in SERVER_DOORS) or (top.startswith("quire_") and top != own)


@pytest.fixture(scope="session")
def packages(root):
    """Import packages outside the core: plugin or server folder -> its package."""
    found = {path.parent.name: path.name for path in root.glob("plugins/*/quire_*") if path.is_dir()}
    server = [("server", path.name) for path in root.glob("server/quire_*") if path.is_dir()]
    return found | dict(server)


def test_the_core_imports_no_plugin_and_no_server(sources, packages):
    assert packages
    bad = [
        f"{path}:{node.lineno} imports {module}"
        for path, _, tree in sources("framework")
        for module, node in imported(tree)
        if core_problem(module, set(packages.values()))
    ]
    assert bad == []


def test_plugins_import_only_the_door_for_plugins(sources, packages):
    bad = [
        f"{path}:{node.lineno} imports {module}"
        for folder, package in packages.items()
        if folder != "server"
        for path, _, tree in sources(f"plugins/{folder}")
        for module, node in imported(tree, package)
        if plugin_problem(module, package)
    ]
    assert bad == []


def test_the_server_imports_only_the_doors_for_users_and_plugins(sources, packages):
    bad = [
        f"{path}:{node.lineno} imports {module}"
        for path, _, tree in sources("server")
        for module, node in imported(tree, packages.get("server", ""))
        if server_problem(module, packages.get("server", ""))
    ]
    assert bad == []


def test_the_core_imports_heavy_packages_inside_functions(sources):
    bad = []
    for path, _, tree in sources("framework"):
        if path.startswith(("framework/quire/testing/", "framework/quire/models/bridge")):
            continue  # imported only by tests, and only when that model is selected
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
        }
        bad += [
            f"{path}:{node.lineno} imports {module}"
            for module, node in imported(tree)
            if module.split(".")[0] in HEAVY and id(node) not in inside and not _for_types_only(tree, node)
        ]
    assert bad == []


def _for_types_only(tree, node):
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return any(node in ast.walk(block) for block in blocks)


@pytest.mark.parametrize(
    ("check", "own", "module", "wrong"),
    [
        (plugin_problem, "quire_a", "quire.plugin", False),
        (plugin_problem, "quire_a", "quire.testing.attention", False),
        (plugin_problem, "quire_a", "quire_a.ops", False),
        (plugin_problem, "quire_a", "torch.nn", False),
        (plugin_problem, "quire_a", "quire", True),
        (plugin_problem, "quire_a", "quire.contract.kv", True),
        (plugin_problem, "quire_a", "quire.plugins", True),
        (plugin_problem, "quire_a", "quire_b", True),
        (server_problem, "quire_server", "quire", False),
        (server_problem, "quire_server", "quire_server.routes", False),
        (plugin_problem, "quire_a", "quire.commands", False),
        (server_problem, "quire_server", "quire.plugin", False),
        (server_problem, "quire_server", "quire.engine", True),
        (server_problem, "quire_server", "quire_cpu_ref", True),
        (core_problem, {"quire_a"}, "quire_a.ops", True),
        (core_problem, {"quire_a"}, "quire.engine", False),
    ],
)
def test_the_rules_themselves(check, own, module, wrong):
    assert check(module, own) is wrong


def test_imports_are_found_wherever_they_stand():
    text = "import a.b\ndef f():\n    from c.d import e\n    if x:\n        import g\nfrom .h import i\n"
    assert [module for module, _ in imported(ast.parse(text), "own")] == ["a.b", "own.h", "c.d", "g"]
