"""How a run shows itself in a notebook and in an interactive session."""

from __future__ import annotations

from html import escape

from backdoorbench_moe.records import Record


def run_line(name: str, record: Record) -> str:
    """A run in one line: its folder's name, status and metrics."""
    metrics = ", ".join(f"{key.upper()} {metric['value']:.2f}" for key, metric in record.metrics.items())
    return f"<Run {name}: {record.status}{', ' if metrics else ''}{metrics}>"


def run_html(name: str, record: Record) -> str:
    """A run as an HTML table of its metrics, in percent, with their 95% intervals and numbers of images."""
    rows = []
    for key, metric in record.metrics.items():
        interval = f"{metric['low']:.2f} – {metric['high']:.2f}" if "low" in metric else "–"
        cells = (f"{metric['value']:.2f}", interval, f"{metric['n']:,}")
        rows.append(f"<tr><th>{escape(key.upper())}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    error = f"<p>{escape(record.error)}</p>" if record.error else ""
    head = "<tr><th></th><th>%</th><th>95% interval</th><th>images</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    return f"<p><code>{escape(name)}</code>: {escape(record.status)}</p>{error}{table}"
