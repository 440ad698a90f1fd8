"""Tries out what a model server can do. Each ability is yes, no or unknown, with its evidence.

*Yes* and *no* need an answer that proves it. A probe that fails, because the server refuses it, is
busy, or writes something that proves nothing, leaves the ability unknown. Nothing is concluded from
one schema about another: constraints are dropped schema by schema, so every answer is still checked.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.engines.remote.backend import State
from service.engines.remote.chat import dumps
from service.engines.remote.reading import Fact
from service.engines.remote.servers import (
    MAX_COMPLETION_TOKENS,
    MAX_TOKENS,
    Protocol,
    ServerKind,
)
from service.engines.remote.wire import Wire, WireError
from service.types import Grammar, GrammarKind

TRIES = 3
ASK_LIMIT_S = 120.0
"""Maximum time for the answer to one probe, in seconds."""
TOTAL_LIMIT_S = 600.0
"""Maximum time for all probes of one model, in seconds; what is not tried by then is unknown."""
PROSE = "Write one sentence about the sea, in plain words. Do not write JSON."
STRUCTURED_TOKENS = 192
"""Maximum number of tokens of a structured answer. A small vocabulary spells a word letter by letter."""
PROSE_TOKENS = 24
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}
IMAGE_SIDE = 128
REFUSALS = (400, 404, 415, 422, 500, 501)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. text: None where there is no usable answer, and ``failure`` says why.

    status: 0 where the server did not answer. thoughts: text in the channel for thoughts. tokens:
    None where the server does not tell them.
    """

    text: str | None
    failure: str = ""
    status: int = 0
    thoughts: str = ""
    cut: bool = False
    model: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(slots=True)
class Asker:
    """Puts single questions to one model. Never raises for what a server does."""

    wire: Wire
    kind: ServerKind
    model: str
    limit_field: str
    ask_limit_s: float = ASK_LIMIT_S
    total_limit_s: float = TOTAL_LIMIT_S
    fixed: dict[str, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    _begun: float = field(default_factory=time.monotonic)

    async def ask(
        self,
        text: str = PROSE,
        *,
        image: bytes | None = None,
        limit: Mapping[str, int] | None = None,
        max_tokens: int = PROSE_TOKENS,
        openai: bool = False,
        **fields: Any,
    ) -> Answer:
        """Ask once. image: PNG. limit: replaces the maximum number of tokens. openai: use OpenAI's
        API also where the server has its own."""
        left = self.total_limit_s - (time.monotonic() - self._begun)
        if left <= 0:
            return Answer(None, "no time was left")
        native = self.kind.protocol is Protocol.OLLAMA and not openai
        options = {**(limit or {self.limit_field: max_tokens})}
        build, path = (
            (_ollama_body, "/api/chat") if native else (_openai_body, "/v1/chat/completions")
        )
        body = build(self.model, text, image, {**self.fixed, **fields}, options)
        try:
            reply = await self.wire.fetch(
                "POST", path, dumps(body), limit_s=min(left, self.ask_limit_s)
            )
        except WireError as error:
            return Answer(None, f"the server did not answer: {error}"[:200])
        if reply.status != 200:
            return Answer(None, _refusal(reply.status, reply.body), reply.status)
        answer = (_ollama_answer if native else _openai_answer)(reply.body)
        if answer.model:
            self.names.add(answer.model)
        return answer

    def options(self, **values: Any) -> dict[str, Any]:
        """Sampling options, by the names of the server."""
        named = {self.kind.names.get(name, name): value for name, value in values.items()}
        return {"options": named} if self.kind.protocol is Protocol.OLLAMA else named


def _openai_body(
    model: str, text: str, image: bytes | None, fields: Mapping[str, Any], limit: Mapping[str, int]
) -> dict[str, Any]:
    content: Any = text
    if image is not None:
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": text},
        ]
    messages = [{"role": "user", "content": content}]
    return {
        "model": model, "messages": messages, "stream": False, "temperature": 0, **limit, **fields
    }  # fmt: skip


def _ollama_body(
    model: str, text: str, image: bytes | None, fields: Mapping[str, Any], limit: Mapping[str, int]
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "user", "content": text}
    if image is not None:
        message["images"] = [base64.b64encode(image).decode()]
    others = {name: value for name, value in fields.items() if name != "options"}
    options = {"temperature": 0, **limit, **fields.get("options", {})}
    return {"model": model, "messages": [message], "stream": False, "options": options, **others}


def _openai_answer(body: bytes) -> Answer:
    value = _json(body)
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return Answer(None, "the answer has no message", 200)
    usage = value["usage"] if isinstance(value.get("usage"), dict) else {}
    return _answer(
        message,
        choice.get("finish_reason"),
        value.get("model"),
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
    )


def _ollama_answer(body: bytes) -> Answer:
    value = _json(body)
    message = value.get("message")
    if not isinstance(message, dict):
        return Answer(None, "the answer has no message", 200)
    return _answer(
        message,
        value.get("done_reason"),
        value.get("model"),
        value.get("prompt_eval_count"),
        value.get("eval_count"),
    )


def _answer(
    message: Mapping[str, Any], reason: Any, model: Any, prompt_tokens: Any, output_tokens: Any
) -> Answer:
    content = message.get("content")
    thoughts = "".join(
        message[name]
        for name in ("reasoning_content", "reasoning", "thinking")
        if isinstance(message.get(name), str)
    )
    text = content if isinstance(content, str) else None
    return Answer(
        text,
        "" if text is not None else "the answer has no text",
        200,
        thoughts,
        reason == "length",
        model if isinstance(model, str) else "",
        prompt_tokens if isinstance(prompt_tokens, int) else None,
        output_tokens if isinstance(output_tokens, int) else None,
    )


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _refusal(status: int, body: bytes) -> str:
    """The status and what the server says, shortened."""
    error = _json(body).get("error", _json(body).get("message", ""))
    said = error.get("message", "") if isinstance(error, dict) else error
    return (
        f"refused with status {status}: {said}"[:160] if said else f"refused with status {status}"
    )


async def probe(asker: Asker, known: Mapping[str, Fact], seed: int | None = None) -> list[Fact]:
    """Probe a model for everything that is not known yet, one question at a time.

    known: facts that were read, by name; they are not tried. seed: of the random words and images.
    Some servers keep requests of one client waiting for each other, so nothing runs in parallel.
    """
    choose = random.Random(seed)
    found = [*await _limits(asker)]
    found.append(known.get("thinking") or await _thinking(asker, choose))
    found.append(await _grammar(asker, GrammarKind.JSON_SCHEMA, choose))
    if "vision" not in known or not known["vision"].known:
        found.append(await _vision(asker, found))
    found.append(await _pattern(asker, choose))
    for kind in GrammarKind:
        if kind is not GrammarKind.JSON_SCHEMA:
            found.append(await _grammar(asker, kind, choose))
    found.append(await _unknown_format(asker))
    return found + await _sampling(asker, known)


# The limit of tokens, and thoughts


async def _limits(asker: Asker) -> list[Fact]:
    """Which field limits the tokens of an answer: a limit of one token must cut the answer."""
    if asker.kind.protocol is Protocol.OLLAMA:
        names: Sequence[str] = (asker.limit_field,)
    else:
        names = (MAX_COMPLETION_TOKENS, MAX_TOKENS)
    failures = []
    for name in names:
        answer = await _limited(asker, name)
        if answer.status == 200 and answer.output_tokens == 1 and answer.cut:
            asker.limit_field = name
            return [Fact("token_limit", name, f"{name}: 1 gave one token, and reason length")]
        failures.append(f"{name}: {answer.failure or _tokens(answer)}")
    return [Fact("token_limit", State.UNKNOWN, "; ".join(failures))]


async def _limited(asker: Asker, name: str) -> Answer:
    if asker.kind.protocol is Protocol.OLLAMA:
        return await asker.ask(limit={name: 1})
    # Where the field is ignored, the other one keeps the answer short.
    other = {MAX_TOKENS: PROSE_TOKENS} if name == MAX_COMPLETION_TOKENS else {}
    answer = await asker.ask(limit={name: 1, **other})
    if answer.failure and other:
        answer = await asker.ask(limit={name: 1})
    return answer


def _tokens(answer: Answer) -> str:
    return (
        f"{answer.output_tokens} tokens with a limit of 1" if not answer.cut else "tokens not told"
    )


async def _thinking(asker: Asker, choose: random.Random) -> Fact:
    """Whether the model writes thoughts. If it does, they are turned off for all that follows."""
    fields, _ = _json_schema(asker, choose)
    answer = await asker.ask(max_tokens=STRUCTURED_TOKENS, **fields)
    thinks = bool(answer.thoughts) or (answer.text or "").lstrip().startswith("<think>")
    if not thinks:
        if answer.text is None:
            return Fact("thinking", State.UNKNOWN, answer.failure)
        return Fact("thinking", State.NO, "an answer came without thoughts")
    off = dict(asker.kind.no_thinking)
    if not off:
        return Fact(
            "thinking", State.YES, "thoughts in an answer; this kind has no field against them"
        )
    asker.fixed |= off
    again = await asker.ask(max_tokens=STRUCTURED_TOKENS, **_json_schema(asker, choose)[0])
    outcome = "goes on" if again.thoughts or not again.text else "stops"
    return Fact(
        "thinking", State.YES, f"thoughts in an answer; it {outcome} with {json.dumps(off)}"
    )


# Grammars


Try = Callable[[], tuple[dict[str, Any], Callable[[str], bool]]]


async def _grammar(asker: Asker, kind: GrammarKind, choose: random.Random) -> Fact:
    """Whether answers follow a grammar that no model follows by itself."""
    name = f"grammar.{kind.value}"
    if kind not in asker.kind.grammars:
        reason = asker.kind.refused.get(kind.value, "the API of this kind of server has no field")
        return Fact(name, State.NO, reason)
    if kind is GrammarKind.JSON_SCHEMA:
        return await _constrained(asker, name, lambda: _json_schema(asker, choose))
    return await _constrained(asker, name, lambda: _text_grammar(asker, kind, choose))


async def _pattern(asker: Asker, choose: random.Random) -> Fact:
    def one() -> tuple[dict[str, Any], Callable[[str], bool]]:
        pattern = f"^{_word(choose)}-[0-9]{{4}}$"
        schema = _object({"type": "string", "pattern": pattern})
        return _schema_fields(asker, schema), lambda text: _value(text, re.compile(pattern).search)

    if GrammarKind.JSON_SCHEMA not in asker.kind.grammars:
        return Fact("json_schema.pattern", State.NO, "JSON schemas are not taken")
    return await _constrained(asker, "json_schema.pattern", one)


async def _constrained(asker: Asker, name: str, attempt: Try) -> Fact:
    """Three tries under a prompt that demands prose. One answer beside the grammar is a no."""
    failures = []
    for _ in range(TRIES):
        fields, fits = attempt()
        answer = await asker.ask(max_tokens=STRUCTURED_TOKENS, **fields)
        if answer.text is None:
            failures.append(answer.failure)
        elif answer.cut:
            failures.append("the answer was cut by the limit of tokens")
        elif not fits(answer.text):
            return Fact(name, State.NO, f"an answer beside the grammar: {answer.text[:60]!r}")
    if failures:
        return Fact(name, State.UNKNOWN, f"{len(failures)} of {TRIES} tries failed: {failures[0]}")
    return Fact(name, State.YES, f"{TRIES} of {TRIES} answers follow a random grammar")


def _json_schema(
    asker: Asker, choose: random.Random
) -> tuple[dict[str, Any], Callable[[str], bool]]:
    word = _word(choose)
    return _schema_fields(asker, _object({"enum": [word]})), lambda text: _value(text, word.__eq__)


def _schema_fields(asker: Asker, schema: Any) -> dict[str, Any]:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    return dict(asker.kind.grammars[GrammarKind.JSON_SCHEMA](grammar))


def _text_grammar(
    asker: Asker, kind: GrammarKind, choose: random.Random
) -> tuple[dict[str, Any], Callable[[str], bool]]:
    word, other = _word(choose), _word(choose)
    if kind is GrammarKind.CHOICE:
        grammar = Grammar(kind, json.dumps([word, other]))
        return dict(asker.kind.grammars[kind](grammar)), lambda text: text in (word, other)
    expression = f"{word}-[0-9][0-9]"
    source = expression if kind is GrammarKind.REGEX else f'root ::= "{word}-" [0-9] [0-9]'
    fits = re.compile(expression).fullmatch
    return dict(asker.kind.grammars[kind](Grammar(kind, source))), lambda text: bool(fits(text))


def _object(value: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"value": value},
        "required": ["value"],
        "additionalProperties": False,
    }


def _value(text: str, fits: Callable[[str], Any]) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or value.keys() != {"value"}:
        return False
    return isinstance(value["value"], str) and bool(fits(value["value"]))


def _word(choose: random.Random) -> str:
    """Letters that no model writes by chance."""
    return "".join(choose.choice("bcdfghjkmnpqrstvwxz") for _ in range(6))


async def _unknown_format(asker: Asker) -> Fact:
    """Whether the server refuses a format that it does not know; others answer as if it was not
    there."""
    name = "refuses_unknown_formats"
    answer = await asker.ask(openai=True, response_format={"type": "bogus"}, limit={MAX_TOKENS: 8})
    if 400 <= answer.status < 500 and answer.status not in (401, 403, 404, 408, 429):
        return Fact(name, State.YES, answer.failure)
    if answer.status == 200:
        return Fact(name, State.NO, 'status 200 for response_format.type "bogus"')
    return Fact(name, State.UNKNOWN, answer.failure)


# Images


async def _vision(asker: Asker, found: Sequence[Fact]) -> Fact:
    """Whether two images of one colour each are recognised, and take tokens of the prompt."""
    guided = any(fact.name == "grammar.json_schema" and fact.value is State.YES for fact in found)
    text = f"Which colour fills the image: {', '.join(COLOURS)}? Answer with the colour only."
    schema = _object({"enum": list(COLOURS)})
    fields = _schema_fields(asker, schema) if guided else {}
    without = await asker.ask(text, max_tokens=STRUCTURED_TOKENS, **fields)
    right, rises = 0, []
    for colour in ("red", "blue"):
        image = await asyncio.to_thread(_image, COLOURS[colour])
        answer = await asker.ask(text, image=image, max_tokens=STRUCTURED_TOKENS, **fields)
        if answer.text is None:
            return Fact("vision", State.UNKNOWN, f"an image is {answer.failure}")
        named = {one for one in COLOURS if one in answer.text.lower()}
        right += named == {colour}
        if answer.prompt_tokens is not None and without.prompt_tokens is not None:
            rises.append(answer.prompt_tokens - without.prompt_tokens)
    return _judged(right, rises)


def _judged(right: int, rises: Sequence[int]) -> Fact:
    colours = f"{right} of 2 colours right"
    if len(rises) < 2:
        return Fact("vision", State.UNKNOWN, f"{colours}; tokens of the prompt not told")
    tokens = f"an image adds {min(rises)} tokens to the prompt"
    if min(rises) > 0 and right == 2:
        return Fact("vision", State.YES, f"{colours}; {tokens}")
    if max(rises) <= 0 and right < 2:
        return Fact("vision", State.NO, f"{colours}; {tokens}: images are dropped")
    return Fact("vision", State.UNKNOWN, f"{colours}; {tokens}")


def _image(colour: tuple[int, int, int]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), colour).save(buffer, "PNG")
    return buffer.getvalue()


# Sampling


async def _sampling(asker: Asker, known: Mapping[str, Fact]) -> list[Fact]:
    """Whether each option changes texts as it must. Unknown fields are often ignored in silence."""
    greedy = await asker.ask()
    probes: dict[str, Callable[[Asker, Answer], Awaitable[tuple[State, str]]]] = {
        "temperature": _temperature,
        "seed": _seed,
        "top_k": _narrow("top_k", 1),
        "top_p": _narrow("top_p", 1e-6),
        "repetition_penalty": _penalty,
    }
    found, random_texts = [], State.UNKNOWN
    for name, run in probes.items():
        full = f"sampling.{name}"
        if full in known:
            found.append(known[full])
        elif name not in asker.kind.names:
            reason = asker.kind.refused.get(name, "the API of this kind of server has no field")
            found.append(Fact(full, State.NO, reason))
        elif greedy.text is None:
            found.append(Fact(full, State.UNKNOWN, greedy.failure))
        elif name in ("top_k", "top_p") and random_texts is not State.YES:
            found.append(Fact(full, State.UNKNOWN, "a high temperature does not change texts"))
        else:
            found.append(Fact(full, *await run(asker, greedy)))
        if name == "temperature":
            value = found[-1].value
            random_texts = value if isinstance(value, State) else State.UNKNOWN
    return found


async def _temperature(asker: Asker, greedy: Answer) -> tuple[State, str]:
    for attempt in range(TRIES):
        answer = await asker.ask(**_hot(asker, attempt))
        if answer.text is None:
            return State.UNKNOWN, answer.failure
        if answer.text != greedy.text:
            return State.YES, "a high temperature gives another text than greedy decoding"
    return State.UNKNOWN, f"the text of greedy decoding, {TRIES} times, at a high temperature"


async def _seed(asker: Asker, greedy: Answer) -> tuple[State, str]:
    """The same seed twice, and another one."""
    first = await asker.ask(**_hot(asker, 11))
    second = await asker.ask(**_hot(asker, 11))
    if first.text is None or second.text is None:
        return State.UNKNOWN, first.failure or second.failure
    if first.text != second.text:
        return State.NO, "the same seed gave two texts"
    for seed in range(12, 12 + TRIES):
        other = await asker.ask(**_hot(asker, seed))
        if other.text is not None and other.text != first.text:
            return State.YES, "the same seed gave the same text twice, another seed another text"
    return State.UNKNOWN, "every seed gave the same text"


def _narrow(name: str, value: float) -> Callable[[Asker, Answer], Awaitable[tuple[State, str]]]:
    """A value that leaves one token: at a high temperature the text is that of greedy decoding."""

    async def run(asker: Asker, greedy: Answer) -> tuple[State, str]:
        texts = []
        for attempt in range(2):
            answer = await asker.ask(**_hot(asker, 21 + attempt, **{name: value}))
            if answer.text is None:
                return State.UNKNOWN, answer.failure
            texts.append(answer.text)
        if texts == [greedy.text] * 2:
            return State.YES, f"{name} {value:g} gives the text of greedy decoding, twice"
        if greedy.text not in texts and texts[0] != texts[1]:
            return State.NO, f"{name} {value:g} leaves texts random"
        return State.UNKNOWN, f"{name} {value:g} gave the text of greedy decoding once"

    return run


async def _penalty(asker: Asker, greedy: Answer) -> tuple[State, str]:
    answer = await asker.ask(**asker.options(repetition_penalty=5.0))
    if answer.text is None:
        return State.UNKNOWN, answer.failure
    if answer.text != greedy.text:
        return State.YES, "a penalty of 5 changes the text of greedy decoding"
    return State.UNKNOWN, "a penalty of 5 does not change the text of greedy decoding"


def _hot(asker: Asker, seed: int, **others: Any) -> dict[str, Any]:
    """Options for random texts: a high temperature, and a seed where the server takes one."""
    seeds = {"seed": seed} if "seed" in asker.kind.names else {}
    return asker.options(temperature=1.8, **seeds, **others)
