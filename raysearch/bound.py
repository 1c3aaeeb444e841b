"""Becomes another program that ends when its parent does: `python -I -S bound.py PARENT PROGRAM ARGUMENT…`.

It knows nothing of that program. Where the kernel has no such promise to give (other than Linux), it only becomes it.
Only the standard library, because it is started without site-packages.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def _bind(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the promise was given
            sys.exit(1)


if __name__ == "__main__":
    _bind(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
