"""Ranks watch each other: when one dies, the others say which and why, and end within seconds.

A collective that waits for a dead rank waits for ever (NCCL) or fails with the address of a socket (gloo). So every
rank keeps a TCP connection to rank 0, on which nothing is sent until a rank leaves: with "bye" in the end, or with the
error that it fails with. A connection that closes without a word is a rank that was killed. Rank 0 tells the others.
When the error is that a collective took too long, ranks that are not in one say where they are: they are the late ones.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from contract.cli import EXIT_ERROR, USER_ERRORS

# What a failed collective waits for, to learn which rank it was; and what this process then has to end by itself.
LEARN_SECONDS, GRACE_SECONDS = 5.0, 5.0
_JOIN_SECONDS = 60.0
_TIMED_OUT = "timed out"  # what gloo says of a collective, in its message
_ROOT = Path(__file__).parents[1]


class Watch:
    """A context manager around what the ranks do together.

    Raises:
        ConnectionError: another rank died or failed, instead of the RuntimeError of a collective.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank = rank
        self._cause = ""  # which rank was lost and why
        self._lost, self._left = threading.Event(), threading.Event()
        self._peers: dict[socket.socket, str] = {}
        if world_size > 1:
            self._connect(world_size, device)
            # Loader processes would hold the connections of a rank that was killed.
            os.register_at_fork(after_in_child=self._close)
            threading.Thread(target=self._listen, daemon=True, name="watch").start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind, error, trace) -> None:
        collective_failed = isinstance(error, RuntimeError) and bool(self._peers)
        if collective_failed and _TIMED_OUT in str(error).lower():
            self._cause = self._cause or f"{_name(self.rank)} waited for a rank that is late: {_line(error)}"
        elif collective_failed:
            self._lost.wait(LEARN_SECONDS)
        self._left.set()
        leaves = error is None or isinstance(error, (KeyboardInterrupt, SystemExit))
        if self._peers and not (leaves or self._cause or isinstance(error, USER_ERRORS)):
            traceback.print_exception(error)  # now: once the others know, the launcher kills this rank
        self._tell("" if leaves else self._cause or f"{_name(self.rank)} failed: {_line(error)}")
        if not leaves and self._peers and dist.get_backend() == "gloo":
            # Closes the sockets, at which the collectives of the others fail. With NCCL it could wait for them.
            dist.destroy_process_group()
        if collective_failed and self._cause:
            raise ConnectionError(self._cause) from error

    def _connect(self, world_size: int, device: torch.device) -> None:
        """Connects all ranks to rank 0; a token keeps strangers out."""
        server = socket.create_server(("", 0), backlog=world_size) if self.rank == 0 else None
        port = server.getsockname()[1] if server else 0
        address = torch.tensor([port, secrets.randbits(62)], device=device)
        dist.broadcast(address, 0)
        port, token = address.tolist()
        if server is None:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), _JOIN_SECONDS)
            self._add(peer, _name(0, os.environ["MASTER_ADDR"]))
            _send(peer, {"token": token, "name": _name(self.rank)})
            return
        with server:
            server.settimeout(_JOIN_SECONDS)
            while len(self._peers) < world_size - 1:
                peer, _ = server.accept()
                peer.settimeout(_JOIN_SECONDS)
                hello = _receive(peer)
                if hello and hello.get("token") == token:
                    self._add(peer, hello["name"])

    def _add(self, peer: socket.socket, name: str) -> None:
        # A machine that vanishes closes nothing: after 20 s without an answer to a probe it is lost, too.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        peer.settimeout(None)
        self._peers[peer] = name

    def _listen(self) -> None:
        """Waits until a rank is lost, then lets this process end, by force if need be."""
        selector = selectors.DefaultSelector()
        for peer in self._peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map() and not self._cause:
            for event, _ in selector.select():
                peer = event.fileobj
                word = _receive(peer)
                if word is None:
                    self._cause = f"{self._peers[peer]} died without a word: killed, out of memory, or its machine lost"
                elif word["lost"]:
                    self._cause = word["lost"]
                selector.unregister(peer)
        if not self._cause or self._left.is_set():
            return
        self._cause += self._where_if_late()
        self._lost.set()
        if self.rank == 0:
            self._tell(self._cause)
        if not self._left.wait(GRACE_SECONDS):
            # The main thread hangs, in a collective or elsewhere, where no exception reaches it.
            print(f"error: {self._cause}", file=sys.stderr, flush=True)
            os._exit(EXIT_ERROR)

    def _where_if_late(self) -> str:
        """Where this rank is, when others waited too long in a collective and it is in none; else ''."""
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        if _TIMED_OUT not in self._cause.lower() or any("torch/distributed" in at.filename for at in stack):
            return ""
        ours = [at for at in stack if Path(at.filename).is_relative_to(_ROOT)] or stack
        return f"; late is {_name(self.rank)}, at line {ours[-1].lineno} of {ours[-1].filename}, in {ours[-1].name}"

    def _close(self) -> None:
        for peer in self._peers:
            peer.close()

    def _tell(self, lost: str) -> None:
        """Says why this rank leaves: '' for the end of its work."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                _send(peer, {"lost": lost})


def _name(rank: int, host: str = "") -> str:
    return f"rank {rank} on {host or socket.gethostname()}"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _send(peer: socket.socket, word: dict) -> None:
    peer.sendall(json.dumps(word).encode() + b"\n")


def _receive(peer: socket.socket) -> dict | None:
    """The next line, None when there is none: the connection was closed, or a stranger sent something else."""
    line = bytearray()
    with contextlib.suppress(OSError, json.JSONDecodeError):
        while not line.endswith(b"\n"):
            byte = peer.recv(1)
            if not byte:
                return None
            line += byte
        return json.loads(line)
    return None
