"""Prompts in the manner of those that a drafter is judged by, HumanEval and GSM8K, and with none of them.

Coding: functions of the Python standard library and made-up ones by their head and docstring, to be completed or
explained. Mathematics: word problems with random names and numbers. Half are chat messages, half plain text.
"""

import ast
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from train.corpus import Document, split
from train.data import generator
from train.smollm2.functions import make_function

LONGEST = 900  # characters of a docstring

CODING = (
    "Complete the following Python function:\n\n```python\n{head}\n```",
    "Write the body of this Python function.\n\n{head}",
    "Write a Python function `{name}` that does the following: {first}",
    "Implement `{name}` in Python. {first}",
    "Here is a Python function:\n\n{source}\n\nExplain what it does.",
    "Write three tests for this Python function:\n\n{source}",
)
REQUESTS = (
    "{head}",
    "{head}",
    "Complete the following Python function:\n\n```python\n{head}\n```",
    "Write a solution to the following problem:\n```python\n{head}\n```",
)
NAMES = (
    "Amina", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kofi", "Lena", "Mateo",
    "Nadia", "Oscar", "Priya", "Quinn", "Rosa", "Samir", "Tess", "Uma", "Victor", "Wendy", "Yusuf", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "candles", "coins", "cookies", "eggs", "flowers", "marbles", "oranges", "pencils", "photos",
    "seeds", "shells", "stamps", "stickers", "tickets", "toys", "cupcakes", "bottles", "cards",
)  # fmt: skip
PROBLEMS = (
    "{a} has {x} {t}. {b} gives {a} {y} more, and then {a} loses {z} of them. How many {t} does {a} have now?",
    "{a} buys {x} {t} for ${y} each and pays with a ${k} note. How much change does {a} get?",
    "A box holds {x} {t}. {a} has {y} full boxes and {z} loose {t}. How many {t} does {a} have altogether?",
    "{a} reads {x} pages a day for {y} days, and {b} reads {z} pages a day for twice as many days. Who "
    "reads more pages, and by how many?",
    "{a} earns ${x} an hour and works {y} hours a day, 5 days a week. How much does {a} earn in {z} weeks?",
    "There are {k} {t} in a shop. On Monday a quarter of them are sold, and on Tuesday {x} more. How many are left?",
    "{a} is {x} years older than {b}. In {y} years {b} will be {k}. How old is {a} today?",
    "A train travels {x} miles in the first hour and {y} miles more than that in the second. How far has "
    "it travelled after both?",
    "{a} wants to save ${k}. {a} saves ${x} every week and has ${y} already. After how many weeks has {a} enough?",
    "{a} bakes {x} trays of {y} cupcakes. {b} eats {z}, and the rest is sold for ${w} each. How much "
    "money do they get?",
    "A field is {x} metres wide and {y} metres long. What does a fence around it cost at ${w} a metre?",
    "{a} has twice as many {t} as {b}, and {b} has {x} more than {c}. If {c} has {y}, how many have they in total?",
    "A jug holds {x} litres. {a} pours out {w} litres every minute and {b} pours in 1. How much is in "
    "the jug after {w} minutes?",
    "{a} drives {x} miles to work and back, {y} days a month. The car needs a gallon every 25 miles. How "
    "many gallons does {a} need a month?",
    "Of {k} students, {p}% play football and half of the others play tennis. How many play tennis?",
    "A shirt costs ${k}. It is sold at {p}% off. What does {a} pay for {w} shirts?",
)  # fmt: skip
MORE_PROBLEMS = (
    "{a} sold {x} {t} in April, and half as many in May as in April. How many {t} did {a} sell in the two months?",
    "{b} made ${y} less than {a}, and {c} made twice as much as {b}. If {a} made ${k}, what did the three make "
    "together?",
    "A recipe needs {w} cups of flour for every {y} cookies. {a} wants to bake {k} cookies. How many cups does "
    "{a} need?",
    "{a} runs {w} sprints of {k} metres {y} times a week. How many metres does {a} run in {z} weeks?",
    "In a class of {k} children, {x} have a dog and {p}% of the others have a cat. How many have neither?",
    "{a} fills {x} bags with {y} {t} each. {b} takes {w} bags. How many {t} are left in the bags of {a}?",
    "Tickets cost ${x} for adults and ${w} for children. {a} buys {y} tickets for children and 2 for adults, and pays "
    "with a ${k} note. How much does {a} get back?",
    "{a} types {k} words in {w} minutes. How long will {a} need for a text of {x} pages with {k} words each?",
    "A tank with {k} litres loses {w} litres an hour. After {y} hours {a} adds {x} litres. What is in the tank then?",
    "{a} had ${k}. {a} spent a quarter of it on {t} and ${x} on lunch. How much money does {a} have left?",
    "{a}, {b} and {c} share {k} {t}. {a} takes {p}% of them, and the others share what is left equally. How "
    "many {t} does "
    "{c} get?",
    "The rent of {a} was ${k} a month and rises by {p}%. How much more does {a} pay in a year?",
    "{a} can paint a room in {w} hours, and has {y} rooms to paint. {a} works {x} hours a week. How many weeks "
    "does it take?",
    "A farmer has {x} cows and {y} times as many chickens. How many legs do the animals have altogether?",
    "{a} is half as old as {b}. {c} is {y} years younger than {b}, who is {k}. How old are the three together?",
    "Every day {a} eats {w} eggs and sells the rest for ${x} a dozen. The hens lay {k} eggs a day. What does "
    "{a} make in a "
    "week?",
)  # fmt: skip
ASKED = ("{}", "{}", "{} Show your work step by step.", "Question: {}\nAnswer:", "Solve this problem: {}")


def make_prompts(library: int, maths: int, functions: int, more_maths: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of a prompts file: functions of the library and mathematics, then made-up functions and mathematics."""
    rng = generator(seed, 7)
    known = [f for document in split()[0] for f in _functions(document)]
    made = [_coding(rng, *known[i]) for i in rng.permutation(len(known))[:library]]
    made += [_mathematics(rng, PROBLEMS) for _ in range(maths)]
    first = [made[i] for i in rng.permutation(len(made))]
    rng = generator(seed, 8)
    made = [_made_up(rng) for _ in range(functions)]
    made += [_mathematics(rng, PROBLEMS + MORE_PROBLEMS) for _ in range(more_maths)]
    return first + [made[i] for i in rng.permutation(len(made))]


def _functions(document: Document) -> Iterator[tuple[str, str, str, str]]:
    """(name, head with docstring, first sentence of the docstring, source) of functions that have a docstring."""
    lines = document.text.splitlines()
    for node in ast.parse(document.text).body:
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        text = ast.get_docstring(node)
        if not text or len(text) > LONGEST:
            continue
        head = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno])
        source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        yield node.name, head, " ".join(text.split("\n\n")[0].split()), source[:LONGEST]


def _coding(rng: np.random.Generator, name: str, head: str, first: str, source: str) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"prompt": head + "\n"}
    return _message(_one(rng, CODING).format(name=name, head=head, first=first, source=source))


def _made_up(rng: np.random.Generator) -> dict[str, Any]:
    head = make_function(rng)
    if rng.random() < 0.5:
        return {"prompt": head}
    return _message(_one(rng, REQUESTS).format(head=head.strip()))


def _mathematics(rng: np.random.Generator, problems: Sequence[str]) -> dict[str, Any]:
    a, b, c = rng.choice(NAMES, 3, replace=False)
    x, y, z = (int(n) for n in rng.integers(2, 60, 3))
    numbers = {"k": int(rng.integers(4, 60)) * 20, "w": int(rng.integers(2, 9)), "p": int(rng.integers(1, 19)) * 5}
    text = _one(rng, problems).format(a=a, b=b, c=c, x=x, y=y, z=z, t=_one(rng, THINGS), **numbers)
    text = _one(rng, ASKED).format(text)
    return {"prompt": text} if rng.random() < 0.5 else _message(text)


def _message(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
