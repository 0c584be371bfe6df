"""Checks the node that it runs on, before the work: its last line is "fit", or says all that is wrong.

cluster/stage.sh runs it on every node of a job at once. The first node answers the others, which so find out whether
they reach it, and how far their clocks are apart.
"""

import argparse
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path

MAX_CLOCK_SECONDS = 5.0
JOIN_SECONDS = 60.0  # that nodes may start apart
MIN_FREE_GB = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", required=True, help="SLURM's name of this node")
    parser.add_argument("--nodes", type=int, required=True, help="of the job")
    parser.add_argument("--gpus", type=int, required=True, help="that this node is to have")
    parser.add_argument("--interface", required=True, help="network interface that is to be up; '' for any")
    parser.add_argument("--shared", type=Path, required=True, help="folder that all nodes are to see")
    parser.add_argument("--local", type=Path, required=True, help="folder on a disk of the node's own")
    args = parser.parse_args()
    first, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    others = args.nodes - 1
    answering = None
    if args.node == first and others:
        answering = threading.Thread(target=answer, args=(port, others))
        answering.start()
    problems = [
        shared_folder(args.shared),
        local_folder(args.local),
        network(args.interface) if others else "",
        clock(first, port) if args.node != first else "",
        devices(args.gpus),
    ]
    if answering:
        answering.join()
    print("; ".join(problem for problem in problems if problem) or "fit")


def answer(port: int, others: int) -> None:
    """Tells so many nodes the time, if they ask within JOIN_SECONDS."""
    end = time.monotonic() + JOIN_SECONDS
    with socket.create_server(("", port), backlog=others) as server:
        while others and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
            except TimeoutError:
                return
            with peer:
                peer.sendall(json.dumps(time.time()).encode())
            others -= 1


def clock(first: str, port: int) -> str:
    """Whether the first node can be reached, and has the time of this one; '' if so."""
    end = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            asked = time.time()
            with socket.create_connection((first, port), timeout=10) as peer, peer.makefile() as stream:
                theirs = json.loads(stream.read())
            break
        except (OSError, ValueError) as error:
            if time.monotonic() > end:
                return f"cannot reach {first} at port {port} ({error}): firewall, or wrong name or network"
            time.sleep(0.5)
    ahead = (asked + time.time()) / 2 - theirs
    return f"its clock is {ahead:+.0f} s off that of {first}" if abs(ahead) > MAX_CLOCK_SECONDS else ""


def network(interface: str) -> str:
    """Whether the other nodes can reach this one by the interface, or by its name where none is chosen."""
    if not interface:
        try:
            addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        except OSError as error:
            return f"its name {socket.gethostname()} has no address ({error}); set 'interface' in the profile"
        if all(address.startswith("127.") for address in addresses):
            return f"its name {socket.gethostname()} is {min(addresses)}, a loopback; set 'interface' in the profile"
        return ""
    folder = Path("/sys/class/net") / interface
    if not folder.exists():
        there = ", ".join(sorted(path.name for path in folder.parent.iterdir()))
        return f"there is no interface {interface}, there are {there}"
    state = (folder / "operstate").read_text().strip()
    return "" if state in ("up", "unknown") else f"interface {interface} is {state}"


def shared_folder(folder: Path) -> str:
    """Whether this node sees the file that the job's first node wrote, and can write beside it."""
    try:
        if not (folder / "shared").is_file():
            return f"does not see {folder}: the work folder is not on a file system that all nodes share"
        file = folder / f"node-{uuid.uuid4()}"
        file.write_text("written")
        file.unlink()
    except OSError as error:
        return f"cannot write into {folder}: {error}"
    return ""


def local_folder(folder: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            free = os.statvfs(folder)
    except OSError as error:
        return f"local_disk {folder} cannot be used: {error}"
    free_gb = free.f_bavail * free.f_frsize / 1e9
    return f"local_disk {folder} has only {free_gb:.1f} GB left" if free_gb < MIN_FREE_GB else ""


def devices(num_gpus: int) -> str:
    """Whether every GPU that the job has asked for is there and multiplies two matrices."""
    if not num_gpus:
        return ""
    try:
        import torch

        found = torch.cuda.device_count()
        if found < num_gpus:
            return f"has {found} of {num_gpus} GPUs"
        for device in range(num_gpus):
            ones = torch.ones(256, 256, device=f"cuda:{device}")
            if (ones @ ones).sum().item() != 256**3:
                return f"GPU {device} computes wrongly"
    except (ImportError, OSError, RuntimeError) as error:
        return f"a GPU cannot be used: {' '.join(str(error).split())}"
    return ""


if __name__ == "__main__":
    main()
