"""Whereabouts: where each process is, told to the others only once something has gone wrong.

In the good case nothing is sent: a process notes its call in a field. Each process keeps one thread asleep on a key of
the store. A rank whose wait fails sets the keys of its peers; their threads answer with their position even while
their programs wait elsewhere or compute, so the error names everybody who is alive and the ranks that are silent.
"""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore

from moe_runtime.comm.base import Location
from moe_runtime.comm.checks import show_ranks
from moe_runtime.errors import CommunicationError

_FOREVER = timedelta(days=3650)
_CLOSE = "close"


class Whereabouts:
    """One per process. `grace_s`: how long a failing rank waits for the others' answers."""

    def __init__(self, rank: int, store: TCPStore, *, run_id: str = "0", grace_s: float = 2.0) -> None:
        self.rank = rank
        self.location = Location()
        self.fault: CommunicationError | None = None
        self._label = ""
        self._inside = False
        self._since = 0.0
        self._grace_s = grace_s
        # A store connection serves one call at a time, so the sleeping thread and the others need one each.
        self._store = PrefixStore(f"whereabouts/{run_id}", store.clone())  # type: ignore[attr-defined]
        self._bell = PrefixStore(f"whereabouts/{run_id}", store.clone())  # type: ignore[attr-defined]
        self._asking = threading.Lock()
        self._thread = threading.Thread(target=self._answer, name="whereabouts", daemon=True)
        self._thread.start()

    def enter(self, label: str) -> None:
        """This rank begins to wait in `label`, for example "all_to_all #42 of ep"."""
        self._label = label
        self._since = time.monotonic()
        self._inside = True

    def leave(self) -> None:
        self._inside = False

    def __str__(self) -> str:
        if self._inside:
            return f"waits in {self._label} ({self.location})"
        if not self._label:
            return f"has made no call yet ({self.location})"
        return f"is busy after {self._label} ({self.location})"

    def report(self, label: str, ranks: tuple[int, ...], cause: BaseException) -> CommunicationError:
        """The error of this process, made once: what it waited for, and where `ranks` are."""
        with self._asking:
            if self.fault is None:
                waited = f" for {time.monotonic() - self._since:.1f} s" if self._inside else ""
                text = f"rank {self.rank} waited{waited} in {label} ({self.location}): {_first_line(cause)}\n"
                self.fault = CommunicationError(text + self._ask(tuple(r for r in ranks if r != self.rank)))
            return self.fault

    def _ask(self, ranks: tuple[int, ...]) -> str:
        """What the others say, collected for at most the grace."""
        answers: dict[int, str] = {}
        try:
            self._post(str(self))
            for rank in ranks:
                self._store.set(f"bell/{rank}", "where")
            end = time.monotonic() + self._grace_s
            while len(answers) < len(ranks) and time.monotonic() < end:
                for rank in ranks:
                    if rank not in answers and self._store.check([f"at/{rank}"]):
                        answers[rank] = self._store.get(f"at/{rank}").decode()
                time.sleep(0.01)
        except RuntimeError as error:
            return f"The store that knows where the ranks are is gone, with the process that held it: {error}"
        return _table(answers, [rank for rank in ranks if rank not in answers], self._grace_s)

    def _answer(self) -> None:
        """The sleeping thread."""
        try:
            self._bell.wait([f"bell/{self.rank}"], _FOREVER)
            if self._bell.get(f"bell/{self.rank}").decode() != _CLOSE:
                self._bell.set(f"at/{self.rank}", str(self))
        except RuntimeError:
            return  # the store went away: nobody can ask any more

    def _post(self, text: str) -> None:
        self._store.set(f"at/{self.rank}", text)

    def close(self, error: BaseException | None = None) -> None:
        """End the thread; peers that still wait for this rank learn that it left, and why."""
        try:
            if self.fault is None:
                why = f" after {type(error).__name__}: {_first_line(error)}" if error is not None else ""
                self._post(f"has left{why} ({self.location})")
            self._store.set(f"bell/{self.rank}", _CLOSE)
        except RuntimeError:
            pass  # the store is gone, and the thread with it
        self._thread.join(timeout=self._grace_s)


def _first_line(error: BaseException) -> str:
    """What happened, without the source position and the advice that gloo puts around it."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"^\[[^]]*:\d+\] ", "", text.splitlines()[0]).split(". This is typically")[0]


def _table(answers: dict[int, str], silent: list[int], grace_s: float) -> str:
    places: dict[str, list[int]] = {}
    for rank, text in answers.items():
        places.setdefault(text, []).append(rank)
    texts = [f"{show_ranks(ranks)} {_plural(text) if len(ranks) > 1 else text}" for text, ranks in places.items()]
    if silent:
        texts.append(f"{show_ranks(silent)} gave no sign of life within {grace_s:g} s")
    return "; ".join(texts) + "."


def _plural(text: str) -> str:
    """The texts of `Whereabouts.__str__` and `close`, for several ranks."""
    verb, rest = text.split(" ", 1)
    return {"waits": "wait", "is": "are", "has": "have"}[verb] + " " + rest
