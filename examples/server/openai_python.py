"""OpenAI's client: a streamed chat with its usage, a tool call, and a response.

quire serve
python examples/server/openai_python.py [http://127.0.0.1:8000]
"""

import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

question = [{"role": "user", "content": "What is 27+45?"}]
stream = client.chat.completions.create(
    model=model, messages=question, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="")
    elif chunk.usage:
        print(f"  ({chunk.usage.completion_tokens} tokens)")

city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
weather = {"name": "get_weather", "description": "Weather in a city", "parameters": city}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    tools=[{"type": "function", "function": weather}],
)
for call in answer.choices[0].message.tool_calls or ():
    print(call.function.name, call.function.arguments)

print(client.responses.create(model=model, input="Sort: 42, 7, 19").output_text)
client.close()
