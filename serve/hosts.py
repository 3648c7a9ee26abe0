"""One engine over the devices of several hosts: every process runs the same scheduler, and process 0 leads.

What a scheduler does follows from what it was asked for, from what the devices answered, and from measured times, by
which the width of a round is chosen. The devices' news are the same in every process. So the leader tells the others
what it was asked for and what it has measured, once before each step; then all of them make the same decisions and
start the same programs in the same order, which `jax.distributed` needs.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import jax

from dflash_jax.decoding.width import WidthController
from dflash_jax.errors import InputError
from dflash_jax.pair import Pair
from serve.config import EngineConfig
from serve.engine import Engine
from serve.requests import Event, Handle, Request

PATIENCE = 600.0  # seconds to wait for the leader to be there


@dataclass(frozen=True)
class Timing:
    """Measured costs of rounds, seconds by width; `assumed` ones are from the start."""

    load: Hashable
    costs: Mapping[int, float]
    assumed: bool


@dataclass(frozen=True)
class Message:
    """What the leader says before a step."""

    commands: list[tuple[int, Request | None]] = field(default_factory=list)  # number and request; None: cancel it
    timings: list[Timing] = field(default_factory=list)
    closed: bool = False  # no step follows


class Link:
    """From the leader, process 0 of `jax.distributed`, to every other process."""

    def __init__(self, host: str, port: int, key: bytes):
        """Connect all processes: each calls this with the leader's address and the secret that they share.

        InputError for an empty secret, a leader that is not there, or one with another secret.
        """
        if not key:
            raise InputError("the secret that the hosts share is empty; give the same one to each")
        self.leads = jax.process_index() == 0
        others = jax.process_count() - 1
        if self.leads:
            with Listener((host, port), backlog=max(others, 1), authkey=key) as listener:
                self._ends = [listener.accept() for _ in range(others)]
        else:
            self._ends = [_reach(host, port, key)]

    def tell(self, message: Message) -> None:
        """The leader's word to all others."""
        for end in self._ends:
            end.send(message)

    def hear(self) -> Message:
        """The leader's next word. RuntimeError if it is gone."""
        try:
            return self._ends[0].recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("the leader of the engine is gone") from error

    def close(self) -> None:
        for end in self._ends:
            end.close()


def _reach(host: str, port: int, key: bytes) -> Connection:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return Client((host, port), authkey=key)
        except AuthenticationError as error:
            raise InputError(f"the leader at {host}:{port} has another secret; give the same to each") from error
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(f"the leader at {host}:{port} cannot be reached: {error}") from error
            time.sleep(0.1)


class SharedController(WidthController):
    """Learns costs from the leader's messages only, so that it is the same in every process."""

    def __init__(self, widths: Sequence[int]):
        super().__init__(widths)
        self._measured: list[Timing] = []

    def observe_cost(self, load: Hashable, width: int, seconds: float) -> None:
        """Kept for the next message."""
        self._measured.append(Timing(load, {width: seconds}, assumed=False))

    def assume_costs(self, load: Hashable, costs: Mapping[int, float]) -> None:
        """Kept for the next message."""
        self._measured.append(Timing(load, costs, assumed=True))

    def take(self) -> list[Timing]:
        """What this process has measured since the last time."""
        taken, self._measured = self._measured, []
        return taken

    def learn(self, timings: Sequence[Timing]) -> None:
        """What the leader has measured."""
        for timing in timings:
            if timing.assumed:
                super().assume_costs(timing.load, timing.costs)
            else:
                for width, seconds in timing.costs.items():
                    super().observe_cost(timing.load, width, seconds)


class _ClosedError(Exception):
    """The leader's last message has come."""


class HostsEngine(Engine):
    """An engine whose pair is on the devices of all processes. The leader serves it, the others `follow`."""

    def __init__(self, pair: Pair, config: EngineConfig | None, link: Link):
        """All processes make one, with the same arguments and their own end of the link."""
        self.link = link
        super().__init__(pair, config)

    def _make_controller(self) -> SharedController:
        self._shared = SharedController(self.config.widths)
        return self._shared

    def submit(self, request: Request, deliver: Callable[[Event], None] | None = None) -> Handle:
        """As `Engine.submit`. RuntimeError in a process that does not lead."""
        if not self.link.leads:
            raise RuntimeError("only the leader, process 0, takes requests; an engine here can only follow")
        return super().submit(request, deliver)

    def follow(self) -> None:
        """Do what the leader does, until it closes its engine. RuntimeError if it ends in another way."""
        try:
            while True:
                if not self.step():
                    self._take_commands(wait=True)
        except _ClosedError:
            self._closed = True
        while self._flights:
            self._collect()

    def close(self) -> None:
        super().close()
        self.link.close()

    def _loop(self) -> None:
        try:
            super()._loop()
        except Exception:  # the others must not wait for a next message
            self.link.close()
            raise

    def _take_commands(self, wait: bool) -> None:
        measured = self._shared.take()
        if self.link.leads:
            self._lead(wait, measured)
            return
        message = self.link.hear()
        self._shared.learn(message.timings)
        for order, request in message.commands:
            self._replay(order, request)
        if message.closed:
            raise _ClosedError

    def _lead(self, wait: bool, measured: list[Timing]) -> None:
        asked = []
        while wait or not self._commands.empty():
            asked.append(self._commands.get())
            wait = False
        here = {handle: r.order for handle, r in self._requests.items()}
        here |= {handle: r.order for _, handle, r in asked if r is not None}
        # What has ended already is not in anybody's books any more.
        commands = [(here[handle], None if r is None else r.handle.request) for _, handle, r in asked if handle in here]
        # In `close`, once the loop has ended, nothing follows.
        self.link.tell(Message(commands, measured, closed=self._closed and self._thread is None))
        self._shared.learn(measured)
        for command in asked:
            self._obey(*command)

    def _replay(self, order: int, request: Request | None) -> None:
        if request is None:
            known = next((handle for handle, r in self._requests.items() if r.order == order), None)
            if known is not None:
                self._obey("cancel", known, None)
            return
        handle = Handle(request, self.cancel, lambda event: None)
        self.stats.submitted += 1
        self._obey("submit", handle, self._prepare(handle, order))
