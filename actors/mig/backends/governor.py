"""The CPU governor: holds processes to a share of CPU time by SIGSTOP and SIGCONT, closed over the CPU time they really used.

A process of its own, started by its path (nothing but the standard library is imported), so that neither an interpreter
lock nor a busy owner delays it. Each slice has an account in CPU seconds: it earns ``cores`` CPU seconds a second, and pays
what its process used. In debt it is stopped, out of debt by ``QUANTUM_S`` it goes on; so the long-run share is exact,
whatever the signals' delay. An idle slice saves no more than ``SAVINGS_S``; one that others kept from a core, ``ARREARS_S``.

Commands are lines of JSON on stdin, each answered by one line on stdout:
    {"do": "hold", "slice": ID, "cores": C, "pid": P}      {"do": "let_go", "slice": ID}      {"do": "read", "slice": ID}
The end of stdin (the owner's death included) lets every process go on, then ends the governor.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

QUANTUM_S = 0.005
"""CPU seconds for which a stopped slice saves before it goes on: the length of a burst."""
SAVINGS_S = 0.005
"""Most CPU seconds that an idle slice saves up."""
ARREARS_S = 0.25
"""Most CPU seconds that a slice is owed which wanted to run and did not get a core: it catches up when cores are free."""
SHORTEST_S, LONGEST_S = 0.001, 0.05


@dataclass
class Account:
    """One slice: ``balance_s`` is what it may still use, ``used_s`` what it has used, since ``since``."""

    cores: float
    pid: int
    pidfd: int
    since: float
    paid_to_s: float
    seen: float
    balance_s: float = SAVINGS_S
    used_s: float = 0.0
    stopped: bool = False

    def settle(self, now: float, cpu_s: float) -> None:
        """Earn for the time, pay for the use."""
        used, passed = max(0.0, cpu_s - self.paid_to_s), now - self.seen
        self.paid_to_s, self.seen = cpu_s, now
        self.used_s += used
        balance_s = self.balance_s + self.cores * passed - used
        if balance_s > SAVINGS_S:
            busy = self.stopped or used > 0.1 * self.cores * passed or is_runnable(self.pid)
            balance_s = min(balance_s, ARREARS_S if busy else max(self.balance_s - used, SAVINGS_S))
        self.balance_s = balance_s

    def wait_s(self, most_cores: float) -> float:
        """Until this account can change its state at the earliest."""
        if self.stopped:
            return (QUANTUM_S - self.balance_s) / self.cores
        drain = most_cores - self.cores
        return max(self.balance_s, 0.0) / drain if drain > 0 else LONGEST_S


def cpu_seconds(pid: int) -> float | None:
    """CPU time of all threads of a process, to the nanosecond where the kernel has a clock for it; None when it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # CPUCLOCK_SCHED of that process: linux/posix-timers.h
    except OSError:
        pass
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_runnable(pid: int) -> bool:
    """Whether the process (its first thread) waits for a core or has one."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


class Governor:
    """The accounts, and the loop over them."""

    def __init__(self, most_cores: float):
        self.most_cores = most_cores
        self.accounts: dict[str, Account] = {}

    def do(self, command: dict[str, object]) -> dict[str, object]:
        """One command. Unknown slices and dead processes are answers, no errors."""
        name, what = str(command.get("slice")), command["do"]
        now = time.monotonic()
        if what == "hold":
            self._let_go(name)
            pid, cores = int(str(command["pid"])), float(str(command["cores"]))
            used = cpu_seconds(pid)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                return {"ok": False, "why": error.strerror or str(error)}
            if used is None:
                os.close(pidfd)
                return {"ok": False, "why": "No such process"}
            self.accounts[name] = Account(cores, pid, pidfd, now, used, now)
            return {"ok": True}
        if what == "let_go":
            return {"ok": self._let_go(name)}
        account = self.accounts.get(name)
        if account is None:
            return {"ok": False, "why": "no such slice is held"}
        return {"ok": True, "used_s": account.used_s, "wall_s": account.seen - account.since}

    def step(self) -> float:
        """Settles every account, stops and continues; returns how long to wait."""
        wait = LONGEST_S
        for name, account in list(self.accounts.items()):
            now, used = time.monotonic(), cpu_seconds(account.pid)
            if used is None or self._ended(account):
                self._let_go(name)
                continue
            account.settle(now, used)
            free = account.cores >= self.most_cores
            if not account.stopped and account.balance_s < 0 and not free:
                account.stopped = self._signal(account, signal.SIGSTOP)
            elif account.stopped and account.balance_s >= QUANTUM_S - 1e-9:
                account.stopped = not self._signal(account, signal.SIGCONT)
            wait = min(wait, LONGEST_S if free else account.wait_s(self.most_cores))
        return max(wait, SHORTEST_S)

    def end(self) -> None:
        for name in list(self.accounts):
            self._let_go(name)

    def _ended(self, account: Account) -> bool:
        """A pidfd is readable when its process has ended (a zombie keeps its clock)."""
        return bool(select.select([account.pidfd], [], [], 0)[0])

    def _signal(self, account: Account, number: signal.Signals) -> bool:
        try:
            signal.pidfd_send_signal(account.pidfd, number)
            return True
        except OSError:
            return False

    def _let_go(self, name: str) -> bool:
        account = self.accounts.pop(name, None)
        if account is None:
            return False
        with suppress(OSError):  # always: a stop may have been sent whose note was lost
            signal.pidfd_send_signal(account.pidfd, signal.SIGCONT)
        os.close(account.pidfd)
        return True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a Ctrl-C at the terminal ends the owner, which closes stdin
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    governor = Governor(float(sys.argv[1]))
    with suppress(OSError):
        os.nice(-10)  # allowed to root alone; elsewhere the loop is only a little later
    pending = b""
    try:
        wait = LONGEST_S
        while True:
            if select.select([0], [], [], wait)[0]:
                data = os.read(0, 65536)
                if not data:
                    break
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    os.write(1, json.dumps(governor.do(json.loads(line))).encode() + b"\n")
            wait = governor.step()
    finally:
        governor.end()


if __name__ == "__main__":
    main()
