"""Becomes a command that cannot outlive the process that asked for it. A script of the standard library alone.

    python -I -S keep.py PARENT_PID COMMAND...

as the leader of a process group. A child stays behind and kills the whole group as soon as the parent or the command
has ended, however they ended: no server survives a trainer that was killed, and no worker a server. The child waits
for both without polling, and does not depend on which thread of the parent started it, as a death signal would.
"""

from __future__ import annotations

import os
import select
import signal
import sys


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    leader = os.getpid()
    ends = [os.pidfd_open(parent), os.pidfd_open(leader)]
    if os.getppid() != parent:
        sys.exit("the process that asked for this command has ended")
    if os.fork() == 0:
        poll = select.poll()
        for end in ends:
            poll.register(end, select.POLLIN)
        poll.poll()
        os.killpg(leader, signal.SIGKILL)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
