"""LangChain: a model behind a prompt, called, streamed and asked for several answers at once.

quire serve
pip install langchain-openai
python examples/server/langchain_chat.py [http://127.0.0.1:8000]
"""

import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="quire-tiny")
chain = ChatPromptTemplate.from_messages([("user", "What is {a}+{b}?")]) | model

print(chain.invoke({"a": 27, "b": 45}).content)
print("".join(part.content for part in chain.stream({"a": 31, "b": 14})))
print([answer.content for answer in chain.batch([{"a": 10, "b": 20}, {"a": 11, "b": 21}])])
