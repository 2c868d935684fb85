"""Makes docs/performance.md, and the summary on the terminal, of what a run has found.

The figures come from the run, the fixed prose from `performance.md` beside this module: it is a template,
in which `{targets}`, `{machine}`, `{tables}` and `{configuration}` stand for what the run brings.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.figures import Summary, summarize
from bench.rounds import Record
from bench.targets import TARGETS, Found, Missing

TEMPLATE = Path(__file__).with_name("performance.md")

_UNITS = (
    ("_per_s", "{}/s"),
    ("_us_per_job", "{} µs a job"),
    ("_us", "{} µs"),
    ("_ms", "{} ms"),
    ("_mib", "{} MiB"),
    ("_percent", "{} % of a core"),
)
_UNSAID = ("jobs", "kept", "waiting", "seconds", "churned")


def page(record: Record) -> str:
    """Return the page of the manual."""
    parts = {
        "{targets}": "\n".join(targets(record)),
        "{machine}": _machine(record),
        "{tables}": "\n".join(_tables(record)),
        "{configuration}": "\n".join(_configuration(record)),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(name, part)
    return text


def summary(record: Record) -> str:
    """Return what to print at the end of a run."""
    lines = [*targets(record), "", *_tables(record)]
    return "\n".join(lines)


def targets(record: Record) -> list[str]:
    """Return the table of ratios; targets that this run did not measure are named below it."""
    found = Found(summarize(record.results))
    lines = ["| what, against what | target | measured | |", "| --- | --- | --- | --- |"]
    unmeasured = []
    for target in TARGETS:
        try:
            value = target.value(found)
        except Missing:
            unmeasured.append(target.what)
            continue
        sign = "≤" if target.at_most else "≥"
        unit = (
            f" {target.unit}".rstrip() if target.unit not in ("/s", "x") else target.unit.replace("x", " ×")
        )
        verdict = "" if target.met(value) else "**missed**"
        lines.append(
            f"| {target.what} | {sign} {_number(target.bound)}{unit} | {_number(value)}{unit} | {verdict} |"
        )
    if unmeasured:
        lines += ["", f"Not measured in this run: {'; '.join(unmeasured)}."]
    return lines


def _tables(record: Record) -> Iterable[str]:
    yield "| workload | of | jobs | figures (medians) | rounds | spread |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for one in summarize(record.results).values():
        yield _row(one)


def _row(one: Summary) -> str:
    figures = ", ".join(_figure(name, value) for name, value in one.figures.items() if name not in _UNSAID)
    if one.errors:
        figures = "; ".join(filter(None, (figures, f"**{len(one.errors)} failed**: {one.errors[0]}")))
    main = next((name for name in ("per_s", "done_per_s", "p50_ms") if name in one.figures), None)
    spread = f"{100 * one.spread[main]:.0f} %" if main is not None and one.rounds > 1 else ""
    rounds = f"{one.rounds}, {one.noisy} on a busy machine" if one.noisy else str(one.rounds)
    jobs = _number(one.figures["jobs"]) if "jobs" in one.figures else ""
    cells = (one.workload, one.subject, jobs, figures.replace("\n", " ").replace("|", "/"), rounds, spread)
    return f"| {' | '.join(cells)} |"


def _figure(name: str, value: float) -> str:
    if name == "per_s":
        return f"**{_number(value)}/s**"
    for ending, form in _UNITS:
        if name.endswith(ending):
            words = name.removesuffix(ending).replace("_", " ")
            return f"{words} {form.format(_number(value))}"
    return f"{name.replace('_', ' ')} {_number(value)}"


def _number(value: float) -> str:
    """Return a number as people read it.

    >>> _number(49065.0), _number(4.2), _number(0.456)
    ('49 065', '4.2', '0.46')
    """
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}".rstrip("0").rstrip(".")


def _machine(record: Record) -> str:
    about = record.about
    if "machine" not in about:
        return f"{about['when']}."
    machine, versions = about["machine"], dict(about["versions"])
    named = ", ".join(
        f"{name} {versions.pop(name)}" for name in ("taskd", "python", "postgresql") if name in versions
    )
    peers = ", ".join(f"{name} {one}" for name, one in versions.items())
    lines = [
        f"{about['when']}: {machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB, Linux "
        f"{machine['kernel']}; {named}."
    ]
    if peers:
        lines.append(f"Peers: {peers}.")
    lines += [f"{name} could not be had: {why}." for name, why in about.get("missing", {}).items()]
    return "\n".join(lines)


def _configuration(record: Record) -> Iterable[str]:
    settings = record.about.get("settings", [])
    yield f"- PostgreSQL: {', '.join(f'`{one}`' for one in settings)}; fsync, full_page_writes and"
    yield "  synchronous_commit on; each subject in a database of its own on one server."
