"""Mistakes of somebody who writes a first plugin: each is answered by a message that names the mend.

Every case starts from what `quire plugins new attention mine` writes, makes one mistake, and runs the program.
"""

from __future__ import annotations

import sys

import pytest
import torch
from quire.errors import PluginError
from quire.plugin import AttentionCaps, Provider
from quire.scaffold import new_plugin
from quire.testing.attention import AttentionConformance
from quire.testing.attention_problems import make_layer

INIT, CODE, PROJECT, CONFIG = "quire_mine/__init__.py", "quire_mine/attention.py", "pyproject.toml", "quire.yaml"
BY_NAME = ("run", "--attention-backend", "mine", "--max-tokens", "4", "--temperature", "0", "What is 27+45?")
BY_FILE = ("-c", CONFIG, *BY_NAME[:1], *BY_NAME[3:])
TEST = ("plugins", "test", "mine")
SUPER = "        super().__init__(init)\n"
BODY = "        out: Tensor,\n    ) -> None:\n"
BOOM = "        raise ValueError('boom')\n"

MISTAKES = {
    "another group of entry points": (PROJECT, "points.quire]", "points.quire_plugins]", BY_NAME, "must be 'quire'"),
    "another group, tested": (PROJECT, "points.quire]", "points.quire_plugins]", TEST, "must be 'quire'"),
    "misspelt package": (PROJECT, '= "quire_mine"', '= "quire_mien"', BY_NAME, "correct it in pyproject.toml"),
    "misspelt hook": (INIT, "quire_providers", "quire_provider", BY_NAME, "did you mean 'quire_providers'?"),
    "unmarked hook": (INIT, "@hookimpl\n", "", BY_NAME, "write `@hookimpl`"),
    "hook returns None": (
        INIT,
        "yield Provider",
        "Provider",
        BY_NAME,
        "returned None; return a list such as [Provider(",
    ),
    "hook returns one": (INIT, "yield", "return", BY_NAME, "returned one Provider; return a list such as"),
    "list of tuples": (INIT, "yield Provider", "yield tuple", BY_NAME, "quire_providers failed"),
    "unknown argument of a hook": (INIT, "providers()", "providers(hots)", BY_NAME, "takes hots; it may take host"),
    "misspelt class": (INIT, ":MineAttention", ":MineAtention", BY_NAME, "did you mean 'MineAttention'?"),
    "misspelt module": (INIT, ".attention:Mine", ".atention:Mine", BY_NAME, "correct the path"),
    "target without a colon": (INIT, "attention:Mine", "attention.Mine", BY_NAME, "'package.module:attribute'"),
    "another API version": (INIT, "api=1", "api=2", BY_NAME, "serves 1; pip install --upgrade quire"),
    "no API version": (INIT, "        api=1,\n", "", BY_NAME, "missing 1 required positional argument: 'api'"),
    "misspelt point": (INIT, '"attention"', '"atention"', BY_NAME, "did you mean 'attention'?"),
    "misspelt options": (INIT, ":MineOptions", ":MineOption", BY_NAME, "did you mean 'MineOptions'?"),
    "options that take anything": (CODE, ', extra="forbid"', "", BY_NAME, 'ConfigDict(frozen=True, extra="forbid")'),
    "misspelt option": (CONFIG, "query_rows", "query_row", BY_FILE, "did you mean 'query_rows'?"),
    "bad value of an option": (CONFIG, "128", "none", BY_FILE, "Input should be a valid integer"),
    "misspelt name in the file": (CONFIG, "attention: mine", "attention: mien", BY_FILE, "did you mean 'mine'?"),
    "misspelt point in the file": (CONFIG, "  attention:", "  atention:", BY_FILE, "did you mean 'plugins.attention'?"),
    "options under another name": (CONFIG, "    mine:", "    mien:", BY_FILE, "did you mean 'mine'?"),
    "a tab in the file": (CONFIG, "  attention", "\tattention", BY_FILE, "indented by spaces, never tabs"),
    "the distribution's name": ("", "", "", (*BY_NAME[:2], "quire-mine", BY_NAME[-1]), "did you mean 'mine'?"),
    "the distribution's name, tested": ("", "", "", ("plugins", "test", "quire-mine"), "did you mean 'mine'?"),
    "another case": ("", "", "", ("plugins", "test", "Mine"), "did you mean 'mine'?"),
    "a file that is not there": ("", "", "", ("--plugin", "mine.py", "plugins", "list"), "the path of a Python file"),
    "no forward": (
        CODE,
        "def forward(",
        "def forwards(",
        BY_NAME,
        "lacks the method forward(self, layer, q, k, v, kv,",
    ),
    "no base": (CODE, "(AttentionBackend)", "", BY_NAME, "not a subclass of AttentionBackend"),
    "no caps": (CODE, "caps =", "capabilities =", BY_NAME, "lacks the class attribute 'caps'"),
    "dtypes as text": (CODE, "{torch.float32, ", '{"float32", ', BY_NAME, "write frozenset({torch.float32})"),
    "device types as text": (CODE, 'frozenset({"cpu", "cuda"})', '"cpu"', BY_NAME, "write frozenset({'cpu'})"),
    "another device type": (CODE, '{"cpu", "cuda"}', '{"cuda"}', BY_NAME, "'cpu' is not in its caps.device_types"),
    "an undeclared feature": (CODE, '"causal", ', "", BY_NAME, "['causal'] are not in its caps.features"),
    "another constructor": (
        CODE,
        "self, init: AttentionInit",
        "self, device, dtype",
        BY_NAME,
        "must take (self, init)",
    ),
    "an error in the constructor": (CODE, SUPER, SUPER + BOOM, BY_NAME, "of plugin 'mine' could not be made"),
    "a parameter too few": (
        CODE,
        "        plan: Any,\n",
        "",
        BY_NAME,
        "must take (self, layer, q, k, v, kv, batch, plan",
    ),
    "an error in forward": (CODE, BODY, BODY + BOOM, BY_NAME, "failed in plugin 'mine' (quire-mine 0.1.0): ValueError"),
    "an error in plan": (
        CODE,
        "    def forward(",
        f"    def plan(self, batch):\n{BOOM}\n    def forward(",
        BY_NAME,
        "failed in plugin 'mine' (quire-mine 0.1.0): ValueError",
    ),
    "a wrong shape": (
        CODE,
        ".to(out.dtype)",
        ".flatten(1)",
        BY_NAME,
        "failed in plugin 'mine' (quire-mine 0.1.0): Runt",
    ),
    "bad syntax": (CODE, "class MineA", "clas MineA", BY_NAME, "SyntaxError: invalid syntax (attention.py, line"),
    "bad syntax at the door": (
        INIT,
        "def quire",
        "de quire",
        BY_NAME,
        "SyntaxError: invalid syntax (__init__.py, line",
    ),
    "a package that is missing": (
        CODE,
        "import torch\n",
        "import torch, nopackage\n",
        BY_NAME,
        "add it to the plugin's",
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new plugin's repository, the current folder, with `site` beside it on the path; nothing of it imported."""
    new_plugin("attention", "mine", tmp_path / "mine", license="MIT", holder="me", year=2026)
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path / "mine")
    yield tmp_path / "mine"
    for name in [name for name in sys.modules if name.startswith("quire_mine")]:
        del sys.modules[name]


def change(file, old, new):
    text = file.read_text()
    assert old in text, f"{file.name} has no {old!r}"
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_names_the_mend(mistake, folder, installer, quire):
    file, old, new, arguments, words = MISTAKES[mistake]
    if file:
        change(folder / file, old, new)
    installer(folder, folder.parent / "site")
    code, shown, told = quire(*arguments)
    assert code in (1, 2), shown
    assert words in told
    assert "this should not happen" not in told


@pytest.mark.parametrize("arguments", [BY_NAME, TEST])
def test_what_is_not_installed_says_how_it_would_be_found(arguments, folder, quire):
    code, _, told = quire(*arguments)
    assert code == 2
    assert "with an entry point in the group 'quire'; for your own, run `pip install -e .`" in told


def test_without_a_mistake_it_answers(folder, installer, quire):
    installer(folder, folder.parent / "site")
    assert quire(*BY_FILE)[:2] == (0, "72\n")


def test_a_name_that_another_has_is_asked_for_in_full(folder, installer, quire):
    change(folder / INIT, '"mine",', '"cpu_ref",')
    installer(folder, folder.parent / "site")
    code, _, told = quire("run", "--attention-backend", "cpu_ref", "What is 27+45?")
    assert code == 2
    assert "name one of ['cpu_ref:cpu_ref', 'mine:cpu_ref']" in told


def test_a_tuple_is_no_provider(folder, installer, quire):
    (folder / INIT).write_text(
        "from quire.plugin import hookimpl\n\n"
        "@hookimpl\ndef quire_providers():\n"
        "    return [('attention', 'mine', 'quire_mine.attention:MineAttention', 1)]\n"
    )
    installer(folder, folder.parent / "site")
    assert "must yield Provider objects, not tuple; return a list such as" in quire(*BY_NAME)[2]


def test_a_feature_that_is_nearly_right():
    from quire.plugin import AttentionBackend

    class Mine(AttentionBackend):
        caps = AttentionCaps(
            frozenset({"cpu"}), frozenset({torch.float32}), features=frozenset({"causal", "sliding-window"})
        )

    (reason,) = Mine.supports(make_layer("window"), torch.float32, "cpu", 16)
    assert reason == "features ['sliding_window'] are not in its caps.features, which say ['sliding-window']"


KIT_MISTAKES = {
    "result returned, not written": (
        ("out[begin:end] = attend", "result = attend"),
        ("        out[starts[-1] :] = 0  # padding tokens: anything finite will do\n", "        return result\n"),
        "it must write into `out` and return None",
    ),
    "result kept": (
        ("out[begin:end] = attend", "result = attend"),
        ("        out[starts[-1] :] = 0  # padding tokens: anything finite will do\n", ""),
        "forward wrote nothing into `out`",
    ),
    "base not constructed": ((SUPER, ""), ("", ""), "must call super().__init__(init)"),
    "another dtype": (
        ("x.float().repeat", "x.repeat"),
        ("q.float(), keys", "q.double(), keys"),
        "expected scalar type Double",
    ),
}


@pytest.mark.parametrize("mistake", KIT_MISTAKES)
def test_the_kit_says_what_is_wrong(mistake, folder, installer):
    *changes, words = KIT_MISTAKES[mistake]
    for old, new in changes:
        change(folder / CODE, old, new)
    installer(folder, folder.parent / "site")
    from quire_mine.attention import MineAttention

    with pytest.raises((AssertionError, RuntimeError)) as caught:
        AttentionConformance().test_equals_the_oracle(MineAttention, "gqa", "decode")
    assert words in str(caught.value)


@pytest.mark.slow
def test_a_misnamed_fixture_is_named(folder, installer, run):
    change(folder / "tests" / "test_plugin.py", "def backend_class", "def backend")
    installer(folder, folder.parent / "site")
    shown = run("-m", "pytest", "-q", "-x", "tests", cwd=folder, site=folder.parent / "site", code=1)
    assert "define the fixture `backend_class`" in shown


def test_an_error_of_the_users_passes_a_constructor_unchanged():
    from quire.errors import ConfigError
    from quire.registry import Selection

    def refuse(init):
        raise ConfigError("not this one")

    def break_down(init):
        raise OSError("no disk")

    provider = Provider("sampler", "x", "a:b", 1)
    with pytest.raises(ConfigError, match="not this one"):
        Selection(provider, "mine", refuse).make(None)
    with pytest.raises(PluginError, match="sampler 'x' of plugin 'mine' could not be made: OSError: no disk"):
        Selection(provider, "mine", break_down).make(None)
