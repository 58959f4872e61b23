"""`infoxlm train`: runs DeepSpeed's launcher, for this machine or for the hosts of a hostfile, and forwards signals."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
import torch
import typer
from rich.console import Console

import infoxlm_ds.train as script
from infoxlm_ds.atomic import write_file
from infoxlm_ds.build import check_inputs
from infoxlm_ds.checkpoint.store import Store
from infoxlm_ds.checkpoint.tools import read_through
from infoxlm_ds.cluster.dry_run import dry_run
from infoxlm_ds.cluster.environment import LAUNCHER, ranks_here
from infoxlm_ds.cluster.hosts import SSH_OPTIONS, free_port, free_port_here, read_hostfile
from infoxlm_ds.config import Recipe, UserError
from infoxlm_ds.engine.config import check_device
from infoxlm_ds.reading import load_recipe
from infoxlm_ds.train import STOPPED_ON_REQUEST
from infoxlm_ds.trouble import complain

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
# Variables of this environment that the hosts get too. DeepSpeed's launcher itself passes on PYTHON*, on GPUs also
# NCCL*, and little else.
TRAVELS = re.compile(
    r"(PATH|LD_LIBRARY_PATH|CUDA_HOME|TMPDIR|XDG_CACHE_HOME|INFOXLM_CACHE|INFOXLM_CACHE_GB|PYTORCH\w*_ALLOC_CONF|(NCCL|GLOO|TORCH|OMP|MKL|HF|FI)_\w+)"
)
STAYS = ("HF_TOKEN",)  # all users of a host would see it in a command line


def launch(recipe_path: Path, overrides: list[str], hostfile: Path | None = None, dry: bool = False) -> int:
    """Train on every GPU of this machine; without a GPU, on two CPU ranks, if their number divides the lanes. With a
    hostfile, train on its hosts, with one rank for each slot. `dry`: only check and say what would be done. Returns the
    exit code."""
    recipe = load_recipe(recipe_path, overrides)
    if not dry and sys.stdin.isatty() and not recipe.resume.fallback and _agrees_to_fall_back(recipe):
        overrides = [*overrides, "resume.fallback=true"]
        recipe = load_recipe(recipe_path, overrides)
    slots = read_hostfile(hostfile) if hostfile else {}
    ranks = sum(slots.values()) or ranks_here(recipe.batch)
    if not slots and ranks < torch.cuda.device_count():
        print(f"using {ranks} of {torch.cuda.device_count()} GPUs: batch.lanes is {recipe.batch.lanes}")
    inputs = check_inputs(recipe, 0, ranks)  # here, so that a mistake prints one line and the launcher adds none
    if inputs.finished:
        return 0
    if not slots:
        check_device(inputs.identity.engine)
    if dry:
        dry_run(inputs, ranks, slots, Console())
        return 0
    rank_command = [script.__file__, str(recipe_path), *overrides]
    if hostfile:
        return _on_hosts(hostfile, list(slots), recipe.run, rank_command)
    print(f"starting {ranks} rank{'s' * (ranks > 1)} ...", flush=True)
    return _here(ranks, recipe.run, rank_command)


def _here(ranks: int, run: Path, rank_command: Sequence[str]) -> int:
    environment = dict(os.environ) | {LAUNCHER: str(os.getpid())}
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if torch.cuda.is_available() else ""
    # The launcher ignores CUDA_VISIBLE_DEVICES if a number of devices is given.
    chosen = ["--include", f"localhost:{','.join(visible.split(',')[:ranks])}"] if visible else []
    command = [DEEPSPEED, *(chosen or ["--num_accelerators", str(ranks)])]
    command += ["--log_level", "critical", "--master_port", str(free_port_here()), "--no_local_rank", *rank_command]

    def send(number: signal.Signals, launcher: psutil.Process) -> bool:
        """Signal only the ranks. A signal to DeepSpeed's launcher would leave them only 30 seconds to save."""
        for process in _ranks_below(launcher) or [launcher]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return True

    return _wait(command, environment, send, run)


def _ranks_below(launcher: psutil.Process) -> list[psutil.Process]:
    """The ranks that a launcher started. They may have children, such as torch's compilers."""
    found = []
    for child in launcher.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.cmdline()[1:3] == ["-u", script.__file__]:
                found.append(child)
    return found


def _on_hosts(hostfile: Path, hosts: Sequence[str], run: Path, rank_command: Sequence[str]) -> int:
    if shutil.which("pdsh") is None:
        raise UserError("pdsh, which starts the ranks on the hosts, is not installed here: install it")
    port = free_port(hosts[0])
    run.mkdir(parents=True, exist_ok=True)
    travelling = run / ".deepspeed_env"
    write_file(travelling, "".join(f"{line}\n" for line in environment_lines(os.environ)), private=True)
    keys = {"DS_ENV_FILE": str(travelling.absolute()), "PYTHONUNBUFFERED": "1"}
    keys["PDSH_SSH_ARGS_APPEND"] = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    # Without --force_multi, DeepSpeed uses this machine if the hostfile has one host.
    command = [DEEPSPEED, "--hostfile", str(hostfile), "--force_multi", "--master_port", str(port)]
    command += ["--log_level", "critical", "--no_local_rank", *map(_for_a_shell, rank_command)]
    plain = " ".join([*(f"{key}={shlex.quote(value)}" for key, value in keys.items()), *map(shlex.quote, command)])
    print(plain, flush=True)

    ranks = re.escape(" ".join([sys.executable, "-u", *rank_command])).replace("%", "%%")

    def send(number: signal.Signals, launcher: psutil.Process) -> bool:
        """Signal only the ranks: DeepSpeed's launcher on each host waits for them."""
        ask = ["pdsh", "-S", "-f", "1024", "-w", ",".join(hosts), f"pkill -{number} -f {shlex.quote('^' + ranks)}"]
        return subprocess.run(ask, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 0

    environment = dict(os.environ) | keys | {"PDSH_RCMD_TYPE": "ssh"}
    return _wait(command, environment, send, run)


def environment_lines(environment: Mapping[str, str]) -> list[str]:
    """NAME=VALUE lines for DeepSpeed: a host's shell exports them before it starts ranks. Lines of the user's own
    `.deepspeed_env` (in the home folder, then here) come last and win."""
    chosen = {k: v for k, v in environment.items() if TRAVELS.fullmatch(k) and k not in STAYS and "\n" not in v}
    lines = [f"{name}={_in_double_quotes(value)}" for name, value in sorted(chosen.items())]
    for folder in (Path.home(), Path()):
        own = folder / environment.get("DS_ENV_FILE", ".deepspeed_env")
        if own.is_file():
            written = [line.strip() for line in own.read_text(encoding="utf-8").splitlines()]
            lines += [line for line in written if "=" in line and not line.startswith("#")]
    return lines


def _in_double_quotes(value: str) -> str:
    """Escape a value of a variable. DeepSpeed puts it in double quotes for the remote shell and escapes nothing; pdsh
    replaces %h."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def _for_a_shell(word: str) -> str:
    """Quote a word so that the remote shell gets it unchanged through DeepSpeed's launcher. The launcher puts a word
    with a space in double quotes and escapes double quotes inside; pdsh replaces %h."""
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def _wait(
    command: Sequence[str],
    environment: Mapping[str, str],
    send: Callable[[signal.Signals, psutil.Process], bool],
    run: Path,
) -> int:
    """Run a launcher and return the exit code. Forwards SIGINT, SIGTERM and SIGHUP to the ranks: calls `send` until it
    returns True. A second SIGINT kills all of them: what they were saving does not count."""
    # In a session of its own, the launcher does not get ^C from the terminal.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    requested, delivered = False, True

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal requested, delivered
        if requested and number == signal.SIGINT:
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                send(signal.SIGKILL, psutil.Process(process.pid))
                for child in reversed(children):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            complain("stopped at once")
            os._exit(128 + signal.SIGINT)
        if not requested:
            print("\nsaving, then stopping (^C again: at once, without a save)", flush=True)
        requested, delivered = True, False

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    code = None
    while code is None:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=1)
        if code is None and not delivered:
            with suppress(psutil.NoSuchProcess):
                delivered = send(signal.SIGTERM, psutil.Process(process.pid))
    for number, handler in before.items():  # the demo goes on with an export
        signal.signal(number, handler)
    if requested and code in (-signal.SIGTERM, 256 - signal.SIGTERM):  # stopped before the ranks had anything to save
        return STOPPED_ON_REQUEST
    if code < 0 or code > 128:
        _tell_of_silent_death(256 - code if code > 128 else -code, run)
    return code if code in (0, 2, STOPPED_ON_REQUEST) else 1  # a rank that died by a signal gives other codes


def _tell_of_silent_death(number: int, run: Path) -> None:
    """If all ranks died by a signal, none of them can say so."""
    if any((run / "failures").glob("*")):
        return
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"exit code {256 - number}"
    cause = {
        "SIGABRT": "on GPUs, NCCL ends ranks that wait longer than timeout.step for another one: see its lines above",
        "SIGKILL": "if memory ran out, the kernel's log says so",
    }.get(name, "see their lines above")
    complain(f"the ranks died without a message ({name}): {cause}. {Store(run).advice()}")


def _agrees_to_fall_back(recipe: Recipe) -> bool:
    """Ask the user, if the newest checkpoint is damaged and there is an older one."""
    store = Store(recipe.run)
    newest = store.latest()
    older = [path for path in store.steps() if path != newest]
    if newest is None or not older:
        return False
    damage = read_through(newest, Console(stderr=True))
    return bool(damage) and typer.confirm(f"{newest}: {damage}.\nGo on from {older[-1].name} instead?")
