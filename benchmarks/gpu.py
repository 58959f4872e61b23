"""Runs the tests that need a GPU, measures training on one GPU, and writes one report, in less than ten minutes.
`make gpu`, or `python -m benchmarks.gpu`; docs/performance.md says what it measures.

Every part of the report has a process and a time limit of its own, so none can take the others with it. The exit code
is 1 if anything failed, and 2 if there is no GPU. `--device cpu --tiny` runs everything with small sizes on a CPU, to
check the program itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu_report import FAILED, Part, quoted

ROOT = Path(__file__).parent.parent
SECTION_FAILED = 3  # exit code of a part whose report says so already
LINES_OF_TESTS = 40
# Seconds of each part; together less than ten minutes. The function that writes it: `write` of the module.
PARTS = {
    "tests": ("", 130),
    "text": ("benchmarks.gpu_text", 90),
    "base": ("benchmarks.gpu_steps", 125),
    "large": ("benchmarks.gpu_steps", 105),
    "peers": ("benchmarks.gpu_peers", 95),
    "contrast": ("benchmarks.gpu_contrast", 30),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=ROOT / "runs" / "gpu" / "report.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--corpus", type=Path, help="a prepared one; default: blocks of the corpus in this repository")
    parser.add_argument("--only", choices=PARTS, action="append", help="write this part only; may be repeated")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)  # this process is that part's
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"infoxlm: torch {torch.__version__} finds no GPU on this machine", file=sys.stderr)
        return 2
    if options.inside:
        return _inside(options)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(_heading(options.device), encoding="utf-8")
    failed = [name for name in options.only or PARTS if not _run(name, options)]
    with options.report.open("a", encoding="utf-8") as report:
        report.write(f"\n## Result\n\n{'Failed: ' + ', '.join(failed) if failed else 'Nothing failed.'}\n")
    print(options.report.read_text(encoding="utf-8"))
    return 1 if failed else 0


def _inside(options: argparse.Namespace) -> int:
    """Write one part of the report."""
    if options.device == "cuda":
        torch.cuda.set_device(0)
    module, limit = PARTS[options.inside]
    corpus = options.corpus or ROOT / "runs" / "benchmarks" / "corpus-blocks-254"
    until = time.monotonic() + 0.9 * limit
    part = Part(options.report, torch.device(options.device), options.tiny, corpus, until)
    import_module(module).write(part, options.inside)
    return SECTION_FAILED if part.failed else 0


def _run(name: str, options: argparse.Namespace) -> bool:
    """Run a part in its own process. Writes why it ended if it could not. Returns whether nothing failed."""
    limit, log, started = PARTS[name][1], options.report.with_name(f"{name}.log"), time.monotonic()
    print(f"{name}: at most {limit} s, output in {log}", flush=True)
    code = _ended(_command(name, options), options.device, log, limit)
    said = log.read_text(encoding="utf-8", errors="replace")
    lines = []
    if name == "tests":
        lines = ["", "## Tests marked gpu", "", FAILED if code else "", *quoted(said, LINES_OF_TESTS)]
    elif code not in (0, SECTION_FAILED):
        why = f"it did not end within {limit} s" if code is None else f"it ended with code {code}"
        lines = ["", f"{FAILED} {name}: {why}", *quoted(said)]
    lines.append(f"({name} took {time.monotonic() - started:.0f} s)")
    with options.report.open("a", encoding="utf-8") as report:
        report.write("\n".join(lines) + "\n")
    return code == 0


def _command(name: str, options: argparse.Namespace) -> list[str]:
    if name == "tests":
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--device", options.device, "--durations=5"]
        command += ["-k", "queue"] * options.tiny
        return command + sorted(map(str, ROOT.glob("tests/*/*_gpu.py")))  # other tests may need what is not installed
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--report", str(options.report.resolve())]
    command += ["--device", options.device, *["--tiny"] * options.tiny]
    return command + (["--corpus", str(options.corpus.resolve())] if options.corpus else [])


def _ended(command: list[str], device: str, log: Path, limit: float) -> int | None:
    """Run a command with its output in a log. Returns its exit code; None if it did not end in time."""
    environment = os.environ | {"DS_ACCELERATOR": device, "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()


def _heading(device: str) -> str:
    """What the figures depend on."""
    lines = ["# Training on a GPU", ""]
    if device == "cuda":
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        lines += [f"- {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.major}.{gpu.minor}" for gpu in found]
    else:
        lines.append("- a CPU: the figures mean nothing")
    lines.append(f"- Python {sys.version.split()[0]}, CUDA {torch.version.cuda}, {os.cpu_count()} cores")
    for package in ("torch", "triton", "deepspeed", "transformers", "flash_attn"):
        try:
            lines.append(f"- {package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"- {package}: not installed")
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, check=False)
    lines.append(f"- commit {revision.stdout.decode().strip() or 'unknown'}; one rank on one GPU")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
