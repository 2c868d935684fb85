"""The verdict of every run: by what its child says, or by what befell the child. Exactly one each."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence

import msgspec

from taskd import wire
from taskd.engine.children import Child, Run
from taskd.engine.offspring import Parent
from taskd.engine.settler import Settler
from taskd.engine.slots import Slots
from taskd.errors import Refused
from taskd.model import verdict as decide
from taskd.model.jobtype import TypeInfo
from taskd.model.state import Cause, State
from taskd.model.verdict import Case, Verdict
from taskd.process.family import Exit
from taskd.store.leases import Claimed, Completion, Own, Settlement

log = logging.getLogger("taskd.engine.judge")


class Judge:
    """Turns the ends of runs into what the settler writes, and frees their slots."""

    def __init__(
        self,
        infos: Mapping[str, TypeInfo],
        slots: Slots,
        settler: Settler,
        dice: random.Random,
        *,
        max_crashes: int,
    ) -> None:
        self._infos = infos
        self._slots = slots
        self._settler = settler
        self._dice = dice
        self._max_crashes = max_crashes

    def finish(self, run: Run, message: wire.Finished, now: float) -> None:
        """Settle what a child says of the end of a run."""
        job = run.job
        ran_ms = int((now - run.started_at) * 1000) if run.started_at else None
        if message.outcome == "completed":
            self._slots.release(job.type, ran_ms or 0)
            completion = Completion(job.id, job.claim, bytes(message.result).decode(), ran_ms or 0)
            if message.submits:
                bodies = [bytes(body) for body in message.submits]
                self._settler.complete_with_jobs(job.type, Parent(completion, job, bodies))
            else:
                self._settler.complete(job.type, completion)
            return
        outcome = message.outcome
        if run.asked is Cause.TIMEOUT and outcome in ("cancelled", "error"):
            outcome = "timeout"
        if run.asked is Cause.INTERRUPTED and not message.started:
            self.close(run, decide.put_back(run.case))
            return
        if run.asked is Cause.INTERRUPTED and outcome in ("cancelled", "interrupted"):
            self.close(run, decide.interrupted(run.case, run.info, error="stopped at drain"), message, ran_ms)
            return
        if run.asked is Cause.LEASE_EXPIRED and outcome != "dropped":
            verdict = self._died(run, Cause.LEASE_EXPIRED, "this node lost its lease")
            self.close(run, verdict, message, ran_ms)
            return
        if outcome == "interrupted":
            outcome = "dropped"
        error = message.error
        if outcome == "timeout" and not error:
            error = f"did not end within its timeout of {run.timeout_s:g} s"
        verdict = decide.reported(
            outcome, run.case, run.info, self._dice, error=error, delay_s=message.delay_s
        )
        self.close(run, verdict, message, ran_ms)

    def completed(self, runs: Sequence[Run | None], results: Sequence[msgspec.Raw], now: float) -> None:
        """Settle runs that completed and left nothing but these results, side by side."""
        for run, result in zip(runs, results, strict=True):
            if run is not None:
                job = run.job
                ran_ms = int((now - run.started_at) * 1000) if run.started_at else 0
                self._slots.release(job.type, ran_ms)
                self._settler.complete(
                    job.type, Completion(job.id, job.claim, bytes(result).decode(), ran_ms)
                )

    def barren(self, type_: str, parent: Parent, error: Refused) -> None:
        """Settle a run whose handler ended well but whose further jobs can't be stored: it failed."""
        info = self._infos[type_]
        job = parent.job
        case = Case(
            attempts=job.attempts, max_attempts=job.max_attempts, crashes=job.crashes, alone=job.alone
        )
        text = f"a job that it submitted can't be stored: {error}"
        verdict = decide.reported("error", case, info, self._dice, error=text, delay_s=None)
        self._write_down(job, verdict, None, parent.completion.ran_ms)

    def undone(self, own: Own) -> None:
        """Settle a run that ended and stands in the queue again as if it had not: its verdict is lost."""
        case = Case(
            attempts=own.attempts, max_attempts=own.max_attempts, crashes=own.crashes, alone=own.alone
        )
        error = "its verdict was lost: a failover to a standby that had not seen it"
        verdict = decide.interrupted(case, self._infos[own.type], error=error)
        self._write_down(own, verdict, None, None)

    def close(
        self,
        run: Run,
        verdict: Verdict,
        message: wire.Finished | None = None,
        ran_ms: int | None = None,
        exit: Exit | None = None,
    ) -> None:
        """Settle a run by `verdict`; its slot is free."""
        self._slots.release(run.job.type, ran_ms)
        self._write_down(run.job, verdict, exit or message, ran_ms)

    def _write_down(
        self, job: Claimed | Own, verdict: Verdict, end: Exit | wire.Finished | None, ran_ms: int | None
    ) -> None:
        self._settler.settle(
            job.type,
            Settlement(
                id=job.id,
                claim=job.claim,
                status=None if verdict.status is None else str(verdict.status),
                delay_ms=round(verdict.delay_s * 1000),
                counts=verdict.counts,
                cause=None if verdict.cause is None else str(verdict.cause),
                error=verdict.error,
                result=None,
                ran_ms=ran_ms,
                exit_code=None if end is None else end.code if isinstance(end, Exit) else end.exit_code,
                signal=None if end is None else end.signal,
                cpu_s=None if end is None else end.cpu_s,
                max_rss=None if end is None else end.max_rss,
                crashes=verdict.crashes,
                alone=verdict.alone,
            ),
        )
        if verdict.status is State.FAILED:
            extra = {"job_id": job.id, "type": job.type, "cause": str(verdict.cause), "error": verdict.error}
            log.info("job failed", extra=extra)

    def bury(self, child: Child, exit: Exit) -> None:
        """Give a verdict to all runs of a dead child."""
        now = time.monotonic()
        runs, child.runs = list(child.runs.values()), {}
        started = [run for run in runs if run.started_at]
        guilty = [run for run in started if run.killed is not None]
        for run in runs:
            ran_ms = int((now - run.started_at) * 1000) if run.started_at else None
            self.close(run, self._fate(run, started, guilty, exit), None, ran_ms, exit)

    def _fate(self, run: Run, started: list[Run], guilty: list[Run], exit: Exit) -> Verdict:
        if not run.started_at:
            return decide.put_back(run.case)
        if run.killed is Cause.TIMEOUT:
            error = f"did not end within its timeout of {run.timeout_s:g} s and {run.info.grace:g} s of grace"
            return decide.reported("timeout", run.case, run.info, self._dice, error=error, delay_s=None)
        if run.killed is Cause.LEASE_EXPIRED:
            return self._died(run, Cause.LEASE_EXPIRED, "this node lost its lease")
        if run.killed is Cause.INTERRUPTED:
            return decide.interrupted(run.case, run.info, error="stopped at drain")
        if run.killed is Cause.OOM:
            return self._died(
                run,
                Cause.OOM,
                f"its process took more memory than max_memory allows ({run.info.max_memory} bytes)",
            )
        if guilty:
            return decide.interrupted(run.case, run.info, error="a neighbour in its process was killed")
        if len(started) > 1:
            error = f"its process died ({exit}) with {len(started)} jobs in it"
            return decide.interrupted(run.case, run.info, error=error, alone=True)
        return self._died(run, Cause.CRASHED, f"its process died: {exit}")

    def _died(self, run: Run, cause: Cause, error: str) -> Verdict:
        return decide.died(cause, run.case, run.info, error=error, max_crashes=self._max_crashes)
