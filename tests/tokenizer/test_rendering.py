"""Chat templates in a process of their own: the same text as here, and no harm from one that runs wild."""

import gc
import os
import signal
import threading
import time

import pytest
from quire import RequestError
from quire.testing.tiny_models import CHAT_TEMPLATE, save_byte_tokenizer
from quire.tokenizer import rendering
from quire.tokenizer.rendering import Renderer, RenderError
from quire.tokenizer.tokenizer import Tokenizer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS += "{% endfor %}"


def job(template, content="hello", **arguments):
    return {
        "messages": [{"role": "user", "content": content}],
        "tools": None,
        "template": template,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "arguments": arguments,
    }


@pytest.fixture(scope="module")
def apart():
    return Renderer(timeout=30)


def pids(renderer):
    return [process._process.pid for process in renderer._idle]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("content", ["hello", "", "line\n\nline\r\n", "é😀\ud800", "x" * 300_000, '"}\\'])
def test_the_text_is_the_same_as_here(apart, content):
    wanted = Renderer().render(job(CHAT_TEMPLATE, content))
    assert content.strip() in wanted
    assert apart.render(job(CHAT_TEMPLATE, content)) == wanted


def test_arguments_and_refusals_pass(apart):
    for renderer in (apart, Renderer()):
        assert renderer.render(job("{{ mode }} {{ add_generation_prompt }}", mode=[1, None])) == "[1, None] True"
        with pytest.raises(RenderError, match=r"^roles must alternate$"):
            renderer.render(job("{{ raise_exception('roles must alternate') }}"))
        with pytest.raises(RenderError, match="unexpected"):
            renderer.render(job("{{ ) }}"))


def test_what_is_not_json_is_told(apart):
    with pytest.raises(RenderError, match="JSON values: Object of type object"):
        apart.render(job(CHAT_TEMPLATE, object()))


def test_one_that_does_not_end_is_killed_and_the_next_is_served():
    renderer = Renderer(timeout=1)
    renderer.render(job("ok"))
    (pid,) = pids(renderer)
    with pytest.raises(RenderError, match="longer than 1 seconds"):
        renderer.render(job(ENDLESS))
    assert not is_alive(pid)
    assert renderer.render(job("ok")) == "ok"
    assert pids(renderer) != [pid]


def test_one_that_hangs_does_not_hold_up_another():
    renderer = Renderer(timeout=3)

    def hang():
        with pytest.raises(RenderError):
            renderer.render(job(ENDLESS))

    hung = threading.Thread(target=hang)
    hung.start()
    time.sleep(0.2)
    assert renderer.render(job("ok")) == "ok"
    assert hung.is_alive()
    hung.join()


def test_memory_and_output_are_bounded(apart):
    with pytest.raises(RenderError, match="too much memory"):
        apart.render(job("{{ ('x' * 2000000000) | length }}"))
    with pytest.raises(RenderError, match=f"wrote {rendering.MAX_CHARACTERS + 1} characters"):
        apart.render(job("{{ 'x' * length }}", length=rendering.MAX_CHARACTERS + 1))
    assert apart.render(job("ok")) == "ok"


def test_a_process_that_dies_costs_its_own_request_only():
    renderer = Renderer(timeout=30)
    renderer.render(job("ok"))
    (pid,) = pids(renderer)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RenderError, match="has died"):
        renderer.render(job("ok"))
    assert renderer.render(job("ok")) == "ok"


def test_many_threads_share_few_processes():
    renderer = Renderer(timeout=30)
    texts = {}

    def work(number):
        texts[number] = renderer.render(job("{{ messages[0].content }}", f"text {number}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"text {number}" for number in range(24)}
    assert len(set(pids(renderer))) == len(pids(renderer)) <= rendering.MAX_PROCESSES


def test_no_process_outlives_its_renderer():
    renderer = Renderer(timeout=30)
    renderer.render(job("ok"))
    (pid,) = pids(renderer)
    del renderer
    gc.collect()
    assert not is_alive(pid)


def test_a_tokenizer_with_a_time_limit(tmp_path):
    folder = tmp_path
    save_byte_tokenizer(folder)
    messages = [{"role": "user", "content": "hi", "name": None}]
    limited = Tokenizer(folder, template_timeout=1)
    assert limited.apply_chat_template(messages) == Tokenizer(folder).apply_chat_template(messages)
    with pytest.raises(RequestError, match="took longer than 1 seconds") as caught:
        limited.apply_chat_template(messages, chat_template=ENDLESS)
    assert caught.value.param == "messages"
