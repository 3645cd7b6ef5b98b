"""A process that has imported everything and forks the runs that the tests kill: seconds saved a run.

    python tests/kill/server.py

Reads one request a line (JSON) from stdin, forks a child that trains, kills it where the request says, and answers with
one line: {"status": -9, "events": [[seconds, phase], ...], "in_time": true}. `client.py` speaks to it. It must never run
a backward pass itself, because autograd does not work in children of a process that has.
"""

import faulthandler
import gc
import json
import os
import select
import signal
import sys
import threading
import time
import traceback

from runs import TASKS, warm_up  # imports torch, transformers and the package
from tqdm import tqdm

TIME_LIMIT = 120.0  # seconds a child may take; a deadlock is a failure, not a wait


def run_child(request: dict, progress: int) -> None:
    """In the child: do the task, with everything it says in a log file."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tqdm.set_lock(threading.RLock())  # the parent's may be held at the moment of the fork
    faulthandler.dump_traceback_later(0.9 * request.get("time_limit", TIME_LIMIT), file=log)
    status = 1
    try:
        TASKS[request["task"]](request, lambda phase: os.write(progress, f"{phase}\n".encode()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch_child(child: int, progress: int, kill: dict | None, time_limit: float) -> dict:
    """In the parent: note what the child reports, and send the signal at the moment asked for."""
    start, events, seen, due, sent, text, in_time = time.monotonic(), [], 0, None, False, b"", True
    while True:
        now = time.monotonic()
        if due is not None and now >= due and not sent:
            os.kill(child, kill.get("signal", signal.SIGKILL))
            sent = True
        if in_time and now - start > time_limit:
            os.kill(child, signal.SIGKILL)
            in_time = False
        wait = 0.5 if due is None or sent else max(0.0, due - now)
        if not select.select([progress], [], [], wait)[0]:
            continue
        read = os.read(progress, 65536)
        if not read:
            break
        *lines, text = (text + read).split(b"\n")
        for line in lines:
            events.append([time.monotonic() - start, line.decode()])
            if kill is not None and line.decode() == kill["phase"] and due is None:
                seen += 1
                if seen == kill["occurrence"]:
                    due = time.monotonic() + kill["delay"]
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "events": events, "in_time": in_time}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Its default lock is shared across forks: a child killed while it draws would stop the bars of all later ones
    tqdm.set_lock(threading.RLock())
    warm_up()
    gc.freeze()  # children collect garbage several times, but not what is here
    for line in sys.stdin:
        request = json.loads(line)
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            run_child(request, write_end)
        os.close(write_end)
        answer = watch_child(child, read_end, request.get("kill"), request.get("time_limit", TIME_LIMIT))
        os.close(read_end)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
