"""A polite end: TERM, USR1 and USR2 (scancel, preemption, time limit) ask for a save at the next step."""

import signal
import threading
from types import FrameType
from typing import Any, Self

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """While entered, the signals only set a flag; the former handlers come back at the exit."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._former = {number: signal.getsignal(number) for number in ASKING}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_main_thread():
            for number, handler in self._former.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def install(self) -> None:
        """Again after Lightning and submitit, which put in handlers of their own.

        Lightning's raises between two micro-batches and submitit's anywhere; neither may happen between two
        collectives.
        """
        if self._in_main_thread():
            for number in ASKING:
                signal.signal(number, self._note)

    def let_through(self) -> None:
        """Signals that a rank was started without, so that it could not leave before the others saw them."""
        if self._in_main_thread():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @staticmethod
    def _in_main_thread() -> bool:
        return threading.current_thread() is threading.main_thread()
