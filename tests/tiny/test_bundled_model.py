"""The bundled model through the engine: a broken engine or checkpoint does not answer like this."""

from quire import LLM, SamplingParams
from tiny.data import evaluation_set, is_right

ASKED = 12
"""Held-out problems per task; scripts/tiny/evaluate.py asks more."""


def test_the_bundled_model_is_right_in_its_world():
    """Far below what it reaches, so that rounding on another machine cannot fail it; a broken engine does."""
    llm = LLM()
    problems = evaluation_set(5, ASKED)
    samples = [sample for name in ("add2", "sub2", "copy", "tool", "json", "unknown") for sample in problems[name]]
    chats = [llm.get_tokenizer().apply_chat_template(s.messages, tools=s.tools) for s in samples]
    outputs = llm.generate(chats, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)
    right = sum(is_right(sample, output.outputs[0].text) for sample, output in zip(samples, outputs, strict=True))
    assert right >= 0.7 * len(samples)
