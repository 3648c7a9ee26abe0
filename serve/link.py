"""What the leader of an engine over several hosts tells the others, and the connections that it goes through."""

import logging
import os
import socket
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import jax

from dflash_jax.errors import InputError
from serve.requests import Request

PATIENCE = 600.0  # seconds to wait for the leader to be there
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Measured costs of rounds, seconds by width; `assumed` ones are from the start."""

    load: Hashable
    costs: Mapping[int, float]
    assumed: bool


@dataclass(frozen=True)
class Message:
    """What the leader says before a step."""

    commands: list[tuple[int, Request | None]]  # numbers, and what is new; None: cancel the one that has the number
    timings: list[Timing]
    last: bool  # no step follows


class Link:
    """From the leader, process 0 of `jax.distributed`, to every other process."""

    def __init__(self, host: str, port: int, key: bytes):
        """Connect all processes: each calls this with the leader's address and the secret that they share.

        Who knows the secret can run code in all of them. InputError for an empty one, a leader that cannot be reached,
        or one with another secret.
        """
        if not key:
            raise InputError("the secret that the hosts share is empty; give the same one to each")
        self.leads = jax.process_index() == 0
        self._ends = _accept(host, port, key) if self.leads else [_reach(host, port, key)]

    def tell(self, message: Message) -> None:
        """The leader's word to all others. RuntimeError if one of them is gone."""
        try:
            for end in self._ends:
                end.send(message)
        except OSError as error:
            raise RuntimeError("a host of the engine is gone; start all of them again") from error

    def hear(self) -> Message:
        """The leader's next word. RuntimeError if it is gone."""
        try:
            return self._ends[0].recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("the leader of the engine is gone; start all hosts again") from error

    def close(self) -> None:
        for end in self._ends:
            end.close()


def _accept(host: str, port: int, key: bytes) -> list[Connection]:
    """A connection from each of the other processes."""
    others, ends = jax.process_count() - 1, []
    try:
        listener = Listener((host, port), backlog=max(others, 1), authkey=key)
    except OSError as error:
        raise InputError(f"the leader cannot listen at {host}:{port}: {error}; give another address") from error
    with listener:
        while len(ends) < others:
            try:
                ends.append(_prompt(listener.accept()))
            except (AuthenticationError, EOFError, OSError) as error:
                log.warning("somebody without the hosts' secret called at %s:%d (%s)", host, port, error)
    return ends


def _reach(host: str, port: int, key: bytes) -> Connection:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return Client((host, port), authkey=key)
        except AuthenticationError as error:
            raise InputError(f"the leader at {host}:{port} has another secret; give the same one to each") from error
        except (EOFError, OSError) as error:
            if time.monotonic() > until:
                raise InputError(f"the leader at {host}:{port} cannot be reached: {error}; start it first") from error
            time.sleep(0.1)


def _prompt(end: Connection) -> Connection:
    """The same, which sends at once: small messages would wait for the last one's receipt."""
    with socket.socket(fileno=os.dup(end.fileno())) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end
