"""Small Python functions to be written, described by a docstring with examples that are true: made up from parts."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Part:
    """One step of a function: for its name, for its description, and what it does."""

    name: str
    text: str
    apply: Callable[[Any], Any]


KEEP = (
    Part("", "", lambda x: True),
    Part("even", "even", lambda x: x % 2 == 0),
    Part("odd", "odd", lambda x: x % 2 == 1),
    Part("positive", "positive", lambda x: x > 0),
    Part("negative", "negative", lambda x: x < 0),
    Part("small", "single-digit", lambda x: abs(x) < 10),
    Part("multiple_of_three", "divisible by three", lambda x: x % 3 == 0),
    Part("large", "greater than ten", lambda x: x > 10),
)
CHANGE = (
    Part("", "", lambda x: x),
    Part("squared", "squared", lambda x: x * x),
    Part("doubled", "doubled", lambda x: 2 * x),
    Part("negated", "with the opposite sign", lambda x: -x),
    Part("incremented", "increased by one", lambda x: x + 1),
    Part("absolute", "without their sign", abs),
    Part("last_digits", "reduced to their last digit", lambda x: abs(x) % 10),
)
FINISH = (
    Part("sum", "Return the sum of {}.", sum),
    Part("count", "How many different values are there among {}?", lambda x: len(set(x))),
    Part("largest", "Find the largest of {}. If there are none, return 0.", lambda x: max(x, default=0)),
    Part("smallest", "Find the smallest of {}, or 0 if the list has none.", lambda x: min(x, default=0)),
    Part("sorted", "Return a list of {} in ascending order.", sorted),
    Part("reverse_sorted", "You are given a list of integers. Return {}, from large to small.",
         lambda x: sorted(x)[::-1]),
    Part("first_of_each", "From the given list, collect {}. Leave out duplicates and keep the order.",
         lambda x: list(dict.fromkeys(x))),
    Part("every_second", "Take every second one of {}, starting with the first.", lambda x: x[::2]),
    Part("differences", "Compute the differences between neighbours among {}.",
         lambda x: [b - a for a, b in pairwise(x)]),
    Part("running_total", "Return the running total of {} as a list.", lambda x: np.cumsum(x, dtype=int).tolist()),
    Part("any_repeated", "Check whether any value appears more than once among {}.", lambda x: len(set(x)) < len(x)),
    Part("is_increasing", "Return True if each of {} is larger than the one before it, and False otherwise.",
         lambda x: all(a < b for a, b in pairwise(x))),
)  # fmt: skip
WORDS = (
    Part("reverse_words", "Reverse each word of the {} and keep the words in their order.",
         lambda s: " ".join(w[::-1] for w in s.split())),
    Part("longest_word", "Find the longest word of the {}. If several are as long, return the first.",
         lambda s: max(s.split(), key=len)),
    Part("capitalize_words", "Write the first letter of each word of the {} as a capital.", str.title),
    Part("word_lengths", "Return a list with the length of each word of the {}.",
         lambda s: [len(w) for w in s.split()]),
    Part("first_letters", "Join the first letters of all words of the {}.", lambda s: "".join(w[0] for w in s.split())),
    Part("count_letter_e", "How many times does the letter e appear in the {}?", lambda s: s.count("e")),
    Part("unique_letters", "Return the different letters of the {} in alphabetical order.",
         lambda s: sorted(set(s.replace(" ", "")))),
    Part("double_letters", "Repeat every character of the {} twice.", lambda s: "".join(2 * c for c in s)),
    Part("words_with_a", "Return all words of the {} that contain the letter a.",
         lambda s: [w for w in s.split() if "a" in w]),
)  # fmt: skip
STRINGS = (
    "hello world", "level", "the quick brown fox", "python is fun", "banana", "a man a plan", "open the window",
    "seven green apples", "noon", "data structures", "rain in spain", "abc", "never odd or even", "small steps",
    "testing one two three", "racecar", "early bird", "programming",
)  # fmt: skip
NUMBERS, TEXTS = ("numbers", "values", "lst", "nums", "arr", "items"), ("text", "s", "string", "sentence", "phrase")


def make_function(rng: np.random.Generator) -> str:
    """The head of a function and its docstring."""
    return _on_text(rng) if rng.random() < 0.3 else _on_numbers(rng)


def _on_numbers(rng: np.random.Generator) -> str:
    keep, change, finish = (parts[int(rng.integers(len(parts)))] for parts in (KEEP, CHANGE, FINISH))
    name = "_".join(filter(None, (finish.name, keep.name, change.name)))
    after = " " in keep.text  # "numbers divisible by three", but "even numbers"
    text = f"the numbers {keep.text}" if after else f"the {keep.text} numbers" if keep.text else "all numbers"
    text = re.sub(",(?=[,.?])", "", finish.text.format(f"{text}, {change.text}," if change.text else text))
    argument = NUMBERS[int(rng.integers(len(NUMBERS)))]
    examples = [rng.integers(-9, 25, int(n)).tolist() for n in rng.integers(2, 7, 2)]

    def run(values: list[int]) -> Any:
        return finish.apply([change.apply(x) for x in values if keep.apply(x)])

    return _written(rng, name, f"{argument}: List[int]", text, [(x, run(x)) for x in examples])


def _on_text(rng: np.random.Generator) -> str:
    part = WORDS[int(rng.integers(len(WORDS)))]
    argument = TEXTS[int(rng.integers(len(TEXTS)))]
    text = part.text.format(("string", "text", "sentence")[int(rng.integers(3))])
    examples = [str(s) for s in rng.choice(STRINGS, 2, replace=False)]
    return _written(rng, part.name, f"{argument}: str", text, [(x, part.apply(x)) for x in examples])


def _written(rng: np.random.Generator, name: str, argument: str, text: str, examples: list[tuple[Any, Any]]) -> str:
    result = examples[0][1]
    kind = f"List[{type((result or [0])[0]).__name__}]" if isinstance(result, list) else type(result).__name__
    first = "from typing import List\n\n\n" if "List" in argument + kind else ""
    lines = [f"{first}def {name}({argument}) -> {kind}:", f'    """ {text}']
    shape = rng.random()
    if shape < 0.6:
        for x, y in examples:
            lines += [f"    >>> {name}({x!r})", f"    {y!r}"]
    elif shape < 0.85:
        lines += ["", "    Examples:", *(f"    {name}({x!r}) == {y!r}" for x, y in examples)]
    else:
        lines += [f"    For {argument.split(':')[0]} = {x!r}, the output should be {y!r}." for x, y in examples]
    return "\n".join([*lines, '    """']) + "\n"
