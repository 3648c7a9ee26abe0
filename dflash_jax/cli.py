"""The `dflash` command.

What is slow to import (jax, the models) is imported by the command that needs it, so that `--help` is instant.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jsonargparse import ArgumentParser

from dflash_jax.decoding.width import Width
from dflash_jax.errors import InputError
from dflash_jax.options import option, parser_for, read_options
from dflash_jax.version import __version__

GREEN, DIM, RED, RESET = "\x1b[32m", "\x1b[2m", "\x1b[31m", "\x1b[0m"
# Generated text must not move the cursor or retitle the window.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Complete a prompt. Tokens that the drafter got right are shown in green; the output is the target's own."""

    target: str | None = option(None, "checkpoint folder or hub name; the embedded pair if left out", metavar="DIR")
    drafter: str | None = option(None, "DFlash drafter made for the target", metavar="DIR")
    prompt: str | None = option(None, "text to complete; `-` or nothing reads standard input", metavar="TEXT")
    chat: bool = option(False, "take the prompt as a user's message and apply the target's chat template")
    max_new_tokens: int = option(200, "most tokens to generate", metavar="N")
    temperature: float = option(0.0, "0 is greedy", metavar="T")
    top_k: int = option(0, "sample from the k likeliest tokens; 0 is off", metavar="K")
    top_p: float = option(1.0, "sample from the likeliest tokens that hold this probability; 1 is off", metavar="P")
    min_p: float = option(0.0, "leave out tokens below this share of the likeliest; 0 is off", metavar="P")
    seed: int = option(0, "the same seed gives the same text", metavar="N")
    stop: tuple[str, ...] = option((), "end before this text; may be given several times", metavar="TEXT")
    width: Width | None = option(
        None, "rows a round, the anchor included; adaptive: what pays; the drafter's block if left out", metavar="W"
    )
    draft: bool = option(True, "decode plainly, without the drafter")
    compare: bool = option(False, "also decode plainly, and print the speed ratio and whether the outputs are the same")
    echo: bool = option(False, "show the prompt before the completion")
    json: bool = option(False, "print one JSON object and nothing else")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compile a program for accelerators that are not here: what it needs, what it moves, how fast it can be."""

    target: str | None = option(None, "the target's config.json, or a folder with one", metavar="PATH")
    drafter: str | None = option(None, "the drafter's config.json, or a folder with one", metavar="PATH")
    topology: str | None = option(
        None, "chip and shape: v5e:2x2, v5p:4x4x4, v6e:8x8, tpu7x:2x2x2 (if left out), h100:8"
    )
    recipe: str | None = option(None, "plan a step of this training run, on the pod that it names", metavar="FILE")
    mesh: str = option("", "sizes of data, fsdp, expert, tensor, as in expert=4,tensor=4; all on tensor if left out")
    program: str = option("round", "round, plain (one token at a time), prefill, or train (a step of the trainer)")
    batch: int = option(1, "sequences", metavar="N")
    context: int = option(32768, "tokens of context", metavar="N")
    width: int | None = option(None, "rows a round, the anchor included; the drafter's block if left out", metavar="W")
    acceptance_length: float = option(4.0, "tokens a round gives, for the speed-up", metavar="N")
    compile: bool = option(True, "only compute: no temporaries, no collectives")
    json: bool = option(False, "print one JSON object and nothing else")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Serve a pair over HTTP, as OpenAI's API does, until SIGTERM or SIGINT. A page to try it is at /."""

    target: str | None = option(None, "checkpoint folder or hub name; the embedded pair if left out", metavar="DIR")
    drafter: str | None = option(None, "DFlash drafter made for the target", metavar="DIR")
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 is all", metavar="ADDRESS")
    port: int = option(8000, "port to listen at; 0 takes any that is free", metavar="N")
    model_name: str | None = option(None, "what requests call the model; the target folder's name", metavar="NAME")
    api_key: str | None = option(None, "asked for under /v1/; $DFLASH_API_KEY if left out", metavar="KEY")
    max_body_bytes: int = option(8 * 2**20, "longest body of a request", metavar="N")
    slots: int = option(16, "requests that run at once", metavar="N")
    max_length: int | None = option(None, "tokens of a request, prompt and output; the model's positions", metavar="N")
    max_requests: int = option(4096, "requests that wait or run; more are told to come again", metavar="N")
    memory_mib: int | None = option(
        None,
        "memory of each device for weights, caches and state; what the slots need and an accelerator has",
        metavar="N",
    )
    mesh: str = option("", "devices to spread the pair over, as in expert=4,tensor=2; one device if left out")
    draft: bool = option(True, "decode plainly, without the drafter")
    logprobs: int = option(
        20, "most likely tokens that a request may ask to be named; 0: none, a faster start", metavar="N"
    )
    grammar: bool = option(True, "no structured output: a faster start")
    reasoning: bool = option(True, "leave what a model thinks, <think>...</think>, in the content of chats")
    shutdown_seconds: int = option(10, "how long running requests may go on at the end", metavar="N")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 2 for input that cannot work, 130 when interrupted."""
    try:
        values = _parser().parse_args(_flags_first(argv))
        if values.subcommand == "train":
            return _train(values.train)
        if values.subcommand == "bench":
            return _bench(values.bench)
        if values.subcommand == "plan":
            return _plan(read_options(PlanOptions, values.plan))
        if values.subcommand == "serve":
            return _serve(read_options(ServeOptions, values.serve))
        return _generate(read_options(GenerateOptions, values.generate))
    except InputError as error:
        _report(str(error))
        return 2
    except argparse.ArgumentError as error:
        _report(f"{_readable(str(error))}; see dflash {_command(argv)} --help")
        return 2
    except KeyboardInterrupt:
        _report("interrupted")
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="dflash",
        description="Lossless block-diffusion speculative decoding.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("generate", parser_for(GenerateOptions, "dflash generate"), help="complete a prompt")
    commands.add_subcommand("serve", parser_for(ServeOptions, "dflash serve"), help="answer requests over HTTP")
    commands.add_subcommand("plan", parser_for(PlanOptions, "dflash plan"), help="compile for accelerators by name")
    commands.add_subcommand("bench", _bench_parser(), help="measure an engine under load")
    commands.add_subcommand("train", _train_parser(), help="train a drafter from a configuration file")
    return parser


def _flags_first(argv: Sequence[str] | None) -> list[str]:
    """`train` takes any number of key=value, and flags before and behind them; argparse wants the flags first."""
    given = list(sys.argv[1:] if argv is None else argv)
    return given[:1] + sorted(given[1:], key=lambda word: word[:1] != "-") if given[:1] == ["train"] else given


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="dflash train",
        description="Train a drafter for a target, or only let the target write the responses that it learns from.",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("what", choices=("drafter", "responses"), help="drafter, or responses: its first part alone")
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run, as described in docs/training.md")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes to it, as training.loop.steps=100")
    parser.add_argument("--check", action="store_true", help="read, print and check the whole configuration, and stop")
    return parser


def _bench_parser() -> ArgumentParser:
    from serve.bench.options import BenchOptions

    parser = parser_for(BenchOptions, "dflash bench")
    parser.add_argument("what", choices=("serve",), help="serve: the engine that serves requests")
    return parser


def _command(argv: Sequence[str] | None) -> str:
    given = sys.argv[1:] if argv is None else argv
    return given[0] if given and given[0] in ("generate", "serve", "plan", "train", "bench") else "generate"


def _readable(message: str) -> str:
    """The parser's complaint about a value, in the words of the command line."""
    name = re.match(r'Parser key "(\w+)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    kinds = re.findall(r"Expected an? (?:<class '(int|float)'>|typing.Literal\['(\w+)'\])", message)
    if name is None or value is None or not kinds:
        return message
    words = {"int": "a whole number", "float": "a number"}
    accepted = " or ".join(words.get(kind or word, word) for kind, word in kinds)
    return f"--{name[1].replace('_', '-')} takes {accepted}, not {value[1]}"


def _report(message: str) -> None:
    message = " ".join(message.split())
    print(_paint(f"dflash: {message}", RED, sys.stderr), file=sys.stderr)


def _paint(text: str, style: str, file: IO[str]) -> str:
    return f"{style}{text}{RESET}" if text and _has_colour(file) else text


def _has_colour(file: IO[str]) -> bool:
    return file.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise InputError("there is no prompt; give --prompt TEXT, or pipe a text in")
    return sys.stdin.read() if prompt in (None, "-") else prompt


def _generate(options: GenerateOptions) -> int:
    if options.compare and not options.draft:
        raise InputError("--compare and --no-draft were both given; --compare needs the drafter, so leave one out")
    text = _read_prompt(options.prompt)
    prompt = [{"role": "user", "content": text}] if options.chat else text
    settings = _settings(options)

    import dflash_jax  # seconds

    def load() -> Any:
        def check(pair: Any) -> None:
            dflash_jax.stream(pair, prompt, **settings, draft=options.draft)  # refuses, but does not begin

        return dflash_jax.load(options.target, options.drafter, check=check)

    if options.json:
        pair = load()
        facts = _facts(*_stream(pair, prompt, settings | {"draft": options.draft}))
        print(json.dumps(facts | (_compare(pair, prompt, settings) if options.compare else {})))
        return 0
    with Screen(sys.stdout) as screen:
        screen.wait("loading; a first run also compiles")
        pair = load()
        if options.echo:
            screen.write(text, DIM)
        facts = _facts(*_stream(pair, prompt, settings | {"draft": options.draft}, screen))
        screen.summary(facts, options.draft)
        if options.compare:
            screen.wait("timing plain and speculative decoding")
            samples = options.temperature > 0 and pair.drafter.selector is not None
            screen.comparison(_compare(pair, prompt, settings), samples)
    return 0


@contextmanager
def _extra(name: str, what: str) -> Iterator[None]:
    """InputError where an extra is not installed; some of its packages are imported late."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{what} needs the package {error.name}; pip install 'dflash-jax[{name}]'") from error


def _train(values: Any) -> int:
    if values.check:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    with _extra("train", "training"):
        from train.command import train

        return train(values.what, values.config, values.changes, check=values.check)


def _serve(options: ServeOptions) -> int:
    with _extra("serve", "serving"):
        from serve.command import serve
    return serve(options)


def _bench(values: Any) -> int:
    from serve.bench.command import bench
    from serve.bench.options import BenchOptions

    return bench(read_options(BenchOptions, values))


def _plan(options: PlanOptions) -> int:
    from dflash_jax.topology import parse_topology, prepare, require_compiler

    if options.target is None and options.recipe is None:
        raise InputError("there is no target; give --target, a config.json or a folder with one")
    prepare()  # before jax is imported
    from dflash_jax.plan import plan

    request, trained = _request(options)
    if options.compile:
        require_compiler(parse_topology(request.topology).chip)
    with Screen(sys.stdout) as screen:
        screen.wait("compiling, which takes minutes for a large model")
        result = plan(request, trained)
    if options.json:
        print(json.dumps(result))
        return 0
    from rich.console import Console

    from dflash_jax.plan_report import show

    show(result, Console())
    return 0


def _request(options: PlanOptions) -> tuple[Any, Any]:
    """What `dflash_jax.plan.plan` takes: the request, and what makes the program of a training step."""
    if options.recipe is not None:
        with _extra("train", "planning a training run"):
            from train.plan_recipe import planned_recipe
        return planned_recipe(
            Path(options.recipe), target=options.target, topology=options.topology, compile=options.compile
        )
    from dflash_jax.plan import Request

    given: dict[str, Any] = dataclasses.asdict(options)
    del given["json"], given["recipe"]
    trained = None
    if options.program == "train":
        from train.plan import planned as trained
    return Request(**given | {"topology": options.topology or "tpu7x:2x2x2"}), trained


def _settings(options: GenerateOptions) -> dict[str, Any]:
    """What `dflash_jax.generate` and `stream` take, draft apart."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "width")
    return {name: getattr(options, name) for name in names}


def _stream(pair: Any, prompt: Any, settings: dict[str, Any], screen: "Screen | None" = None) -> tuple[Any, float]:
    """Show the text as it comes: (the Generation, tokens per second).

    The rate counts from the second piece where there are more: the first waits for the prefill and the second for the
    first round, and both may have to be compiled.
    """
    import dflash_jax
    from dflash_jax.spans import Spans

    pieces = dflash_jax.stream(pair, prompt, **settings)
    spans = Spans(pair.tokenizer)
    clock = [(time.perf_counter(), 0)]  # (moment, tokens so far)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            generation = end.value
            break
        clock.append((time.perf_counter(), clock[-1][1] + len(piece.tokens)))
        if screen:
            for text, drafted in spans.split(piece):
                screen.write(text, GREEN if drafted else "")
    (start, before), (end, after) = clock[max(0, min(2, len(clock) - 2))], clock[-1]
    return generation, (after - before) / (end - start) if end > start else 0.0


def _facts(generation: Any, rate: float) -> dict[str, Any]:
    from dflash_jax.compare import acceptance_length

    return {
        "text": generation.text,
        "tokens": list(generation.tokens),
        "acceptance_length": acceptance_length(generation.acceptance_lengths),
        "acceptance_lengths": list(generation.acceptance_lengths),
        "tokens_per_second": rate,
        "finish_reason": generation.finish_reason,
    }


def _compare(pair: Any, prompt: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from dflash_jax.compare import compare

    result = compare(pair, prompt, **settings)
    return {
        "tokens_per_second": result.tokens_per_second,
        "plain_tokens_per_second": result.plain_tokens_per_second,
        "speedup": result.speedup,
        "identical": result.identical,
    }


class Screen:
    """What a person sees. Used in a `with` block, which takes the waiting sign away however it ends."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self._waiting: Any = None

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_waiting()

    def wait(self, message: str) -> None:
        """Show that something takes a while, until the next thing is shown."""
        if sys.stderr.isatty():
            from rich.console import Console

            self._waiting = Console(stderr=True).status(message)
            self._waiting.start()

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting.stop()
            self._waiting = None

    def write(self, text: str, style: str) -> None:
        """Show a part of the text at once."""
        self._stop_waiting()
        if self.file.isatty():
            text = text.translate(CONTROL)
        print(_paint(text, style, self.file) if style else text, end="", file=self.file, flush=True)

    def summary(self, facts: dict[str, Any], draft: bool) -> None:
        """One line on the generation, after a line that explains the colours."""
        self._stop_waiting()
        print(file=self.file)
        if draft and _has_colour(self.file):
            print(f"\n{GREEN}green{RESET}: drafted and accepted; plain: the target's own", file=self.file)
        parts = [f"{len(facts['tokens'])} tokens", f"{facts['tokens_per_second']:.1f} tokens/s"]
        if draft:
            parts.insert(1, f"acceptance length {facts['acceptance_length']:.2f}")
        print(", ".join(parts), file=self.file, flush=True)

    def comparison(self, facts: dict[str, Any], samples: bool) -> None:
        """One line on speculative against plain decoding, both warmed up.

        `samples`: both draw from the target's distribution, each with numbers of its own, so that they may differ.
        """
        self._stop_waiting()
        differ = "two samples of the same distribution" if samples else "NOT identical"
        print(
            f"{facts['speedup']:.2f}x plain decoding ({facts['tokens_per_second']:.1f} against "
            f"{facts['plain_tokens_per_second']:.1f} tokens/s, both warm); "
            f"outputs are {'identical' if facts['identical'] else differ}",
            file=self.file,
        )


if __name__ == "__main__":
    sys.exit(main())
