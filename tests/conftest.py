"""What every test may count on: one torch thread, fixed seeds, an empty home and folder, no network."""

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

# One thread: the models here are small, and sums come in the same order on every machine.
torch.set_num_threads(1)
settings.register_profile("foveal", deadline=None, derandomize=True, database=None)
settings.load_profile("foveal")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's blocks, by far the longest test, first: others run beside it, where there are cores."""
    items.sort(key=lambda item: item.name != "test_the_blocks_work")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that still draw from it
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the person's W&B login and settings, or writes results into the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("WANDB_") or name in ("NETRC", "XDG_CONFIG_HOME"):
                patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.chdir(tmp_path_factory.mktemp("work"))
        yield


def _is_here(address: Any) -> bool:
    """Whether a socket address stays on this machine: loopback, or a path."""
    if not isinstance(address, tuple):
        return True
    host = address[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Connecting to another machine is an error. (Child processes are not covered.)"""

    def guard(connect: Any) -> Any:
        def guarded(self: socket.socket, address: Any) -> Any:
            if not _is_here(address):
                raise PermissionError(f"a test connects to {address}: tests run without a network")
            return connect(self, address)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
        yield
