"""`mse-doctor`: what is installed, what was chosen and why, and how to mend what is missing."""

from __future__ import annotations

import json
import sys
from typing import Any

from mse_runtime.doctor_checks import Finding, run_checks
from mse_runtime.errors import DeviceError

__all__ = ["examine", "main"]

SCHEMA = "mse-runtime/doctor/1"
MARKS = {"ok": ("ok", "green"), "info": ("-", "dim"), "warning": ("!", "yellow")}
ERROR_MARK = ("MISSING", "bold red")

Report = dict[str, list[Finding]]


def examine(as_json: bool = False) -> int:
    """Print the report to stdout; the exit code is 0, or 5 where something needed is missing."""
    report = run_checks()
    healthy = all(f.status != "error" for findings in report.values() for f in findings)
    if as_json:
        print(json.dumps(_document(report, healthy), indent=2, ensure_ascii=False))
    else:
        _print(report, healthy)
    return 0 if healthy else DeviceError.exit_code


def _document(report: Report, healthy: bool) -> dict[str, Any]:
    checks = [
        {"group": group, **{k: v for k, v in vars(f).items() if v is not None}}
        for group, findings in report.items()
        for f in findings
    ]
    return {"schema": SCHEMA, "ok": healthy, "checks": checks}


def _print(report: Report, healthy: bool) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(report, healthy)
        return
    console = Console(highlight=False)
    for group, findings in report.items():
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(width=8)
        table.add_column(width=17)
        table.add_column(overflow="fold")
        for finding in findings:
            mark, style = MARKS.get(finding.status, ERROR_MARK)
            table.add_row(Text(mark, style), finding.name, Text(finding.detail))
            if finding.fix:
                table.add_row("", "", Text(f"mend: {finding.fix}", "bold"))
        console.print(Text(group, "bold cyan"))
        console.print(table)
    console.print(Text(_verdict(healthy), "bold green" if healthy else "bold red"))


def _print_plain(report: Report, healthy: bool) -> None:
    for group, findings in report.items():
        print(group)
        for finding in findings:
            mark, _ = MARKS.get(finding.status, ERROR_MARK)
            print(f"  {mark:8} {finding.name:17} {finding.detail}")
            if finding.fix:
                print(f"{'':29}mend: {finding.fix}")
    print(_verdict(healthy))


def _verdict(healthy: bool) -> str:
    if healthy:
        return "Everything that is needed is here."
    return "Something needed is missing: see the lines that begin with MISSING."


def main() -> None:
    """Entry point. Works with any library missing, click and rich included."""
    try:
        import click
    except ImportError:
        sys.exit(examine("--json" in sys.argv[1:]))

    @click.command(
        name="mse-doctor",
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Exit codes: 0 everything needed is here, 2 wrong usage, 5 something is missing.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
    def doctor(as_json: bool) -> None:
        """Say what is installed, which paths were chosen and why, and how to mend what is missing.

        The first run probes llama.cpp's fast path in a child process, which takes a second.
        """
        sys.exit(examine(as_json))

    try:
        doctor(prog_name="mse-doctor", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("mse-doctor: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
