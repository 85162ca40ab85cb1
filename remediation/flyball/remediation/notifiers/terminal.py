"""Alerts on the terminal: a panel of at most eight lines, for trying things out and for the demo."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from flyball.core.incident import Incident, Severity, State
from flyball.remediation.notifiers._base import Delivery, Receipt
from flyball.remediation.render import Message

_STYLE = {
    Severity.CRITICAL: "bold red",
    Severity.HIGH: "red",
    Severity.MEDIUM: "yellow",
    Severity.LOW: "cyan",
}


class Terminal:
    """Prints each message to a Rich console. Text is never read as Rich markup, and holds no control characters."""

    kind: ClassVar[str] = "terminal"
    wakes: ClassVar[bool] = False

    class Params(BaseModel):
        """Nothing to set."""

        model_config = ConfigDict(extra="forbid")

    def __init__(self, params: Params, console: Console | None = None) -> None:
        # Answers of commands go to standard output; what happens meanwhile goes to standard error.
        self._console = console or Console(stderr=True)

    @classmethod
    def edits(cls, params: Any) -> bool:
        return False

    @property
    def buttons(self) -> bool:
        return False

    def payload(self, message: Message, incident: Incident, *, first: bool = True) -> dict[str, Any]:
        """`title`, `lines` and `style` of the panel: the whole first screen at first, the short form later."""
        lines = message.lines if first else message.update
        style = "green" if incident.state is State.RESOLVED else _STYLE[message.severity]
        return {"title": lines[0], "lines": list(lines[1:]), "style": style}

    async def send(self, client: httpx.AsyncClient, delivery: Delivery) -> Receipt:
        p = self.payload(delivery.message, delivery.incident, first=delivery.previous is None)
        body = Text("\n".join(p["lines"]))
        self._console.print(
            Panel(body, title=Text(p["title"], style="bold"), title_align="left", border_style=p["style"])
        )
        return delivery.receipt()
