"""Programs run by another: their log, their exit status, signals."""

import os
import signal
import sys
import threading
import time

import pytest

from contract.cli import Preempted
from eval.programs import call, last_line, reason

WAITS = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(int(sys.argv[1]))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_output_goes_to_the_log_and_the_status_comes_back(tmp_path):
    log, shown = tmp_path / "log.txt", []
    script = "import sys, time; print('one'); print('two', file=sys.stderr, flush=True); time.sleep(0.5); sys.exit(3)"
    assert call([sys.executable, "-c", "print('before')"], log, shown.append) == 0
    assert call([sys.executable, "-c", script], log, shown.append) == 3
    assert {"before", "one", "two"} < set(log.read_text().splitlines())
    assert last_line(log) in ("one", "two")
    assert "two" in shown


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_a_signal_is_passed_on_and_waited_for(tmp_path, number, raised):
    log = tmp_path / "log.txt"

    def ask():
        while not (log.exists() and "ready" in log.read_text().splitlines()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    before = signal.getsignal(number)
    with pytest.raises(raised) as caught:
        call([sys.executable, "-c", WAITS, "1"], log, lambda line: None)
    assert type(caught.value) is raised
    assert last_line(log) == "saved"
    assert signal.getsignal(number) == before


def test_a_program_that_was_stopped_by_itself_stops_its_caller(tmp_path):
    with pytest.raises(Preempted):
        call([sys.executable, "-c", "raise SystemExit(75)"], tmp_path / "log.txt", lambda line: None)


def test_the_reason_is_the_error_of_the_last_program(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("$ one\nerror: the first\n$ two\nerror: the second\n  more of it\n[ERROR] return code = 2\n\n")
    assert reason(log) == "error: the second"
    log.write_text("$ one\nerror: the first\n$ two\nkilled\n")
    assert reason(log) == "killed"
