"""Start scripts in a fraction of a second: a process that has imported PyTorch is forked for each of them.

    popen(["train_semi.py", "--config", …])        as subprocess.Popen([sys.executable, "train_semi.py", …])
    run(["-m", "dataset.check", …])                as subprocess.run, with its output as text

Python needs 3 s to import PyTorch, which is most of what a short run takes. The server has imported the
packages of requirements.txt and nothing of the repository. It has one thread and has run no parallel region,
so that a fork of it is as good as a new process. The child gets command line, environment, directory and
files of the call, runs the script as `__main__` and ends as Python does. Three things differ from a new
process: all children hash strings with one seed, the libraries read their environment when the server
started, and the modules are not taken apart at the end. Tests about these or about starting itself use
subprocess.
"""

import atexit
import functools
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import types

# The test process: what `subprocess` offers, for children of the server.


class Process:
    """A script that the server runs. It has the parts of subprocess.Popen that the tests use."""

    def __init__(self, args, connection, pid, stdout, stderr):
        self.args, self.pid, self.stdout, self.stderr = args, pid, stdout, stderr
        self.returncode, self._connection = None, connection

    def wait(self, timeout=None):
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(_read_line(self._connection))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def poll(self):
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout=None):
        """(stdout, stderr) to their ends, as text; None for one that is no pipe."""
        end, found = None if timeout is None else time.monotonic() + timeout, [None, None]

        def read(number, file):
            with file:
                found[number] = file.read()

        readers = [
            threading.Thread(target=read, args=(number, file), daemon=True)
            for number, file in enumerate((self.stdout, self.stderr))
            if file is not None
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else max(0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        return tuple(found)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def popen(args, *, cwd=None, env=None, stdout=None, stderr=None, start_new_session=False):
    """Run `python *args` in a fork of the server.

    stdout, stderr: subprocess.PIPE, subprocess.DEVNULL, a file, or None for this process's own.
    """
    args = [str(word) for word in args]
    ends, passed = [], [os.open(os.devnull, os.O_RDONLY)]
    for target, own in ((stdout, 1), (stderr, 2)):
        if target == subprocess.PIPE:
            readable, writable = os.pipe()
            ends.append(open(readable, encoding="utf-8"))
        else:
            is_file = target not in (None, subprocess.DEVNULL)
            number = target.fileno() if is_file else own
            writable = os.open(os.devnull, os.O_WRONLY) if target == subprocess.DEVNULL else os.dup(number)
            ends.append(None)
        passed.append(writable)
    here, there = socket.socketpair()
    socket.send_fds(_server(), [b"."], [*passed, there.fileno()])
    request = {
        "args": args,
        "cwd": str(cwd or os.getcwd()),
        "env": dict(os.environ if env is None else env),
        "session": start_new_session,
    }
    here.sendall(json.dumps(request).encode() + b"\n")
    for descriptor in passed:
        os.close(descriptor)
    there.close()
    return Process(args, here, int(_read_line(here)), *ends)


def run(args, *, timeout=300, **how):
    """subprocess.run([sys.executable, *args], capture_output=True, text=True, …) by way of the server."""
    process = popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@functools.cache
def _server():
    """The socket of this process's server, which ends with this process."""
    here, there = socket.socketpair()
    subprocess.Popen(
        [sys.executable, __file__, str(there.fileno())],
        pass_fds=[there.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    there.close()
    return here


def _read_line(connection):
    """Byte by byte, so that nothing of the next line is lost when the time is over."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            raise RuntimeError("the fork server has ended: see what it printed")
        line += byte
    return line


# The server.


def serve(requests):
    """Fork for each request. Returns only in the child: its connection, and stdin, stdout and stderr."""
    selector, running = selectors.DefaultSelector(), {}  # pidfd -> (pid, connection)
    selector.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not requests:
                pid, connection = running.pop(key.fileobj)
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                try:
                    connection.sendall(b"%d\n" % code)
                except OSError:
                    pass  # the test that started it is over
                connection.close()
                continue
            data, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
            if not data:
                os._exit(0)  # the test process has ended
            connection = socket.socket(fileno=descriptors.pop())
            pid = os.fork()
            if pid == 0:
                requests.close()
                selector.close()
                for pidfd, (_, other) in running.items():
                    os.close(pidfd)
                    other.close()
                return connection, descriptors
            for descriptor in descriptors:
                os.close(descriptor)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, connection
            selector.register(pidfd, selectors.EVENT_READ)


def become(connection, descriptors):
    """Make this process what the request asks for. Returns its arguments."""
    request = json.loads(_read_line(connection))
    if request["session"]:
        os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        file = io.TextIOWrapper(
            open(number, mode + "b", closefd=False),
            encoding="utf-8",
            errors="backslashreplace" if number == 2 else "strict",
            line_buffering=number == 2 or os.isatty(number),
            write_through=at_once and number > 0,
        )
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    connection.sendall(b"%d\n" % os.getpid())
    connection.close()
    return request["args"]


def run_main(args):
    """Run a script, or -m and a module, as `python *args` does, and end with its exit code."""
    module = args[0] == "-m"
    folder = os.getcwd() if module else os.path.dirname(os.path.abspath(args[0]))
    sys.path[0:1] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    sys.argv = args[1:] if module else args
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    code = 0
    try:
        if module:
            runpy._run_module_as_main(args[1])
        else:
            main.__file__ = os.path.abspath(args[0])
            with open(args[0], "rb") as file:
                program = compile(file.read(), main.__file__, "exec")
            exec(program, main.__dict__)
    except SystemExit as end:
        code = 0 if end.code is None else end.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        trace = error.__traceback__.tb_next  # without this function
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    leave(code)


def leave(code):
    """The end of a process, in Python's order, without half a second in which all modules are taken apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            code = code or 120  # as Python
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def preload():
    """Import what scripts need, and make sure that this started no thread."""
    import gc

    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401
    import yaml  # noqa: F401

    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork copies one thread, but there are {threads}"


if __name__ == "__main__":
    preload()
    run_main(become(*serve(socket.socket(fileno=int(sys.argv[1])))))
