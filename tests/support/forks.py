"""Python processes that tests start are forks of one that has imported torch and transformers.

Starting `python -c "import torch, transformers"` takes 3 to 5 seconds of processor time, a fork 0.1. So conftest.py
calls `use_forks()`: from then on `subprocess.run([sys.executable, ...])` and `Popen` fork, in tests as well as in the
code that they test (the process that verifies a package, the checkpoint worker). What the new process sees is as in an
interpreter of its own: arguments, environment, working folder, `sys.path`, standard streams, a fresh `__main__`,
limits, signals, exit status. Only what `IMPORTED` lists is imported in it: not this project. Processes that it starts
are forks, too. One server forks for the whole run; it imports when the first process is started.

Everything else is started as ever: other programs, flags of the interpreter that are not in `FLAGS`, `shell=True`,
`preexec_fn`, `python -m pytest`; and all of a test that is marked `@pytest.mark.own_interpreter`, for where it matters
what an interpreter imports or how long it takes to start.

A function instead of a script: `in_fork(function, *arguments)` runs it in a process forked from one that has imported
this project and conftest.py as well; it returns what the function returns, and raises what it raises.
"""

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

IMPORTED = (
    "torch.utils.checkpoint",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.utils",
    "transformers.dynamic_module_utils",
    "transformers.tokenization_utils_fast",
    "safetensors.torch",
    "huggingface_hub.hf_api",
    "accelerate.hooks",
)
FLAGS = {"-I", "-B", "-u", "-E", "-s", "-P"}  # of the interpreter; -I and -P change what is imported from where
AT_START = {"PYTHONIOENCODING", "PYTHONWARNINGS", "PYTHONUTF8", "LC_ALL"}  # variables that only a new interpreter reads
ADDRESS = "GPT2_VALUE_TESTS_FORKS"  # the variable that says where the server listens
REAL = subprocess.Popen


def use_forks(*, in_this_process=True):
    """Let `subprocess` fork; called by the process that starts the tests, and by its xdist workers."""
    if ADDRESS not in os.environ:
        name = f"gpt2-value-tests-{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{name}")  # an address of Linux, without a file
        listener.listen(64)
        command = [sys.executable, "-I", __file__, str(listener.fileno())]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        clean["OMP_NUM_THREADS"] = "1"
        # It ends when its standard input does: with this process, however that ends.
        server = REAL(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], env=clean)
        listener.close()  # the server has its own
        atexit.register(lambda: (server.kill(), server.wait()))
        os.environ[ADDRESS] = name
    if in_this_process:
        subprocess.Popen = Forked


def in_fork(function, *arguments):
    """What `function(*arguments)` returns in another process, forked from one that has imported this project."""
    from concurrent.futures import ProcessPoolExecutor

    from support.two_processes import PRELOADED

    multiprocessing.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *arguments).result()


class Forked(subprocess.Popen):
    """`subprocess.Popen` whose Python processes are forks of the server."""

    _connection = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        # startupinfo, creationflags, shell, then the ends of three pipes; the child's are the first, fourth and sixth
        shell, (stdin, _, _, stdout, _, stderr) = rest[2], rest[3:9]
        plain = isinstance(args, (list, tuple)) and not (executable or preexec_fn or pass_fds or shell)
        order = _order([os.fspath(argument) for argument in args]) if plain else None
        if order is None or ADDRESS not in os.environ or AT_START & set(env or ()):
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        order["env"] = {name: os.fspath(value) for name, value in (os.environ if env is None else env).items()}
        order["cwd"] = os.path.abspath(os.fspath(cwd or "."))
        order["parent"], order["group"] = os.getpid(), rest[14]  # start_new_session
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(f"\0{os.environ[ADDRESS]}")
        message = json.dumps(order).encode()
        streams = [given if given != -1 else own for own, given in enumerate((stdin, stdout, stderr))]
        socket.send_fds(self._connection, [len(message).to_bytes(4, "big")], streams)
        self._connection.sendall(message)
        self._close_pipe_fds(*rest[3:9])
        self.pid = int.from_bytes(_receive(self._connection, 4), "big")
        self._child_created = True

    def _try_wait(self, wait_flags):
        if self._connection is None:
            return super()._try_wait(wait_flags)
        self._connection.setblocking(not wait_flags & os.WNOHANG)
        try:
            status = int.from_bytes(_receive(self._connection, 4), "big")
        except BlockingIOError:
            return 0, 0
        self._connection.close()
        return self.pid, status

    def _internal_poll(self, *args, **kwargs):
        if self._connection is None:
            return super()._internal_poll(*args, **kwargs)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self._connection.fileno() >= 0:  # otherwise another thread has waited since, or this is garbage
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _order(args):
    """What a command of this interpreter runs; None where that is for an interpreter of its own."""
    if not args or args[0] != sys.executable:
        return None
    flags, rest = [], list(args[1:])
    while rest and rest[0] in FLAGS:
        flags.append(rest.pop(0))
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-c", "-m")) or rest[:2] == ["-m", "pytest"]:
        return None
    return {"isolated": "-I" in flags, "safe_path": "-P" in flags, "command": rest}


def _receive(connection, size):
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise RuntimeError("the process from which the tests fork has ended; read what it printed")
        found += part
    return found


# The server


def serve(listener):
    """Fork for each connection, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who attend
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    is_ready = False
    while 0 not in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if not is_ready:
            is_ready = True
            for name in IMPORTED:
                with contextlib.suppress(ImportError):  # of other versions, or not installed
                    importlib.import_module(name)
            gc.collect()
            gc.freeze()  # so that children do not copy what they never change
        if os.fork() == 0:
            listener.close()
            _attend(connection)
        connection.close()


def _attend(connection):
    """Fork, and tell who is connected the process id, and at the end the status."""
    head, streams, *_ = socket.recv_fds(connection, 4, 3)
    order = json.loads(_receive(connection, int.from_bytes(head, "big")))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        connection.close()
        try:
            _become(order, streams)
        finally:
            os._exit(70)
    if order["group"]:  # a signal to its group, as Jupyter sends one, is not for the tests
        os.setpgid(child, child)
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):  # whoever started it is gone
        connection.sendall(child.to_bytes(4, "big"))
        connection.sendall(os.waitpid(child, 0)[1].to_bytes(4, "big"))
    os._exit(0)


def _become(order, streams):
    """Run a command as an interpreter of its own would, and exit as that would."""
    for own, given in enumerate(streams):
        os.dup2(given, own)
        os.close(given)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(own, "w" if own else "r", closefd=False) for own in range(3))
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()
    os.getppid = lambda: order["parent"] if _is_alive(order["parent"]) else 1
    os.chdir(order["cwd"])
    _take_environment(order["env"])
    subprocess.Popen = Forked
    kind, *arguments = order["command"]
    searched = [path for path in order["env"].get("PYTHONPATH", "").split(":") if path and not order["isolated"]]
    if not (order["isolated"] or order["safe_path"]):
        searched.insert(0, {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(os.path.abspath(kind))))
    sys.path[:0] = searched
    sys.argv = [kind, *arguments[1:]] if kind == "-c" else arguments if kind == "-m" else [kind, *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code = 1
    try:
        if kind == "-c":
            exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
        elif kind == "-m":
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _take_environment(env):
    """Set it, and read again what libraries read of it when they were imported."""
    os.environ.clear()
    os.environ.update(env)
    hub, transformers = map(importlib.import_module, ("huggingface_hub.constants", "transformers.utils.hub"))
    before = {**vars(hub), "HF_MODULES_CACHE": transformers.HF_MODULES_CACHE}
    importlib.reload(hub)
    modules = env.get("HF_MODULES_CACHE", os.path.join(hub.HF_HOME, "modules"))
    after = {**vars(hub), "HF_MODULES_CACHE": modules}
    changed = {name: value for name, value in after.items() if name.isupper() and before[name] != value}
    for module in [m for name, m in sys.modules.items() if name.startswith(("huggingface_hub.", "transformers."))]:
        for name, value in changed.items():
            if name in vars(module) and vars(module)[name] == before[name]:
                setattr(module, name, value)
    sys.modules["huggingface_hub.hf_api"].api.endpoint = hub.ENDPOINT
    level = transformers.logging.log_levels.get(env.get("TRANSFORMERS_VERBOSITY", "warning"))
    transformers.logging.set_verbosity(level)
    transformers.logging._tqdm_active = not hub.HF_HUB_DISABLE_PROGRESS_BARS


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
