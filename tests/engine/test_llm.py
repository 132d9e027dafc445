"""The scripting front end: shapes, errors, and what each parameter does end to end."""

import math

import pytest
from quire import LLM, ConfigError, EngineConfig, OutOfMemory, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint):
    return LLM(checkpoint("llama"), dtype="float32", num_kv_blocks=100, block_size=4, max_num_seqs=8)


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def test_one_or_many_prompts_in_order(llm):
    (one,) = generate(llm, "hello")
    assert (one.prompt, one.finished, len(one.outputs[0].token_ids)) == ("hello", True, 8)
    assert one.outputs[0].finish_reason == "length"
    many = generate(llm, ["hello", [5, 6, 7], {"prompt_token_ids": [5, 6, 7]}, {"prompt": "hello"}])
    texts = [output.outputs[0].text for output in many]
    assert texts[0] == texts[3] == one.outputs[0].text
    assert texts[1] == texts[2]
    assert [output.prompt for output in many] == ["hello", None, None, "hello"]


def test_params_may_differ_per_prompt(llm):
    outputs = generate(llm, ["a", "b"], [GREEDY, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 3]
    with pytest.raises(RequestError, match="2 prompts"):
        generate(llm, ["a", "b"], [GREEDY])


def test_streams_add_up(llm):
    (whole,) = generate(llm, "stream me")
    deltas = list(llm.stream("stream me", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [token for delta in deltas for token in delta.token_ids] == whole.outputs[0].token_ids
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_leaving_a_stream_frees_everything(llm):
    for _ in llm.stream("leave early", SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)):
        break
    assert llm.engine.kv_stats().used == 0
    assert not llm.engine.has_work()


def test_several_outputs_share_the_prompt(llm):
    llm.reset_prefix_cache()
    params = SamplingParams(n=4, seed=3, max_tokens=6, ignore_eos=True, temperature=2.0)
    (output,) = generate(llm, [list(range(3, 40))], params)
    assert len({tuple(sequence.token_ids) for sequence in output.outputs}) == 4
    assert [sequence.index for sequence in output.outputs] == [0, 1, 2, 3]
    again = generate(llm, [list(range(3, 40))], params)[0]
    assert [s.token_ids for s in again.outputs] == [s.token_ids for s in output.outputs]


def test_seeds_repeat_and_differ(llm):
    def sample(seed):
        return generate(llm, "x", SamplingParams(seed=seed, max_tokens=10, ignore_eos=True))[0].outputs[0].token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    unseeded = SamplingParams(max_tokens=10, ignore_eos=True)
    first, second = (generate(llm, "x", unseeded)[0].outputs[0].token_ids for _ in range(2))
    assert first != second


def test_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = generate(llm, [[9, 8, 7, 6, 5]], params)
    sequence = output.outputs[0]
    assert len(sequence.logprobs) == 4
    for token, position in zip(sequence.token_ids, sequence.logprobs, strict=True):
        assert position[token].rank == 1
        assert len(position) == 3
    assert sequence.cumulative_logprob == pytest.approx(
        sum(p[t].logprob for t, p in zip(sequence.token_ids, sequence.logprobs, strict=True))
    )
    assert output.prompt_logprobs[0] is None
    assert [token in position for token, position in zip([8, 7, 6, 5], output.prompt_logprobs[1:], strict=True)] == [
        True
    ] * 4
    assert all(2 <= len(position) <= 3 for position in output.prompt_logprobs[1:])


def test_prompt_logprobs_do_not_depend_on_chunks(llm, checkpoint):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = list(range(10, 40))
    whole = generate(llm, [prompt], params)[0].prompt_logprobs
    chunked = LLM(checkpoint("llama"), dtype="float32", num_kv_blocks=100, max_num_batched_tokens=7)
    pieces = chunked.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs
    assert len(whole) == len(pieces) == 30
    for ours, theirs, token in zip(whole[1:], pieces[1:], prompt[1:], strict=True):
        assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


def test_stop_strings_tokens_and_min_tokens(llm):
    (free,) = generate(llm, "tell me", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    tokens, text = free.outputs[0].token_ids, free.outputs[0].text
    third = tokens[2]
    at = tokens.index(third)
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=20, stop_token_ids=[third], include_stop_str_in_output=include
        )
        stopped = generate(llm, "tell me", params)[0].outputs[0]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
        assert stopped.token_ids == tokens[: at + 1]
        assert stopped.text == llm.engine.parts.tokenizer.decode(tokens[: at + include], skip_special_tokens=True)
    piece = text[3:5]
    by_text = generate(llm, "tell me", SamplingParams(temperature=0, max_tokens=20, stop=piece, ignore_eos=True))[
        0
    ].outputs[0]
    assert (by_text.text, by_text.stop_reason) == (text[: text.find(piece)], piece)
    kept = SamplingParams(temperature=0, max_tokens=20, stop=[piece], include_stop_str_in_output=True, ignore_eos=True)
    assert generate(llm, "tell me", kept)[0].outputs[0].text == text[: text.find(piece)] + piece
    late = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[third], min_tokens=10)
    assert third not in generate(llm, "tell me", late)[0].outputs[0].token_ids[:9]
    assert llm.engine.kv_stats().used == 0


def test_filters_and_biases(llm):
    only = SamplingParams(temperature=1.0, max_tokens=10, allowed_token_ids=[40, 41], ignore_eos=True)
    assert set(generate(llm, "x", only)[0].outputs[0].token_ids) <= {40, 41}
    biased = SamplingParams(temperature=0, max_tokens=3, logit_bias={50: 1000.0}, ignore_eos=True)
    assert generate(llm, "x", biased)[0].outputs[0].token_ids == [50] * 3
    no_repeat = SamplingParams(
        temperature=0, max_tokens=12, frequency_penalty=2.0, logit_bias={50: 3, 51: 3, 52: 3}, ignore_eos=True
    )
    tokens = generate(llm, "x", no_repeat)[0].outputs[0].token_ids
    assert len(set(tokens)) > 1


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert (
        llm.get_tokenizer().decode(output.prompt_token_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(llm.chat([messages, messages], GREEDY, use_tqdm=False)) == 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], ["empty"]),
        ([[5] * 300], ["300", "256", "255"]),
        ([[1, 9999]], ["9999", "319"]),
        ([[-4]], ["-4"]),
        ([{"prompts": "typo"}], ["prompts"]),
        ([{"cache_salt": "s"}], ["prompt_token_ids"]),
        ([["a", "b"]], ["integers"]),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(llm, prompt, words):
    if prompt == []:
        prompt = [[]]
    with pytest.raises(RequestError) as caught:
        generate(llm, ["fine", *prompt])
    for word in words:
        assert word in str(caught.value)
    assert not llm.engine.has_work()


def test_output_ends_at_the_model_length(llm):
    (output,) = generate(llm, [[5] * 250], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 256 - 250
    assert output.outputs[0].finish_reason == "length"


def test_salts_keep_tenants_apart(llm):
    llm.reset_prefix_cache()
    prompt = list(range(3, 30))
    for salt, cached in (("a", False), ("b", False), ("a", True)):
        (output,) = generate(llm, [{"prompt_token_ids": prompt, "cache_salt": salt}])
        assert (output.num_cached_tokens > 0) == cached


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_model_len": 100_000}, ConfigError, ["100,000", "256"]),
        ({"dtype": "float8"}, ConfigError, ["dtype"]),
        ({"max_num_seq": 3}, ConfigError, ["max_num_seqs"]),
        ({"attention_backend": "cuda"}, ConfigError, ["cuda", "cpu_ref"]),
        ({"num_kv_blocks": 10**9}, OutOfMemory, ["num_kv_blocks", "GiB"]),
        ({"quantization": "gptq"}, ConfigError, ["gptq"]),
        ({"plugin_options": {"radix": {"min_partial": 3}}, "kv_allocator": "radix"}, ConfigError, ["min_partial"]),
    ],
)
def test_bad_options_are_config_errors(checkpoint, options, error, words):
    with pytest.raises(error) as caught:
        LLM(checkpoint("llama"), **options)
    for word in words:
        assert word in str(caught.value)


def test_a_complete_config_is_taken(checkpoint):
    config = EngineConfig(model=checkpoint("llama"), dtype="float32", num_kv_blocks=20, kv_allocator="radix")
    llm = LLM(config=config)
    assert llm.engine.parts.config.selected["kv_allocator"].provider.name == "radix"
    with pytest.raises(ConfigError, match="not both"):
        LLM("x", config=config)


def test_one_bad_row_does_not_hurt_the_others(checkpoint, monkeypatch):
    llm = LLM(checkpoint("llama"), dtype="float32", num_kv_blocks=100)
    (before,) = generate(llm, "good")
    model = llm.engine.parts.executor._model
    real, steps = model.logits, []

    def poisoned(hidden):
        logits = real(hidden)
        steps.append(1)
        if len(steps) == 2:
            logits[0] = math.nan
        return logits

    monkeypatch.setattr(model, "logits", poisoned)
    bad, good = generate(llm, ["bad!", "good"])
    assert bad.outputs[0].finish_reason == "error"
    assert "not finite" in bad.outputs[0].error
    assert good.outputs[0].token_ids == before.outputs[0].token_ids
    assert llm.engine.kv_stats().used == 0


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(checkpoint, monkeypatch):
    llm = LLM(checkpoint("llama"), dtype="float32", num_kv_blocks=100)
    model = llm.engine.parts.executor._model
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *args: 1 / 0)
        (output,) = generate(llm, "x")
    assert output.outputs[0].finish_reason == "error"
    assert "ZeroDivisionError" in output.outputs[0].error
    assert generate(llm, "x")[0].outputs[0].finish_reason == "length"


def test_every_dtype_runs_and_agrees_with_float32(checkpoint, llm):
    prompt = list(range(20, 50))
    (exact,) = generate(llm, [prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    for dtype, tolerance in (("float16", 0.05), ("bfloat16", 0.4)):
        other = LLM(checkpoint("llama"), dtype=dtype, num_kv_blocks=50)
        (close,) = generate(other, [prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        for token, ours, theirs in zip(prompt[1:], close.prompt_logprobs[1:], exact.prompt_logprobs[1:], strict=True):
            assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=tolerance)
