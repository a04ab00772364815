"""Run by ``test_sandbox.py`` as an ordinary user with the system's Python; prints what it saw."""

import os
import sys

from wmtp_modules.sandbox.jobs import FunctionJob, StdinJob
from wmtp_modules.sandbox.pool import Sandbox

OUTSIDE = """
worked = []
for folder in ("/tmp", "/var/tmp", "/dev/shm", "/", ".."):
    try:
        open(folder + "/escaped-as-nobody", "w").close()
        worked.append(folder)
    except OSError:
        pass
print(worked or "held")
"""
TESTS = "assert f(2) == 4"
heard = []
with Sandbox(sys.argv[1], 1) as sandbox:
    jobs = (
        FunctionJob("def f(x): return x * x", TESTS),
        FunctionJob("class E:\n    def __eq__(s, o): return True\ndef f(x): return E()", TESTS),
        FunctionJob("import socket\nsocket.create_connection(('127.0.0.1', 80))", TESTS),
        FunctionJob("import os\nos.fork()", TESTS),
    )
    verdicts = [outcome.verdict for _, outcome in sandbox.run(enumerate(jobs))]
    outside = StdinJob(OUTSIDE, (("", "held"),), lambda expected, actual: heard.append(actual))
    list(sandbox.run([(0, outside)]))
    print(os.getuid(), sandbox.tier, *verdicts, *heard)
