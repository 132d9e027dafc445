"""Anthropic's client: a streamed message, and counting tokens.

quire serve
python examples/server/anthropic_python.py [http://127.0.0.1:8000]
"""

import sys

import anthropic

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = anthropic.Anthropic(base_url=url, api_key="none")
question = [{"role": "user", "content": "What is 27+45?"}]

with client.messages.stream(model="quire-tiny", max_tokens=50, messages=question) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()

counted = client.messages.count_tokens(model="quire-tiny", messages=question)
print(f"the question has {counted.input_tokens} tokens")
client.close()
