"""Settings every test shares. Imports none of our packages: the shape checker must come first."""

import os
import signal
from collections.abc import Iterator
from typing import Any

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(_name, "1")

# A shell starts what it puts into the background with interrupts ignored, and every process that a
# test starts would inherit that: Ctrl-C could not be tested there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no process one starts, reads or writes the user's cache of tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEANGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    """Results depend on the thread count; one thread also keeps parallel workers apart."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails; loopback stays open for worker processes."""
    import socket

    connect, look_up = socket.socket.connect, socket.getaddrinfo
    # A server asks for the addresses of no host at all when it binds to every one of its own.
    here = ("127.0.0.1", "::1", "localhost", "", None)

    def guarded_connect(self: socket.socket, address: object) -> None:
        local = isinstance(address, (str, bytes)) or (
            isinstance(address, tuple) and address[0] in here
        )
        if not local:
            raise AssertionError(f"A test tried to reach {address}.")
        connect(self, address)  # type: ignore[arg-type]

    def guarded_look_up(host: str | bytes | None, *rest: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in here:
            raise AssertionError(f"A test tried to look up {name}.")
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
