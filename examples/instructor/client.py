"""Instructor on this server: the answer is an object of your class.

python client.py IMAGE [BASE_URL]

OPENAI_API_KEY=KEY sends a key.
"""

import os
import sys
from typing import Literal

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel


class Thing(BaseModel):
    position: str
    shape: str
    color: str
    size: Literal["small", "large"]


class Drawing(BaseModel):
    objects: list[Thing]


class Place(BaseModel):
    scene: Literal["field", "desert", "snow", "sea"]
    lighting: Literal["day", "night"]


def main(path: str, client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    image = instructor.Image.from_path(path)

    def ask(text: str) -> list:
        """The image first: the bundled model was trained so."""
        return [{"role": "user", "content": [image, text]}]

    # Instructor's default mode: one forced tool, whose arguments fit the class.
    tools = instructor.from_openai(client)
    drawing = tools.chat.completions.create(
        model=model,
        messages=ask("List every object with its position, shape, color and size."),
        response_model=Drawing,
        max_retries=0,  # an answer fits the schema, or the server says why not
    )
    print("Objects:", drawing.model_dump_json())

    # The same by `response_format`.
    schemas = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    place = schemas.chat.completions.create(
        model=model,
        messages=ask("Give the scene and the lighting."),
        response_model=Place,
        max_retries=0,
    )
    print("Place:", place.model_dump_json())

    try:
        tools.chat.completions.create(
            model=model,
            messages=ask("Name every object in a few words. Answer as JSON."),
            response_model=Drawing,
            max_retries=0,
            max_tokens=3,  # an answer that is cut is an error, never half an object
        )
    except InstructorRetryException as error:
        cause = error.__cause__  # the exception of the SDK
        print(f"An error: {cause.status_code} {cause.code}")


if __name__ == "__main__":
    path, base_url = (*sys.argv[1:], "http://localhost:8000/v1")[:2]
    key = os.environ.get("OPENAI_API_KEY", "-")
    with openai.OpenAI(base_url=base_url, api_key=key) as opened:
        main(path, opened)
