"""Starts an agent on each host over ssh, or one on this machine, and asks them questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infoxlm_ds.cluster.hosts import last_words, python_there

AGENT = ("-m", "infoxlm_ds.cluster.doctor.agent")


class NoAnswer(Exception):
    """Why a host gave no answer."""


class Agent:
    """The agent process of one host. `host`: None for this machine."""

    def __init__(self, host: str | None) -> None:
        command = [sys.executable, *AGENT] if host is None else python_there(host, *AGENT)
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe would block if nobody reads it
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True)

    def ask(self, question: str, seconds: float, arguments: Mapping[str, Any]) -> Any:
        """Ask a question and return the answer. NoAnswer if there is none within `seconds`, or if it is an error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(seconds, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps({"question": question, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = next(
                (line for line in self._process.stdout if line.startswith("{")), ""
            )  # other lines come from the shell
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if not line:
            raise NoAnswer(self._last_words(seconds))
        answer = json.loads(line)
        if "error" in answer:
            raise NoAnswer(answer["error"])
        return answer["value"]

    def _last_words(self, seconds: float) -> str:
        code = self._process.wait()
        if code < 0:
            return f"no answer within {seconds:g} seconds"
        self._stderr.seek(0)
        return last_words(self._stderr.read(), code)

    def close(self) -> None:
        """End the agent."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


class Crew:
    """The agents of all hosts."""

    def __init__(self, hosts: list[str | None]) -> None:
        self._pool = ThreadPoolExecutor(max(1, len(hosts)))
        self._agents = {host or os.uname().nodename: Agent(host) for host in hosts}
        self.hosts = list(self._agents)

    def ask(
        self, question: str, arguments: Mapping[str, Mapping[str, Any]] | None = None, seconds: float = 60
    ) -> dict[str, Any]:
        """Ask the hosts in `arguments`, or all hosts, at the same time. Returns each host's answer or its NoAnswer."""
        asked = arguments if arguments is not None else {host: {} for host in self.hosts}
        answers = {host: self._pool.submit(self._agents[host].ask, question, seconds, asked[host]) for host in asked}
        return {host: answer.exception() or answer.result() for host, answer in answers.items()}

    def dismiss(self, hosts: list[str]) -> None:
        """End the agents of these hosts, and ask them nothing more."""
        for host in hosts:
            self._agents.pop(host).close()
            self.hosts.remove(host)

    def close(self) -> None:
        """End all agents."""
        self.dismiss(list(self.hosts))
        self._pool.shutdown()
