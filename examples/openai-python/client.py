"""OpenAI's Python SDK on this server: an answer under a schema, a stream, a task, an error.

python client.py IMAGE [BASE_URL]

OPENAI_API_KEY=KEY sends a key.
"""

import base64
import os
import sys
from pathlib import Path
from typing import Literal

import openai
from pydantic import BaseModel


class Thing(BaseModel):
    position: str
    shape: str
    color: str
    size: Literal["small", "large"]


class Drawing(BaseModel):
    objects: list[Thing]


def main(image: bytes, client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}

    def ask(text: str) -> list:
        """The image first: the bundled model was trained so."""
        return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]

    answer = client.chat.completions.parse(
        model=model,
        messages=ask("List every object with its position, shape, color and size."),
        response_format=Drawing,  # the answer fits it, or the call raises
    )
    print("Objects:", answer.choices[0].message.parsed.model_dump_json())

    print("Place: ", end="")
    for chunk in client.chat.completions.create(
        model=model, messages=ask("Where is this? Answer with one word."), stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [part]}],
        extra_body={"task": "image-analysis"},  # a task that the server knows by its name
    )
    print("Analysis:", answer.choices[0].message.content)

    try:
        client.chat.completions.create(model=model, messages=ask("Describe it."), n=2)
    except openai.BadRequestError as error:
        print(f"An error: {error.status_code} {error.code} in {error.param}")


if __name__ == "__main__":
    path, base_url = (*sys.argv[1:], "http://localhost:8000/v1")[:2]
    key = os.environ.get("OPENAI_API_KEY", "-")
    with openai.OpenAI(base_url=base_url, api_key=key) as opened:
        try:
            main(Path(path).read_bytes(), opened)
        except openai.APIError as failed:
            sys.exit(f"{type(failed).__name__}: {failed}")
