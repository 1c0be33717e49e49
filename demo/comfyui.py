"""A ComfyUI server of our own, driven as its web page does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

START_TIMEOUT_S = 300
RUN_TIMEOUT_S = 4 * 3600


class Server:
    """`main.py` in a base directory of its own; started on entry, stopped on exit.

    Attributes:
        port, url: its address, on a port that was free, or the one that was asked for.
        log: the file that takes its output.
    """

    def __init__(self, comfyui: Path, base: Path, log: Path, options: list[str], port: int = 0) -> None:
        with socket.socket() as probe:
            # As the server itself binds: a port is free again as soon as one that used it is gone.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [sys.executable, str(comfyui / "main.py"), "--port", str(self.port), "--disable-auto-launch"]
        # The database is the one thing that the base directory doesn't move.
        self._command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base / 'comfyui.db'}", *options]

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            # In a session or group of its own: a Ctrl-C is ours to handle.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
            else:
                return
        raise RuntimeError(f"ComfyUI should answer within {START_TIMEOUT_S} s, but did not. Its log: {self.log}")

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"ComfyUI should be running, but ended: {' '.join(last)}. Its log: {self.log}")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End the server at once, as a machine that goes down does."""
        self._process.kill()
        self._process.wait()

    def wait(self) -> None:
        """Serve until the server ends."""
        self._process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def nodes(self) -> dict[str, Any]:
        """Every node as the server describes it, by id.

        Raises:
            RuntimeError: the pack is not among them.
        """
        nodes: dict[str, Any] = self.get("/object_info")
        if not any(name.startswith("Slipstream") for name in nodes):
            raise RuntimeError(f"ComfyUI should have loaded the Slipstream pack, but did not. Its log: {self.log}")
        return nodes

    def post(self, path: str, data: dict[str, Any]) -> Any:
        """Post JSON, and get the answer's."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")

    def queue(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> str:
        """Queue a prompt.

        Args:
            prompt: in API format.
            workflow: the same as saved from the canvas; goes into the images, so that they open as a workflow.

        Returns:
            The prompt's id.

        Raises:
            RuntimeError: the server refused it, or a part of it: it runs what is left.
        """
        info = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        try:
            answer = self.post("/prompt", {"prompt": prompt, "extra_data": info})
        except urllib.error.HTTPError as error:
            why = refusal(json.load(error)) if error.code == 400 else str(error)
            raise RuntimeError(
                f"ComfyUI should accept the prompt, but refused it: {why}. Its log: {self.log}"
            ) from error
        if answer.get("node_errors"):
            raise RuntimeError(
                f"ComfyUI should accept the whole prompt, but refused a part: {refusal(answer)}. Its log: {self.log}"
            )
        return str(answer["prompt_id"])

    def wait_for(
        self, prompt_id: str, interval_s: float = 0.1, meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Wait for a prompt's end, and get its history entry. Asking often disturbs what it measures."""
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while time.monotonic() < deadline:
            self._check_alive()
            entry: dict[str, Any] | None = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            meanwhile()
            time.sleep(interval_s)
        raise RuntimeError(f"The prompt should end within {RUN_TIMEOUT_S} s, but did not. Its log: {self.log}")

    def result(self, entry: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The outputs of a prompt by node, and the seconds from its start to its end on the server's clock.

        Raises:
            RuntimeError: it did not succeed.
        """
        messages = dict(entry["status"]["messages"])
        if "execution_success" not in messages:
            why = messages.get("execution_error", {}).get("exception_message", "interrupted").strip()
            raise RuntimeError(f"The prompt should succeed, but failed: {why}. ComfyUI's log: {self.log}")
        began, ended = messages["execution_start"]["timestamp"], messages["execution_success"]["timestamp"]
        return entry["outputs"], (ended - began) / 1000

    def run(self, prompt: dict[str, Any], workflow: dict[str, Any]) -> tuple[str, dict[str, Any], float]:
        """Queue a prompt and wait for it: its id, its outputs by node, and its seconds."""
        prompt_id = self.queue(prompt, workflow)
        return (prompt_id, *self.result(self.wait_for(prompt_id)))


def refusal(answer: dict[str, Any]) -> str:
    """Why the server refused a prompt, in one line: what is wrong on which nodes, else with the whole."""
    wrong = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in dict(answer["node_errors"]).values()
        for error in node["errors"]
    ]
    return "; ".join(wrong) or str(answer["error"]["message"])
