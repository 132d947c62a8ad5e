"""Stand-ins for the processes of an evaluate step: nothing is imported and nothing computed."""

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

POSITIONS = 100
DIES, FAILS, SLOW = -1, -2, -3  # jobs


def serve(connection: Connection, positions: int, log: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    connection.send((positions, None))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if job == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if job == FAILS:
            connection.send((None, (5, "the disk is full")))
            return
        if job == SLOW:
            time.sleep(60)
        connection.send((f"answer {job}", None))
