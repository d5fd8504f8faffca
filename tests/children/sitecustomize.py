"""What every Python that a test starts does first. Most of a test's time is the imports of torch and transformers."""

import atexit
import gc
import os
import sys

# Only the tests need scikit-learn: no user has it, and transformers loads it for a second where it is installed.
sys.modules["sklearn"] = None  # type: ignore[assignment]
# As cli.relax_collector does, for llamafactory-cli as well.
gc.set_threshold(100_000, 50, 50)
atexit.register(gc.freeze)

SCRIPTS = ("llamafactory-cli", "train.py", "without_checks.py", "score_trajectories.py", "evaluate_judge.py")
MODULES = ("prmkit.training.preflight", "prmkit.dataset.lengths")
"""The programs that import LLaMA Factory or torch."""


def hand_over(address: str) -> None:
    """Let a fork of `preloaded.py` be this process: same folder, environment, streams, signals and exit code."""
    import json
    import signal
    import socket
    from pathlib import Path

    command = sys.orig_argv[1:]
    if not (Path(command[0]).name in SCRIPTS or (command[0] == "-m" and command[1] in MODULES)):
        return
    request = {"command": command, "cwd": str(Path.cwd()), "env": dict(os.environ), "path": sys.path,
               "parent": os.getppid()}  # fmt: skip
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        died_of = [signal.SIGKILL]

        def pass_on(number, frame):
            died_of[0] = number
            connection.sendall(bytes([number]))

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        code = connection.recv(1)
    if not code:
        if died_of[0] != signal.SIGKILL:
            signal.signal(died_of[0], signal.SIG_DFL)
        os.kill(os.getpid(), died_of[0])
    os._exit(code[0])


if (address := os.environ.get("PRMKIT_TESTS_PRELOADED")) and sys.orig_argv[1:]:
    hand_over(address)
