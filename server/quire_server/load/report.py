"""A load's figures as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple

from quire_server.load.figures import LATENCIES, Report


def told(report: Report) -> Iterator[str]:
    """Lines about the load as a whole."""
    failed = report.num_requests - report.num_answered
    yield f"requests    {report.num_requests} sent, {report.num_answered} answered, {failed} failed"
    for kind, count in report.errors.items():
        yield f"  failed    {count} by {kind}"
    yield f"tokens      {report.num_prompt_tokens:,} in, {report.num_output_tokens:,} out"
    rates = f"{report.request_rate:.2f} requests/s, {report.output_token_rate:,.1f} output tokens/s"
    yield f"throughput  {rates}, over {report.duration_s:.2f} s"
    if report.objectives:
        limits = ", ".join(f"{name} <= {limit * 1000:g} ms" for name, limit in report.objectives.items())
        share = report.num_good / report.num_requests
        yield f"goodput     {report.goodput:.2f} requests/s, {share:.1%} of all, with {limits}"


def report_rows(report: Report) -> list[Sequence[str]]:
    """A row per latency: milliseconds."""
    return [
        (f"{LATENCIES[name]} ({name})", *(f"{1000 * value:.2f}" for value in astuple(spread)))
        for name, spread in report.spreads.items()
    ]
