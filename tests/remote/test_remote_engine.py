"""The engine in a child process: what is asked of it survives the child."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from quire import AsyncLLM, ConfigError, EngineDead, SamplingParams
from quire.errors import EngineError, OutOfMemory
from quire.llm import LLM
from quire.registry import HostOptions, build_host
from quire.remote import supervisor
from quire.remote.child import Child

OPTIONS = {"dtype": "float32", "num_kv_blocks": 600, "process": True}
REQUESTS = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=200, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=100, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=4, max_tokens=200, ignore_eos=True, frequency_penalty=0.5, min_tokens=150),
    SamplingParams(temperature=1.0, seed=5, max_tokens=200, ignore_eos=True, stop=["zq", "quux"], top_p=0.9),
    SamplingParams(temperature=1.2, seed=6, max_tokens=300, ignore_eos=True, top_k=20, skip_special_tokens=False),
] * 2


@pytest.fixture(scope="module", autouse=True)
def patient():
    """The tests kill more children than a server would put up with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "MAX_RESTARTS", 100)
        patch.setattr(supervisor, "WINDOW", 5.0)
        yield


@pytest.fixture(scope="module")
def llm(patient):
    # Deterministic, so that log probabilities do not depend on how many tokens a step computes either.
    served = AsyncLLM(**OPTIONS, deterministic=True)
    yield served
    served.shutdown()


async def outputs(llm, *, after_first=lambda: None):
    """All outputs of REQUESTS, put together; `after_first` is called when every stream has begun."""
    begun = asyncio.Barrier(len(REQUESTS) + 1)

    async def one(index, params):
        text, tokens, logprobs, prompt, ends = {}, {}, {}, [], {}
        first = True
        async for delta in llm.stream(f"Tell me about number {index}.", params, request_id=f"r{index}-{time.time()}"):
            text[delta.index] = text.get(delta.index, "") + delta.text
            tokens[delta.index] = tokens.get(delta.index, ()) + delta.token_ids
            logprobs[delta.index] = logprobs.get(delta.index, ()) + (delta.logprobs or ())
            prompt += delta.prompt_logprobs if delta.index == 0 else ()
            if delta.finish_reason:
                assert delta.index not in ends
                ends[delta.index] = (delta.finish_reason, delta.stop_reason, delta.error)
            if first and sum(map(len, tokens.values())) > 20:
                first = False
                await begun.wait()
        return text, tokens, ends, prompt, logprobs

    tasks = [asyncio.create_task(one(index, params)) for index, params in enumerate(REQUESTS)]
    await begun.wait()
    after_first()
    return await asyncio.gather(*tasks)


def test_killed_under_streams_all_complete_and_exact(llm):
    undisturbed = asyncio.run(outputs(llm))
    first = llm.engine.process_id
    disturbed = asyncio.run(outputs(llm, after_first=lambda: os.kill(llm.engine.process_id, signal.SIGKILL)))
    assert llm.engine.process_id != first
    assert disturbed == undisturbed
    assert all(end[2] is None for _, _, ends, *_ in disturbed for end in ends.values())


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answer(llm, prompt="What is 2+2?", **fields):
    async def last():
        return [d async for d in llm.stream(prompt, SamplingParams(max_tokens=5, ignore_eos=True, **fields))][-1]

    return asyncio.run(last())


def test_killed_while_idle_it_comes_back(llm):
    old = llm.engine.process_id
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: llm.engine.process_id != old)
    assert answer(llm).finish_reason == "length"


def test_threads_of_a_child_sleep_while_they_have_nothing_to_do(llm):
    environment = psutil.Process(llm.engine.process_id).environ()
    assert environment["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY", "passive")


def test_health_says_that_there_is_no_child(llm):
    async def main():
        old = llm.engine.process_id
        os.kill(old, signal.SIGKILL)
        while llm.engine.process_id == old:
            await asyncio.sleep(0.005)
        with pytest.raises(EngineDead, match="another one is being started"):
            await llm.check_health()
        while llm.engine.process_id is None:
            await asyncio.sleep(0.05)
        await llm.check_health()

    asyncio.run(main())


def test_requests_and_aborts_while_there_is_no_child(llm):
    async def main():
        old = llm.engine.process_id
        os.kill(old, signal.SIGKILL)
        while llm.engine.process_id == old:
            await asyncio.sleep(0.005)
        kept = asyncio.create_task(collect("kept"))
        gone = asyncio.create_task(collect("gone"))
        await asyncio.sleep(0.05)
        await llm.abort("gone")
        assert (await gone) == []
        assert (await kept)[-1].finish_reason == "length"

    async def collect(name):
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        return [delta async for delta in llm.stream("x", params, request_id=name) if delta.finish_reason != "abort"]

    asyncio.run(main())


@pytest.fixture
def fast_supervisor(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "MAX_RESTARTS", 3)
    monkeypatch.setattr(supervisor, "WINDOW", 300.0)
    monkeypatch.setattr(supervisor, "SILENCE", 3.0)


@pytest.fixture
def traps(tmp_path, fast_supervisor):
    """An engine with a processor that, when told so, ends its process or does not return."""
    file = tmp_path / "traps_plugin.py"
    file.write_text(
        textwrap.dedent(
            """
            import os, time
            from quire.plugin import LogitsProcessor, Provider, hookimpl

            class Traps(LogitsProcessor):
                extra_args = frozenset({"trap"})
                @classmethod
                def validate(cls, params, vocab_size): ...
                def add(self, slot, request):
                    trap = (request.params.extra_args or {}).get("trap")
                    if trap == "die":
                        os._exit(9)
                    if trap == "hang":
                        time.sleep(1000)
                    return False
                def remove(self, slot): ...
                def apply(self, logits, ctx): ...

            @hookimpl
            def quire_providers():
                yield Provider("logits_processor", "traps", "traps_plugin:Traps", api=1)
            """
        )
    )
    served = AsyncLLM(
        **OPTIONS, logits_processors=("traps",), step_timeout=1, host=build_host(HostOptions(files=(file,)))
    )
    yield served
    served.shutdown()
    sys.modules.pop("traps_plugin", None)


def test_a_request_that_kills_children_is_ended_and_the_others_go_on(traps):
    async def stream(trap):
        extra = {"extra_args": {"trap": trap}} if trap else {}
        params = SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0, **extra)
        return [delta async for delta in traps.stream("x", params)]

    async def main():
        others = [asyncio.create_task(stream(None)) for _ in range(3)]
        deadly = asyncio.create_task(stream("die"))
        late = asyncio.create_task(stream(None))
        with pytest.raises(EngineDead, match="ended 3 times while this request ran"):
            raise EngineDead((await deadly)[-1].error)  # `stream` raises it if no child lived to accept the request
        return await asyncio.gather(*others, late, stream(None))

    *tried, alone = (tuple(token for delta in deltas for token in delta.token_ids) for deltas in asyncio.run(main()))
    assert len(alone) == 300
    assert tried == [alone] * 4


def test_a_step_that_does_not_end_is_ended(traps):
    old = traps.engine.process_id
    assert "while this request ran" in answer(traps, extra_args={"trap": "hang"}).error
    assert traps.engine.process_id != old
    assert answer(traps).finish_reason == "length"


def test_a_child_that_gives_no_sign_of_life_is_replaced(fast_supervisor):
    llm = AsyncLLM(**OPTIONS)
    old = llm.engine.process_id
    os.kill(old, signal.SIGSTOP)
    assert answer(llm).finish_reason == "length"
    assert llm.engine.process_id != old
    llm.shutdown()


def test_when_no_child_can_be_had_everybody_is_told(fast_supervisor, monkeypatch):
    llm = AsyncLLM(**OPTIONS)

    def refuse(begin):
        raise EngineError("no room")

    async def main():
        task = asyncio.create_task(collect())
        await asyncio.sleep(0.2)
        monkeypatch.setattr(Child, "start", refuse)
        os.kill(llm.engine.process_id, signal.SIGKILL)
        last = (await task)[-1]
        assert last.finish_reason == "error"
        assert "could not be started: no room" in last.error
        with pytest.raises(EngineDead):
            await collect()

    async def collect():
        return [d async for d in llm.stream("x", SamplingParams(max_tokens=1500, ignore_eos=True))]

    asyncio.run(main())
    llm.shutdown()


def test_what_is_wrong_with_the_configuration_is_told_as_if_it_were_here():
    with pytest.raises(OutOfMemory, match="are free"):
        AsyncLLM(process=True, num_kv_blocks=1 << 30)
    with pytest.raises(ConfigError, match="only a server's engine"):
        LLM(process=True)


def test_the_child_ends_with_its_parent():
    script = """
        import os, signal
        from quire import AsyncLLM
        if __name__ == "__main__":
            print(AsyncLLM(process=True, num_kv_blocks=50).engine.process_id, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    child = int(parent.stdout)
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_metrics_of_a_child_reach_the_parents_sinks(llm):
    from quire.contract.metrics import MetricsInit, MetricsSink

    class Kept(MetricsSink):
        def __init__(self):
            super().__init__(MetricsInit("x"))
            self.steps, self.requests = [], []

        def record_step(self, stats):
            self.steps.append(stats)

        def record_request(self, stats):
            self.requests.append(stats)

    sink = Kept()
    llm.engine.add_sink("kept", sink)
    answer(llm)
    wait_for(lambda: sink.requests)
    assert sink.requests[-1].num_output_tokens == 5
    assert sum(step.num_sampled for step in sink.steps) == 5
    assert sink.requests[-1].first_token_s > 0
