"""What Prometheus reads: the engine's own counters, and latencies of finished requests."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engine import Engine
from serve.requests import Handle

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

COUNTERS = {
    "submitted": "Requests that were taken",
    "finished": "Requests that came to their own end",
    "cancelled": "Requests that were cancelled, by their senders or at the end",
    "preempted": "Times that a running request had to give its pages back",
    "tokens": "Tokens of outputs",
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that the prefix cache had",
    "admissions": "Requests that have got a slot",
    "prefix_hits": "Requests that found tokens in the prefix cache",
    "prefill_tokens": "Tokens of prompts that were run through the models",
    "rounds": "Decoding rounds, each of all requests in its batch",
    "host_syncs": "Times that the host has waited for the device",
    "drafted": "Tokens that the drafter proposed",
    "accepted": "Tokens of these that the target accepted",
}


class EngineCollector(Collector):
    """Reads the engine when it is asked, so that nothing is counted twice."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats, scheduler = self._engine.stats, self._engine.scheduler
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"dflash_{name}", text, value=getattr(stats, name))
        yield _by("dflash_dispatches", "Dispatches of rounds by their width", "width", stats.widths)
        drafted, accepted = dict(stats.drafted_at), dict(stats.accepted_at)
        yield _by("dflash_drafted_at", "Tokens proposed by place in the block", "position", drafted)
        yield _by("dflash_accepted_at", "Tokens accepted by place in the block", "position", accepted)
        rate = {place: accepted.get(place, 0) / count for place, count in drafted.items() if count}
        yield _gauge("dflash_acceptance", "Share of proposals accepted, by place in the block", "position", rate)
        # The first place is proposed once a round and request.
        length = 1 + sum(accepted.values()) / drafted[1] if drafted.get(1) else 1.0
        yield GaugeMetricFamily("dflash_acceptance_length", "Tokens of a round that drafts, mean so far", value=length)
        running = len(scheduler.running)
        yield GaugeMetricFamily("dflash_running", "Requests that have a slot", value=running)
        yield GaugeMetricFamily("dflash_waiting", "Requests without a slot", value=max(stats.unfinished - running, 0))
        pages = scheduler.pages
        free, idle = pages.free, pages.idle
        used = {"free": free, "kept": idle, "used": pages.count - free - idle}
        yield _gauge("dflash_pages", "Pages of the cache; kept: by the prefix cache alone", "state", used)


def _by(name: str, text: str, label: str, values: Mapping[int, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in sorted(dict(values).items()):  # copied at once: the engine goes on counting
        family.add_metric([str(key)], value)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([str(key)], value)
    return family


class Latencies:
    """How long finished requests took, in seconds."""

    def __init__(self, registry: CollectorRegistry):
        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"dflash_{name}_seconds", text, buckets=tuple(buckets), registry=registry)

        self._first = histogram("time_to_first_token", "From submission to the first token", SECONDS)
        self._token = histogram("time_per_token", "Mean time of a token after the first", TOKEN_SECONDS)
        self._whole = histogram("request", "From submission to the end", SECONDS)

    def observe(self, handle: Handle, tokens: int) -> None:
        """A request that has ended by itself, with this many tokens of output."""
        if handle.first is None or handle.finished is None:
            return
        self._first.observe(handle.first - handle.submitted)
        self._whole.observe(handle.finished - handle.submitted)
        if tokens > 1:
            self._token.observe((handle.finished - handle.first) / (tokens - 1))


def make_registry(engine: Engine) -> CollectorRegistry:
    """A registry of the engine's counters and the process's memory and files."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    ProcessCollector(registry=registry)
    return registry
