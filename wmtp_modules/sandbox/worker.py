"""Runs jobs one at a time on two fork servers, for programs and judges, and reads the verdicts.

A verdict ``pass`` relies only on what the program cannot reach: its output compared here, or the
verdict of a judge in another sandbox while the program is alive and answers. What the program's
own side reports only distinguishes failures.
"""

import fcntl
import json
import os
import select
import signal
import socket
import time
from contextlib import ExitStack, suppress

from wmtp_modules.sandbox.contention import descendants, out_of_memory_kills, times
from wmtp_modules.sandbox.jobs import VERDICTS, FunctionJob, Limits, Outcome, StdinJob
from wmtp_modules.sandbox.preparation import prepare
from wmtp_modules.sandbox.process import NOBODY, Server, ServerLost
from wmtp_modules.sandbox.wire import STATUSES

MOST_OUTPUT = 16 << 20  # bytes
MOST_ERRORS = 64 << 20
KEPT_ERRORS = 1 << 16
TAIL = 2000  # characters
JUDGE_MEMORY_MB = 1024
MOST_WAITING = 5  # times its limit, that a program may take on a busy machine
MOST_WAITING_SECONDS = 5  # more than that
OWN_WORK = 0.9  # share of its limit that a program must have worked to be too slow beyond doubt
# Ends that others can cause, by taking threads, memory or disk that all programs share.
SHARED = ("process_limit", "output_limit")
LOOK = 0.05  # seconds between two looks at how long a program has waited
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
SIGNALS: dict[int, str] = {
    signal.SIGXCPU: "timeout",
    signal.SIGXFSZ: "output_limit",
    signal.SIGSYS: "policy",  # a system call of another architecture
}
REASONS = {
    "timeout": "still running after {seconds:g} s",
    "infrastructure": "the machine is too busy: it gave no {seconds:g} s in far longer",
    "output_limit": "more than 16 MB of output or 64 MB of errors",
    "memory": "more than {memory_mb} MB of memory",
    "process_limit": "more than 256 threads",
    "overfull": "more than 128 MB or 2,000 files in the scratch folder",
}


class Stream:
    """Collects what a program writes to a pipe, up to a limit.

    Args:
        stack: closes it.
        limit: bytes.
        kept: bytes at the end that are stored, at least.
        named: end of a named pipe (see ``Server.streams``) that no other program has open.
    """

    def __init__(
        self, stack: ExitStack, limit: int, kept: int | None = None, named: int | None = None
    ) -> None:
        if named is None:
            self._end, self.theirs = os.pipe()
            if os.getuid() == 0:
                os.fchown(self.theirs, NOBODY, NOBODY)  # may open it by the name /dev/stdout
            stack.callback(os.close, self._end)
            os.set_blocking(self._end, False)
        else:
            with suppress(BlockingIOError):  # the other end is still open somewhere
                while os.read(named, 1 << 20):  # what another program wrote and nobody wanted
                    pass
            self._end, self.theirs = named, os.open(f"/proc/self/fd/{named}", os.O_WRONLY)
        stack.callback(self.close_theirs)
        self._limit, self._kept = limit, kept or limit
        self.data = bytearray()
        self._size = 0

    def fileno(self) -> int:
        return self._end

    def close_theirs(self) -> None:
        """Call once it has been passed on; otherwise the end of the program is not seen here."""
        if self.theirs >= 0:
            os.close(self.theirs)
            self.theirs = -1

    def read(self) -> bool:
        """Read what is available; False once nobody can write any more."""
        try:
            part = os.read(self._end, 1 << 20)
        except BlockingIOError:
            return True
        self.data += part
        self._size += len(part)
        if len(self.data) > 2 * self._kept:
            del self.data[: -self._kept]
        return bool(part)

    def too_long(self) -> bool:
        return self._size > self._limit

    def tail(self) -> str:
        return self.data[-4 * TAIL :].decode("utf-8", "replace")[-TAIL:]


class Worker:
    """Runs jobs on two fork servers, one whose forks run programs and one whose forks run tests."""

    def __init__(self, programs: Server, judges: Server) -> None:
        self._programs, self._judges = programs, judges
        self.pids = programs.pid, judges.pid
        self.doubtful = False  # whether others may have caused the verdict of the last job
        self._own = descendants(self.pids)  # processes; what comes later is the program's
        self._kills = 0  # of the kernel, for want of memory, when it was prepared

    def prepare(self, tasks: int) -> None:
        """Take stock before a program that runs alone, or the first one.

        Args:
            tasks: RLIMIT_NPROC of programs.
        """
        self._programs.tasks = self._judges.tasks = tasks
        self._kills = out_of_memory_kills()

    @property
    def worn(self) -> bool:
        """Whether the last program left so much that its server does nothing but remove it."""
        return self._programs.reply is not None and self._programs.reply["worn"]

    def retire(self) -> Server:
        """Keep only the worn server; call its ``finish``."""
        self._judges.close()
        return self._programs

    def run(self, job: FunctionJob | StdinJob) -> Outcome:
        """Run a job.

        Raises:
            ServerLost: if a fork server ended or hangs; neither can be used any more.
        """
        self.doubtful = False
        return self._run_script(job) if isinstance(job, StdinJob) else self._run_functions(job)

    def close(self) -> None:
        self._programs.close()
        self._judges.close()

    def abandon(self) -> None:
        self._programs.abandon()
        self._judges.abandon()

    def _run_functions(self, job: FunctionJob) -> Outcome:
        try:
            code = prepare(job.context, job.tests)
        except (SyntaxError, ValueError) as error:
            return Outcome("infrastructure", 0.0, 0.0, f"the tests are not Python: {error}"[:TAIL])
        with ExitStack() as stack:
            output, errors = self._streams(stack)
            said = Stream(stack, MOST_OUTPUT)
            nothing = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, nothing)
            link, judge_link = socket.socketpair()
            stack.enter_context(link)
            stack.enter_context(judge_link)
            standard = [nothing, output.theirs, errors.theirs]
            source = sealed(stack, encoded(job.program))
            self._programs.start(
                request("functions", job.limits), [*standard, source, link.fileno()]
            )
            link.close()  # so the judge sees the end of the program, but not vice versa
            tests = sealed(stack, code)
            self._judges.start(
                request("judge", Limits(job.limits.seconds, JUDGE_MEMORY_MB)),
                [*[nothing] * 3, tests, judge_link.fileno(), said.theirs],
            )
            reason = self._attend(self._judges, [output, errors, said], job.limits.seconds)
            judged = self._judges.stop()
            ended_early = self._programs.reply is not None
            reply = self._programs.stop()
            reason = self._reconsider(reason, judged, [reply, judged], job.limits)
            if reason is not None or reply["excess"]:
                return failed(reason or reply["excess"], reply, job.limits)
            if not said.data:
                raise ServerLost("a judge ended without a verdict")
            verdict, detail = json.loads(bytes(said.data)).values()
            if verdict == "gone" or (verdict == "pass" and ended_early):
                verdict, detail = self._explain_end(reply, errors)
            if verdict == "pass" and reply["overused"]:
                return failed("memory", reply, job.limits)
            self.doubtful = self.doubtful or verdict in SHARED
            return outcome(verdict, reply, detail)

    def _run_script(self, job: StdinJob) -> Outcome:
        """Run case after case until one fails, by the other comparison too."""
        seconds = peak_mb = 0.0
        verdicts: dict[str, tuple[str, str]] = {}  # of the comparisons that found a failure
        comparisons = {"first": job.compare} | ({"other": job.other} if job.other else {})
        for number, (given, expected) in enumerate(job.cases, start=1):
            case, text = self._run_case(job, given)
            seconds, peak_mb = max(seconds, case.seconds), max(peak_mb, case.peak_mb)
            head = f"case {number} of {len(job.cases)}: "
            for name in comparisons.keys() - verdicts.keys():
                verdict, detail = case.verdict, case.detail
                if text is not None:
                    difference = comparisons[name](expected, text)
                    if difference is None:
                        continue
                    verdict, detail = "wrong", printable(difference)
                verdicts[name] = verdict, head + detail[-(TAIL - len(head)) :]
            if len(verdicts) == len(comparisons):
                break
        verdict, detail = verdicts.get("first", ("pass", ""))
        other = verdicts.get("other", ("pass", ""))[0] if job.other else None
        return Outcome(verdict, seconds, peak_mb, detail, other)

    def _run_case(self, job: StdinJob, given: str) -> tuple[Outcome, str | None]:
        """How a program ended, and what it wrote if it ended well."""
        with ExitStack() as stack:
            output, errors = self._streams(stack)
            self._programs.start(
                request("script", job.limits, job.input_file, job.output_file),
                [
                    *(sealed(stack, encoded(given)), output.theirs, errors.theirs),
                    sealed(stack, encoded(job.program)),
                ],
            )
            reason = self._attend(self._programs, [output, errors], job.limits.seconds)
            reply = self._programs.stop()
            reason = self._reconsider(reason, reply, [reply], job.limits)
            for descriptor in reply["descriptors"]:
                stack.callback(os.close, descriptor)
            if reason is not None or reply["excess"]:
                return failed(reason or reply["excess"], reply, job.limits), None
            if reply["status"] != 0:
                verdict, detail = self._explain_end(reply, errors)
                return outcome(verdict, reply, detail), None
            if reply["overused"]:
                return failed("memory", reply, job.limits), None
            data = bytes(output.data)
            if job.output_file is not None:
                if not reply["descriptors"]:
                    missing = f"the program wrote no file {job.output_file}"
                    return outcome("wrong", reply, missing), None
                data = os.pread(reply["descriptors"][0], MOST_OUTPUT + 1, 0)
                if len(data) > MOST_OUTPUT:
                    return failed("output_limit", reply, job.limits), None
            return outcome("pass", reply, ""), data.decode("utf-8", "replace")

    def _streams(self, stack: ExitStack) -> tuple[Stream, Stream]:
        """For what a program writes."""
        names = self._programs.streams or (None, None)
        output = Stream(stack, MOST_OUTPUT, named=names[0])
        return output, Stream(stack, MOST_ERRORS, KEPT_ERRORS, names[1])

    def _attend(self, server: Server, streams: list[Stream], seconds: float) -> str | None:
        """Read output until a server replies; returns why it must be stopped, or None."""
        for stream in streams:
            stream.close_theirs()
        began = time.monotonic()
        deadline = began + seconds
        poller = select.poll()
        by_number = {each.fileno(): each for each in (*streams, self._programs, self._judges)}
        for number in by_number:
            poller.register(number, select.POLLIN)
        while server.reply is None:
            left = max(deadline - time.monotonic(), 0)
            for number, _ in poller.poll(left * 1000):
                each = by_number[number]
                if isinstance(each, Server):
                    each.receive()
                elif not each.read():
                    poller.unregister(number)
                elif each.too_long():
                    return "output_limit"
            # Only after reading: a reply that arrived while this process waited counts.
            if left == 0 and server.reply is None:
                more, reason = self._owed(seconds, time.monotonic() - began)
                if reason:
                    return reason
                deadline = time.monotonic() + more
        for stream in streams:
            stream.read()  # a pipe never holds more than one read takes
        return "output_limit" if any(stream.too_long() for stream in streams) else None

    def _owed(self, seconds: float, elapsed: float) -> tuple[float, str | None]:
        """How much longer a program may run because it waited for its turn, or why not at all."""
        program, judge = (times(descendants([pid]) - self._own) for pid in self.pids)
        age, used, waited = max(program[0], judge[0]), program[1] + judge[1], program[2] + judge[2]
        own = (min(age, elapsed) or elapsed) - waited  # it may have waited for its start
        if own >= seconds or used >= seconds:
            return 0.0, "timeout"
        if elapsed >= MOST_WAITING * seconds + MOST_WAITING_SECONDS:
            self.doubtful = True
            return 0.0, "infrastructure"
        return min(max(seconds - own, LOOK), seconds), None

    def _reconsider(
        self, reason: str | None, ended: dict, replies: list[dict], limits: Limits
    ) -> str | None:
        """Why a program was stopped, now that the servers' replies are there."""
        if reason != "timeout":
            return reason
        if not ended["killed"]:
            return None  # it came to its end before it could be stopped
        # An endless loop has proven itself. What waited, for whatever, may have waited for others.
        worked = sum(reply["cpu"] for reply in replies)
        self.doubtful = worked < OWN_WORK * limits.seconds - LOOK
        return reason

    def _explain_end(self, reply: dict, errors: Stream) -> tuple[str, str]:
        verdict, detail = explain_end(reply["status"], errors)
        killed = os.WIFSIGNALED(reply["status"]) and os.WTERMSIG(reply["status"]) == signal.SIGKILL
        self.doubtful = killed or verdict in SHARED
        if killed and out_of_memory_kills() > self._kills:
            return "memory", f"{detail}: the machine ran out of memory"
        return verdict, detail


def request(
    role: str, limits: Limits, input_file: str | None = None, output_file: str | None = None
) -> dict:
    """A request for ``server.serve``."""
    return {
        "role": role,
        "seconds": limits.seconds,
        "memory_mb": limits.memory_mb,
        "input_file": input_file,
        "output_file": output_file,
    }


def outcome(verdict: str, reply: dict, detail: str) -> Outcome:
    return Outcome(verdict, reply["seconds"], reply["peak_kb"] / 1024, printable(detail))


def printable(detail: str) -> str:
    detail = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in detail)
    return detail.strip()[-TAIL:]


def failed(reason: str, reply: dict, limits: Limits) -> Outcome:
    """The outcome of a program that was stopped."""
    verdict = reason if reason in VERDICTS else "output_limit"
    text = REASONS[reason].format(seconds=limits.seconds, memory_mb=limits.memory_mb)
    return outcome(verdict, reply, text)


def explain_end(status: int, errors: Stream) -> tuple[str, str]:
    """Verdict and detail for a process that ended by itself."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        verdict = SIGNALS.get(number, "crash")
        end = f"killed by signal {number}"
    else:
        code = os.WEXITSTATUS(status)
        verdict = {code: verdict for verdict, code in STATUSES.items()}.get(code, "crash")
        end = f"ended with status {code}"
    return verdict, f"{errors.tail()}\nthe program's process {end}".strip()


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a model may write half a surrogate pair


def sealed(stack: ExitStack, data: bytes) -> int:
    """An immutable file in memory, to be read from the start, and open for reading only: older
    kernels map no other sealed file."""
    file = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, file)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
    os.fchmod(file, 0o444)
    readable = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    stack.callback(os.close, readable)
    return readable
