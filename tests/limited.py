"""Run a script in this process with little shared memory or few open files:
python tests/limited.py SHM_KB FILES script.py …

SHM_KB: the size of /dev/shm, on a file system of its own; 0: no limit. FILES: likewise. The exit code is that
of the script, or NOT_ALLOWED where /dev/shm cannot be mounted.
"""

import ctypes
import os
import resource
import runpy
import sys

NOT_ALLOWED = 77
NEW_NAMESPACE, RECURSIVE_AND_PRIVATE = 0x20000, 0x44000  # CLONE_NEWNS, MS_REC | MS_PRIVATE


def mount_shared_memory(kilobytes):
    """Return whether this process now has a /dev/shm of that size, which no other process sees."""
    libc = ctypes.CDLL(None)
    return not (
        libc.unshare(NEW_NAMESPACE)
        or libc.mount(b"none", b"/", None, RECURSIVE_AND_PRIVATE, None)
        or libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=%dk" % kilobytes)
    )


if __name__ == "__main__":
    kilobytes, files = map(int, sys.argv[1:3])
    if kilobytes and not mount_shared_memory(kilobytes):
        sys.exit(NOT_ALLOWED)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    del sys.argv[:3]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
