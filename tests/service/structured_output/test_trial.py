"""The trial of a grammar over single bytes: what it refuses, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache

import pytest

from service.errors import GrammarError
from service.structured_output import trial as trial_module
from service.structured_output.trial import Trial
from service.types import Grammar, GrammarKind

COSTLY = [
    'root ::= (("a"{0,100}){0,100}){0,100}',
    'root ::= ("a" | root){0,100}',
    'root ::= ((("a"{1,100}){1,100}){1,100}){90,100}',
    'root ::= root "+" root | "1"',
    'root ::= e\ne ::= e e | "a" | "b"',
    'root ::= ([a-z]* [a-z]*)* "!"',
    'root ::= (a a a)* "!"\na ::= [a-z]*',
    'root ::= [b-z]* | ("a" | root){0,100}',
    'root ::= a{0,1000}\na ::= [a-z]{0,1000} ("x" | "y")?',
]
CHEAP = [
    'root ::= root "," [a-z]+ | [a-z]+',
    'root ::= [a-z]+ ("," root)?',
    "root ::= " + '"a"? ' * 60 + "[a-z]*",
    'root ::= item (", " item){0,3}\nitem ::= [a-f]{1,4} ":" number\nnumber ::= [1-9] [0-9]?',
    "root ::= [0-9]{1,4000}",
    'root ::= "i" root ("e" root)? | "x"',
    'root ::= t (("+" | "-") t)*\nt ::= f (("*" | "/") f)*\nf ::= [0-9]+ | "(" root ")"',
    'root ::= "{" (pair (", " pair)*)? "}" | "[" (root (", " root)*)? "]" | word\n'
    'pair ::= word ": " root\nword ::= "\\"" [^"]* "\\""',
    'root ::= "日本語" | [é-ñ]{3}',
]


@cache
def trial() -> Trial:
    return Trial(light=False)  # torch is in this process anyway


def grammar(ebnf: str, kind: GrammarKind = GrammarKind.EBNF) -> Grammar:
    return Grammar(kind, "", ebnf)


@pytest.mark.slow
@pytest.mark.parametrize("ebnf", COSTLY)
def test_a_grammar_that_gets_slower_is_refused_quickly(ebnf: str) -> None:
    begun = time.process_time()
    with pytest.raises(GrammarError, match="too many ways") as caught:
        trial().run(grammar(ebnf))
    assert caught.value.reason == "GRAMMAR_TOO_COSTLY"
    assert caught.value.violations[0].field == "grammar.ebnf"
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("ebnf", CHEAP)
def test_ordinary_grammars_pass(ebnf: str) -> None:
    trial().run(grammar(ebnf))


@pytest.mark.parametrize(
    ("kind", "ebnf", "reason", "what"),
    [
        (GrammarKind.EBNF, "root ::= (", "GRAMMAR_INVALID", "ebnf cannot be compiled: EBNF parser"),
        (GrammarKind.EBNF, "rule ::= no root", "GRAMMAR_INVALID", "cannot be compiled: "),
        (GrammarKind.EBNF, "root ::= root", "GRAMMAR_INVALID", "it matches no text"),
        (GrammarKind.EBNF, 'root ::= ""', "GRAMMAR_INVALID", "it matches no text"),
        (GrammarKind.JSON_SCHEMA, "root ::= [\\x01-\\x1f]", "SCHEMA_UNSUPPORTED", "it matches no text"),
        (GrammarKind.REGEX, "root ::= (", "GRAMMAR_INVALID", "regex cannot be compiled: "),
    ],
)  # fmt: skip
def test_unusable_grammars_are_refused(
    kind: GrammarKind, ebnf: str, reason: str, what: str
) -> None:
    with pytest.raises(GrammarError, match=what) as caught:
        trial().run(grammar(ebnf, kind))
    assert caught.value.reason == reason
    assert caught.value.violations[0].field == f"grammar.{kind.value}"
    assert not any(part in caught.value.message for part in (".cc", ".h:", "/"))


def test_the_memory_of_a_compiled_grammar_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    many = grammar("root ::= " + " | ".join(f'"{i:032}"' for i in range(200)), GrammarKind.CHOICE)
    trial().run(many)
    monkeypatch.setattr(trial_module, "MAX_BYTES", 10_000)
    with pytest.raises(
        GrammarError, match="bytes of memory when compiled, at most 10000"
    ) as caught:
        trial().run(many)
    assert caught.value.reason == "GRAMMAR_TOO_COSTLY"
    assert int(caught.value.metadata["actual"]) > 10_000


LIGHT = """
import sys
import psutil
from service.structured_output.trial import Trial
from service.types import Grammar, GrammarKind
Trial(light=True).run(Grammar(GrammarKind.EBNF, "", 'root ::= [a-z]+ ("," root)?'))
names = ("torch", "transformers", "cuda", "tokenizers", "sentencepiece", "tiktoken")
assert all(getattr(sys.modules.get(name), "__file__", None) is None for name in names)
print(psutil.Process().memory_info().rss >> 20)
"""


def test_a_worker_needs_neither_torch_nor_transformers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < 120, "MiB"
