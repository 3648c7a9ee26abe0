"""The `dflash` command: what it prints, where, and how it ends. The pair is a fake one whose every answer is known."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dflash_jax
from dflash_jax import cli
from dflash_jax.errors import InputError
from dflash_jax.text import Transcript
from tests.test_text import byte_tokenizer

ANSWER = "né 😀 done"
ROUNDS = [3, 4, 1, 3]  # after the first token, which prefill gives; a last round gives what is left


class FakePair:
    """Always answers ANSWER, in the rounds above; plain decoding differs where `plain` says so."""

    def __init__(self, plain: str = ANSWER) -> None:
        self.tokenizer = byte_tokenizer()
        self.answers = {True: ANSWER, False: plain}
        self.calls: list[tuple[str, object, dict]] = []

    def stream(self, pair, prompt, *, max_new_tokens, draft, stop=(), **options):
        self.calls.append(("stream", prompt, options | {"draft": draft, "stop": stop}))
        pair.tokenizer.encode(prompt)
        tokens = list(self.answers[draft].encode())[:max_new_tokens]
        lengths, at = [], 1
        transcript, kept, text = Transcript(pair.tokenizer, stop), [], ""
        for size in [0, *ROUNDS, 100] if draft else [0] + [1] * 100:
            start, end = (0, 1) if size == 0 else (at, min(at + size, len(tokens)))
            chunk = tokens[start:end]
            if not chunk or transcript.stopped:
                break
            at = end
            lengths += [len(chunk)] if size else []
            shown, used = transcript.push(chunk)
            last = at == len(tokens)
            shown += transcript.flush() if last else ""
            kept += chunk[:used]
            text += shown
            # The bonus token that ends a round is the target's own.
            drafted = [i < len(chunk) - 1 for i in range(used)]
            yield SimpleNamespace(text=shown, tokens=chunk[:used], drafted=drafted)
        reason = "stop" if transcript.stopped else "length"
        return SimpleNamespace(text=text, tokens=kept, acceptance_lengths=lengths, finish_reason=reason)

    def generate(self, pair, prompts, **options):
        self.calls.append(("generate", prompts, options))
        pieces = self.stream(pair, prompts[0], **options)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return [end.value]


@pytest.fixture
def pair(monkeypatch):
    fake = FakePair()
    fake.loads = []

    def load(target, drafter, check):
        fake.loads.append((target, drafter))
        return fake

    monkeypatch.setitem(dflash_jax.__dict__, "load", load)
    monkeypatch.setitem(dflash_jax.__dict__, "stream", fake.stream)
    monkeypatch.setitem(dflash_jax.__dict__, "generate", fake.generate)
    return fake


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_on_a_terminal(monkeypatch, arguments, name="stdout", **environment):
    """What the command writes to a terminal; set here and not in a fixture, since pytest puts its own files back."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    screen = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, screen)
        cli.main(arguments)
    return screen.getvalue()


def test_text_then_one_line_of_facts(pair, capsys):
    assert cli.main(["generate", "--prompt", "x", "--max-new-tokens", "12"]) == 0
    out = capsys.readouterr().out
    text, summary = out.split("\n")[:2]
    assert text == ANSWER.encode()[:12].decode()
    assert re.fullmatch(r"12 tokens, acceptance length 2\.75, [\d.]+ tokens/s", summary)
    assert "\x1b" not in out


def test_accepted_tokens_are_green(pair, monkeypatch):
    """Rounds of the bytes n | é+space | 😀 | space | don | e: the last token of each is the target's own."""
    shown = shown_on_a_terminal(monkeypatch, ["generate", "--prompt", "x"])
    green = re.findall("\x1b\\[32m(.*?)\x1b\\[0m", shown)
    assert "".join(green[:-1]) == "édo"
    assert green[-1] == "green"  # the legend
    assert re.sub("\x1b\\[\\d+m", "", shown).startswith(ANSWER + "\n")


def test_no_color_is_respected(pair, monkeypatch):
    shown = shown_on_a_terminal(monkeypatch, ["generate", "--prompt", "x"], NO_COLOR="1")
    assert shown.startswith(ANSWER)
    assert "\x1b" not in shown


def test_generated_control_characters_do_not_reach_the_terminal(pair, monkeypatch):
    pair.answers[True] = "a\x1b]0;title\x07b\n\tc"
    shown = shown_on_a_terminal(monkeypatch, ["generate", "--prompt", "x"], NO_COLOR="1")
    assert shown.startswith("a]0;titleb\n\tc")


def test_json_is_one_object_and_nothing_else(pair, capfd):
    assert cli.main(["generate", "--prompt", "x", "--json"]) == 0
    out, err = capfd.readouterr()
    facts = json.loads(out)
    assert facts["text"] == ANSWER
    assert facts["tokens"] == list(ANSWER.encode())
    assert facts["acceptance_lengths"] == [*ROUNDS, 1]
    assert facts["acceptance_length"] == pytest.approx(12 / 5)
    assert facts["tokens_per_second"] > 0
    assert "speedup" not in facts
    assert err == ""


@pytest.mark.parametrize(("plain", "identical"), [(ANSWER, True), ("other", False)])
def test_compare(pair, capsys, plain, identical):
    pair.answers[False] = plain
    assert cli.main(["generate", "--prompt", "x", "--compare", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["identical"] is identical
    assert facts["speedup"] == pytest.approx(facts["tokens_per_second"] / facts["plain_tokens_per_second"])
    kinds = [call[2]["draft"] for call in pair.calls if call[0] == "generate"]
    assert kinds[:2] == [True, False]  # the warm-up
    assert kinds[2:].count(True) == kinds[2:].count(False) > 0


@pytest.mark.parametrize(
    ("plain", "temperature", "selector", "words"),
    [
        (ANSWER, 0, True, "identical"),
        ("other", 0, True, "NOT identical"),
        ("other", 1, False, "NOT identical"),
        ("other", 1, True, "two samples of the same distribution"),
    ],
)
def test_compare_says_it_in_words(pair, capsys, plain, temperature, selector, words):
    """What is sampled is the same both ways, unless a selector draws the drafts."""
    pair.answers[False] = plain
    pair.drafter = SimpleNamespace(selector=object() if selector else None)
    cli.main(["generate", "--prompt", "x", "--compare", "--temperature", str(temperature)])
    last = capsys.readouterr().out.rstrip().split("\n")[-1]
    assert re.match(r"\d+\.\d\dx plain decoding \(.*\); outputs are ", last)
    assert last.endswith(f"outputs are {words}")


def test_options_reach_the_decoder(pair, capsys):
    values = ["--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--seed", "3", "--width", "4"]
    cli.main(
        ["generate", "--target", "T", "--drafter", "D", "--prompt", "null", *values, "--stop", "do", "--stop", "{}"]
    )
    _, prompt, options = pair.calls[0]
    assert pair.loads == [("T", "D")]
    assert prompt == "null"
    assert options == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 3,
        "width": 4,
        "stop": ("do", "{}"),
        "draft": True,
    }
    assert capsys.readouterr().out.startswith("né 😀 \n")


def test_no_draft(pair, capsys):
    cli.main(["generate", "--prompt", "x", "--no-draft"])
    assert pair.calls[0][2]["draft"] is False
    assert pair.loads == [(None, None)]  # the embedded pair
    assert "acceptance" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--prompt", "-"], []])
def test_prompt_from_standard_input(pair, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f():\n"))
    cli.main(["generate", *arguments])
    assert pair.calls[0][1] == "def f():\n"


def test_chat_prompt(pair, monkeypatch):
    pair.tokenizer.encode = lambda prompt: [1]
    cli.main(["generate", "--prompt", "hi", "--chat"])
    assert pair.calls[0][1] == [{"role": "user", "content": "hi"}]


def test_echo_shows_the_prompt_first(pair, capsys):
    cli.main(["generate", "--prompt", "2 + 2 = ", "--echo"])
    assert capsys.readouterr().out.startswith("2 + 2 = " + ANSWER)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "x", "--max-new-tokens", "ten"], "--max-new-tokens takes a whole number, not ten"),
        (["generate", "--prompt", "x", "--temperature", "hot"], "--temperature takes a number, not hot"),
        (["generate", "--prompt", "x", "--width", "wide"], "--width takes a whole number or adaptive, not wide"),
        (["generate", "--prompt", "x", "--bogus"], "--bogus"),
        (["generate", "--prompt", "x", "--compare", "--no-draft"], "leave one out"),
        (["guess"], "guess"),
        ([], "subcommand"),
    ],
)
def test_bad_input_is_one_line_and_status_2(pair, capsys, arguments, says):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, package, extra",
    [
        ("train drafter run.yaml", "grain", "train"),
        ("plan --recipe run.yaml --no-compile", "grain", "train"),
        ("serve", "fastapi", "serve"),
    ],
)
def test_what_to_install_for_a_command(monkeypatch, capsys, arguments, package, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("train", "serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(arguments.split()) == 2
    assert f"pip install 'dflash-jax[{extra}]'" in capsys.readouterr().err


def test_errors_of_the_library_are_red_on_a_terminal(pair, monkeypatch):
    def load(target, drafter, check):
        raise InputError("no such folder: T")

    monkeypatch.setitem(dflash_jax.__dict__, "load", load)
    shown = shown_on_a_terminal(monkeypatch, ["generate", "--prompt", "x", "--json"], "stderr")
    assert shown == "\x1b[31mdflash: no such folder: T\x1b[0m\n"


def test_no_prompt_on_a_terminal(pair, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert cli.main(["generate"]) == 2
    assert "give --prompt" in capsys.readouterr().err


def test_other_errors_are_not_hidden(pair, monkeypatch):
    def load(target, drafter, check):
        raise ValueError("a bug")

    monkeypatch.setitem(dflash_jax.__dict__, "load", load)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["generate", "--prompt", "x"])


def test_interrupt_ends_with_130(pair, monkeypatch, capsys):
    def stream(*args, **options):
        yield SimpleNamespace(text="a", tokens=[97], drafted=[False])
        raise KeyboardInterrupt

    monkeypatch.setitem(dflash_jax.__dict__, "stream", stream)
    assert cli.main(["generate", "--prompt", "x"]) == 130
    out, err = capsys.readouterr()
    assert out == "a"
    assert "interrupted" in err


def run(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )


def test_version_and_help():
    assert run("-m", "dflash_jax", "--version").stdout == f"dflash {dflash_jax.__version__}\n"
    text = run("-m", "dflash_jax", "generate", "--help").stdout
    assert "--max-new-tokens N" in text
    assert "(default 200)" in text


def test_help_does_not_wait_for_jax():
    code = """
import sys
from dflash_jax import cli
try:
    cli.main(["generate", "--help"])
except SystemExit:
    print([name for name in ("jax", "flax", "transformers") if name in sys.modules])
"""
    assert run("-c", code).stdout.rstrip().endswith("[]")
