"""Being asked to stop: SIGTERM, SIGINT and SIGUSR1 set a mark, which the program looks at where it can stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = 5.0  # seconds from a request to stop to the end of a wait
STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Interrupted(Exception):
    """The program was asked to stop, has done so in good order, and resumes when started again."""


class Stalled(Interrupted):
    """This process was asked to stop while it waited for what does not come: it leaves alone, the others may wait."""


@dataclass
class StopRequest:
    """signal_name: the signal that asked, or None. wait: what the process waits for, where it says so."""

    signal_name: str | None = None
    wait: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside catch_signals, where the program waits for `what`: Stalled some seconds after a request to stop."""
        self.wait = what
        if self:
            self._limit_wait()
        try:
            yield
        finally:
            self.wait = None
            if self:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _limit_wait(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside, a signal asks to stop and does nothing else; a second Ctrl-C is a KeyboardInterrupt at once."""
    request = StopRequest()

    def ask(number: int, frame: object) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name
        if request.wait is not None:
            request._limit_wait()

    def end_wait(number: int, frame: object) -> None:
        if request.wait is not None:
            raise Stalled(f"{request.signal_name}: left while it waited for {request.wait}")

    handlers = {number: signal.signal(number, ask) for number in SIGNALS}
    alarm = signal.signal(signal.SIGALRM, end_wait)
    try:
        yield request
    except Interrupted:  # the process is leaving: further signals, such as torchrun's, are not to change its status
        handlers = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in {**handlers, signal.SIGALRM: alarm}.items():
            signal.signal(number, handler)


def obey_parent_alone() -> None:
    """For a helper process: a signal that reaches all processes of a job at once does not end it; its parent's does."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: SIGTERM ends it
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
