"""The only user of environment variables: what torchrun, gloo, DeepEP and a child Python read."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from moe_runtime.errors import ConfigError

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True, slots=True)
class TorchrunEnv:
    """One process's place in a torchrun world, and where its rendezvous listens."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    agent_store: bool = True
    """Whether torchrun's agent serves the store at that address; else rank 0 does."""
    restart: int = 0
    """How often torchrun has restarted the world."""

    @property
    def serves_store(self) -> bool:
        return self.rank == 0 and not self.agent_store


def torchrun_env(environ: Mapping[str, str] | None = None) -> TorchrunEnv | None:
    """The variables that torchrun sets, or None where it did not start this process.

    Raises ConfigError where only some of them are there or one is no number.
    """
    variables = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" not in variables and not {"RANK", "WORLD_SIZE"} <= variables.keys():
        return None
    return TorchrunEnv(
        rank=_number(variables, "RANK"),
        world_size=_number(variables, "WORLD_SIZE"),
        local_rank=_number(variables, "LOCAL_RANK"),
        local_world_size=_number(variables, "LOCAL_WORLD_SIZE"),
        master_addr=_text(variables, "MASTER_ADDR"),
        master_port=_number(variables, "MASTER_PORT"),
        agent_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restart=_number(variables, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in variables else 0,
    )


def child_environment() -> dict[str, str]:
    """Variables for a child Python started with -P, which then finds every module where this process finds it."""
    folders = [entry or os.curdir for entry in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


@contextmanager
def gloo_on_loopback() -> Iterator[None]:
    """Process groups made in the block listen on this machine's loopback interface only.

    gloo takes its interface from the environment and offers no other way; the variable is put back afterwards.
    """
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    before = os.environ.get(_GLOO_INTERFACE)
    if loopback:
        os.environ[_GLOO_INTERFACE] = loopback[0]
    try:
        yield
    finally:
        if before is not None:
            os.environ[_GLOO_INTERFACE] = before
        elif loopback:
            del os.environ[_GLOO_INTERFACE]


def deep_ep_holds_tensors() -> None:
    """DeepEP's asynchronous calls hold their tensors until their event is let go of; what the user has set stays.

    By itself it marks them as used by two streams instead, and within a captured graph memory so marked is not used
    again: every layer's room for the worst case would add up.
    """
    os.environ.setdefault("EP_AVOID_RECORD_STREAM", "1")


def _text(variables: Mapping[str, str], name: str) -> str:
    if not variables.get(name):
        raise ConfigError(
            f"{name}: not set, although other torchrun variables are. Start with "
            "`torchrun --nproc-per-node N -m moe_runtime …`, or unset RANK and WORLD_SIZE."
        )
    return variables[name]


def _number(variables: Mapping[str, str], name: str) -> int:
    text = _text(variables, name)
    if not text.isdecimal():
        raise ConfigError(
            f"{name}={text}: torchrun's variables are whole numbers. Start with torchrun, or unset {name}."
        )
    return int(text)
