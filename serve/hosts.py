"""One engine over the devices of several hosts: every process runs the same loop, and process 0 leads.

What the loop does follows from what it was asked for, from what the devices answer, and from measured times, by which
the width of a round is chosen. The devices' news are the same in every process. So before each step the leader tells
the others what it was asked for and what it has measured; then all make the same decisions and start the same programs
in the same order, which `jax.distributed` needs.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence

from dflash_jax.decoding.width import WidthController
from dflash_jax.pair import Pair
from serve.config import EngineConfig
from serve.engine import Command, Engine
from serve.link import Link, Message, Timing
from serve.requests import Event, Handle, Request


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

    def measured(self) -> list[Timing]:
        """By this process, since the last time."""
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
        """All processes make one, with the same pair and configuration, and their own ends of the link."""
        self.link = link
        super().__init__(pair, config)

    def _make_controller(self) -> SharedController:
        self._shared = SharedController(self.config.widths)
        return self._shared

    def submit(self, request: Request, deliver: Callable[[Event], None] | None = None) -> Handle:
        """As `Engine.submit`. RuntimeError in a process that does not lead."""
        if not self.link.leads:
            raise RuntimeError("only process 0, the leader, takes requests; an engine here can only follow")
        return super().submit(request, deliver)

    def follow(self) -> None:
        """Do what the leader does until it closes its engine. RuntimeError if it is gone before."""
        try:
            while True:
                if not self.step():
                    self._take_commands(None)
        except _ClosedError:
            self._cancel_all()
        finally:
            self._closed = True
            self.link.close()

    def close(self) -> None:
        if self.link.leads and self._error is None:
            super().close()
        self.link.close()

    def _loop(self) -> None:
        try:
            super()._loop()
        except Exception:  # the others must not wait for a next message
            self.link.close()
            raise

    def _take_commands(self, wait: float | None) -> None:
        measured = self._shared.measured()
        if self.link.leads:
            self._lead(self._asked(wait), measured)
        else:
            self._follow(self.link.hear())

    def _lead(self, asked: list[Command], measured: list[Timing]) -> None:
        numbers = {handle: running.order for handle, running in self._requests.items()}
        commands: list[tuple[int, Request | None]] = []
        for command in asked:
            if command.running is not None:
                handle = command.running.handle
                numbers[handle] = command.running.order
                commands.append((numbers[handle], handle.request))
            elif command.cancel in numbers:  # else it has ended
                commands.append((numbers[command.cancel], None))
        # The loop has ended when `close` comes here, and nothing follows.
        self.link.tell(Message(commands, measured, last=self._closed and self._thread is None))
        self._shared.learn(measured)
        for command in asked:
            self._obey(command)

    def _follow(self, message: Message) -> None:
        self._shared.learn(message.timings)
        for number, request in message.commands:
            if request is None:
                self._obey(Command(cancel=self._numbered(number)))
                continue
            self.stats.submitted += 1
            handle = Handle(request, self.cancel, lambda event: None)
            self._obey(Command(running=self._prepare(handle, number)))
        if message.last:
            raise _ClosedError

    def _numbered(self, number: int) -> Handle | None:
        return next((handle for handle, running in self._requests.items() if running.order == number), None)
