"""Every way to stop the launcher leaves the machine as it was."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import alive, launch, session, start

pytestmark = pytest.mark.e2e


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launchers look elsewhere for what others have left. Sockets will be there, whose paths have to be short."""
    with tempfile.TemporaryDirectory(prefix="sl-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield


def stop_during(process: subprocess.Popen[str], step: str) -> tuple[int, str]:
    """Send one SIGINT once the checklist has passed `step`; the exit status and all of the output.

    A signal inside the console's write makes it print that line again.
    """
    lines: list[str] = []
    sent = False
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not sent and re.search(rf"✓ {step} ", line):
                process.send_signal(signal.SIGINT)
                sent = True
        return process.wait(60), "".join(lines)


@pytest.mark.usefixtures("alone")
def test_ray_keeps_to_the_loopback_address_and_what_a_killed_launcher_leaves_goes_with_the_next_start(
    folder: Path,
) -> None:
    """Which Ctrl-C ends during its start-up: that is one stopped step, and claims nothing."""
    killed = start(folder, "--colocated")
    agents = [p for p in killed.tree if p.cmdline()[0].startswith("ray::") and p.cmdline()[0].endswith("Agent")]
    listens = {c.laddr.ip for p in agents for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    processes, where = killed.tree, session(killed)
    with killed.process:
        killed.process.kill()
    assert where.exists()
    status, text = stop_during(launch(folder), "ray")
    assert agents
    assert listens <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert not where.exists()
    assert alive(processes) == []
    assert status == 128 + signal.SIGINT
    assert re.search(r"✗ \S+ +\d.*stopped", text)
    for word in ("✓ ready", "Serving", "Draining", "Traceback", "Aborted"):
        assert word not in text


def test_ctrl_c_before_ray_ends_at_once_in_a_line(folder: Path) -> None:
    status, text = stop_during(launch(folder), "model")
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in text
    assert "Aborted" not in text
    assert "✓ ray" not in text
