"""What `dflash bench serve` takes. Quick to import: the command line shows it."""

from dataclasses import dataclass

from dflash_jax.options import option


@dataclass(frozen=True)
class Measured:
    """What is measured, and on which prompts."""

    target: str | None = option(None, "checkpoint folder or hub name; the embedded pair if left out", metavar="DIR")
    drafter: str | None = option(None, "DFlash drafter made for the target", metavar="DIR")
    prompts: str | None = option(
        None, "humaneval, mtbench or gsm8k, of packages, or a JSONL file; the embedded pair's held-out prompts if left "
        "out", metavar="NAME",
    )  # fmt: skip
    chat: bool = option(False, "give prompts as users' messages, through the target's chat template")
    random_drafter: bool = option(False, "noise in place of the drafter: what speculation costs where it is of no use")


@dataclass(frozen=True)
class BenchOptions(Measured):
    """Put load on an engine and measure it, decoding plainly and speculatively in turns in one process."""

    concurrency: str = option("1,4,16", "closed loop: so many streams at once, each with its next request at its end")
    rates: str = option("", "open loop: so many requests a second, arriving at random, as in 2,8", metavar="R,R")
    ways: str = option("plain,adaptive", "ways of decoding: plain, adaptive, or a compiled width", metavar="WAY,WAY")
    requests: int = option(8, "requests of a run: for each stream, or in all in an open loop", metavar="N")
    runs: int = option(3, "runs of each way", metavar="N")
    max_new_tokens: int = option(200, "most tokens of an answer", metavar="N")
    max_length: int = option(512, "most tokens of a prompt and its answer; longer prompts are left out", metavar="N")
    temperature: float = option(0.0, "0 is greedy", metavar="T")
    slots: int = option(16, "requests that the engine runs at once", metavar="N")
    prefix_cache: bool = option(False, "keep prompts that come again, which then are not run again")
    plot: str | None = option(None, "also draw the figures; needs matplotlib", metavar="FILE.png")
    json: bool = option(False, "print one JSON object and nothing else")
