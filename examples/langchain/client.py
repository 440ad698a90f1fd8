"""LangChain on this server: structured output, a stream, an error.

python client.py IMAGE [BASE_URL]

OPENAI_API_KEY=KEY sends a key.
"""

import base64
import os
import sys
from pathlib import Path
from typing import Literal

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Thing(BaseModel):
    position: str
    shape: str
    color: str
    size: Literal["small", "large"]


class Drawing(BaseModel):
    objects: list[Thing]


def main(image: bytes, base_url: str, key: str) -> None:
    model = openai.OpenAI(base_url=base_url, api_key=key).models.list().data[0].id
    chat = ChatOpenAI(model=model, base_url=base_url, api_key=key)
    data = base64.b64encode(image).decode()

    def ask(text: str) -> list:
        """The image first: the bundled model was trained so."""
        part = {"type": "image", "base64": data, "mime_type": "image/png"}
        return [HumanMessage(content=[part, {"type": "text", "text": text}])]

    question = ask("List every object with its position, shape, color and size.")
    for method in ("json_schema", "function_calling"):
        drawing = chat.with_structured_output(Drawing, method=method).invoke(question)
        print(f"Objects by {method}: {drawing.model_dump_json()}")

    print("Place: ", end="")
    for chunk in chat.stream(ask("Where is this? Answer with one word.")):
        print(chunk.content, end="", flush=True)
    print()

    try:
        chat.bind(n=2).invoke(question)
    except openai.BadRequestError as error:
        print(f"An error: {error.status_code} {error.code} in {error.param}")


if __name__ == "__main__":
    path, base_url = (*sys.argv[1:], "http://localhost:8000/v1")[:2]
    main(Path(path).read_bytes(), base_url, os.environ.get("OPENAI_API_KEY", "-"))
