"""Several processes as one: the beginning and the end of a `--distributed` run.

Process 0 is the coordinator. Its address, the number of processes and each one's own number come from
JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and JAX_PROCESS_ID; what of these is not set, from the cluster
that JAX finds itself in: a TPU pod, GKE, SLURM or Open MPI. JAX_LOCAL_DEVICE_IDS (0,1,...) tells which of its host's
GPUs a process takes; under SLURM and Open MPI it takes only one if that is not set. All processes must have come within
MULTIHOST_TIMEOUT_SECONDS, 300 if not set.
"""

import contextlib
import os
import re
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence

import jax
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks, and tells nobody

from subtractive_jax.errors import UserError

_READY = "ready\n"
_REFUSED = "refused: "
_LINE = 4096  # bytes of a message at most
_HELLO_SECONDS = 10.0  # in which who connects must say who it is
_LEAVE_SECONDS = 10.0  # for which a process that failed waits for others that fail too


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """`initialize`, and on an exception in the block the end of this process: status 2 for a `UserError`, otherwise 1.

    JAX would keep a process that failed for five minutes, waiting for the others to end as well, while they wait for
    it in a collective operation.

    Raises:
      UserError: see `initialize`; those of the block are printed.
    """
    initialize()
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            where = f"process {jax.process_index()} on {socket.gethostname()}"
            print(f"error: {error} ({where})", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)  # returns when all have called it
        leaving.start()
        leaving.join(_LEAVE_SECONDS)
        sys.stdout.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


def initialize() -> None:
    """Makes this process one of the run's, before JAX's first operation. Returns when all processes have come.

    `jax.distributed.initialize` alone would abort, without a word on who is missing, when a process does not come. So
    they meet beforehand, at the address where the coordinator will listen.

    Raises:
      UserError: an address or number is missing or wrong, or a process did not come in time.
    """
    timeout = _number("MULTIHOST_TIMEOUT_SECONDS") or 300
    address, count, process, devices = _place(timeout)
    me = f"process {process} of {count} on {socket.gethostname()}"
    if process == 0:
        _gather(me, address, count, timeout)
    else:
        _report(me, address, count, process, timeout)
    jax.distributed.initialize(
        address, count, process, devices, cluster_detection_method="deactivate", initialization_timeout=timeout
    )


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    if value and not re.fullmatch("[0-9]+", value):
        raise UserError(f"{name}={value}: must be a whole number")
    return int(value) if value else None


def _place(timeout: int) -> tuple[str, int, int, Sequence[int] | None]:
    """(coordinator's address, number of processes, this one's number, its devices or None for what JAX decides)."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, process, devices = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID"), None
    if None in (address, count, process):
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(address, count, process, None, None, timeout)
        except (OSError, RuntimeError) as error:  # metadata server, names, Kubernetes
            raise UserError(
                f"--distributed: {socket.gethostname()} cannot find its place in the cluster ({error})"
            ) from error
        address, count, process, devices = found
    unknown = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=count, JAX_PROCESS_ID=process)
    if missing := [name for name, value in unknown.items() if value is None]:
        raise UserError(
            f"--distributed: {socket.gethostname()} is in no cluster that JAX knows: set {', '.join(missing)}"
        )
    assert address is not None and count is not None and process is not None
    if not re.fullmatch(r".+:[0-9]{1,5}", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT")
    if process >= count:
        raise UserError(f"JAX_PROCESS_ID={process}: must be below JAX_NUM_PROCESSES={count}")
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None
    return address, count, process, devices


def _gather(me: str, address: str, count: int, timeout: int) -> None:
    """Process 0 waits until all others have come, and lets them go on."""
    port, deadline = int(address.rpartition(":")[2]), time.monotonic() + timeout
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise UserError(f"{me} cannot listen on port {port} ({error}): end what does, or give another port") from error
    hosts = {0: socket.gethostname()}  # by process
    others: dict[socket.socket, int] = {}  # connections of those that have come, held open until all have
    with contextlib.ExitStack() as connections, selectors.DefaultSelector() as selector, server:

        def tell(line: str) -> None:
            for connection in others:
                with contextlib.suppress(OSError):  # it ended meanwhile, which JAX will notice
                    connection.sendall(line.encode())

        def refuse(reason: str) -> UserError:
            tell(f"{_REFUSED}{reason}\n")
            return UserError(reason)

        selector.register(server, selectors.EVENT_READ)
        while len(hosts) < count:
            ready = [key.fileobj for key, _ in selector.select(max(deadline - time.monotonic(), 0))]
            if not ready:
                missing = [str(process) for process in range(count) if process not in hosts]
                raise refuse(
                    f"{me} waited {timeout} s at {address}, but process {', '.join(missing)} did not come: "
                    "see what happened there"
                )
            for connection in [connection for connection in others if connection in ready]:
                selector.unregister(connection)  # who has come says no more: it ended
                del hosts[others.pop(connection)]
            if server not in ready:
                continue
            connection = connections.enter_context(server.accept()[0])
            hello = _receive(connection, _HELLO_SECONDS).split()
            if len(hello) != 3 or not (hello[0] + hello[1]).isdecimal():
                connection.close()  # no process of ours
                continue
            process, its_count, host = int(hello[0]), int(hello[1]), hello[2]
            others[connection] = process
            selector.register(connection, selectors.EVENT_READ)
            if its_count != count:
                raise refuse(f"{me}, but process {process} on {host} is one of {its_count}: give all the same number")
            if process in hosts:
                raise refuse(f"process {process} is on {hosts[process]} and on {host}: give each its own number")
            hosts[process] = host
        server.close()  # before JAX listens
        tell(_READY)
    places = ", ".join(f"{process} on {host}" for process, host in sorted(hosts.items()))
    print(f"{count} processes: {places}", flush=True)  # of one that is lost later, JAX tells the number alone


def _report(me: str, address: str, count: int, process: int, timeout: int) -> None:
    """Any other process tells process 0 that it has come, and waits until it may go on."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
                connection.sendall(f"{process} {count} {socket.gethostname()}\n".encode())
                answer = _receive(connection, timeout + _HELLO_SECONDS)
            if answer == _READY:
                return
            if answer.startswith(_REFUSED):
                raise UserError(answer.removeprefix(_REFUSED).strip())
            problem = "it hung up; is the run under way already?"
        except OSError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"{me} waited {timeout} s for process 0, which does not answer at {address} ({problem}): see what "
                "happened there, and whether a firewall is in between"
            )
        time.sleep(0.5)


def _receive(connection: socket.socket, seconds: float) -> str:
    """One line; what there is of it if the other side hangs up or is silent."""
    connection.settimeout(seconds)
    try:
        return connection.makefile("rb").readline(_LINE).decode(errors="replace")
    except OSError:
        return ""
