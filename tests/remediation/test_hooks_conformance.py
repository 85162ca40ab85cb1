"""The conformance kit passes the example, and finds in each broken receiver the very thing that is broken."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from flyball.core.errors import ConfigError
from flyball.remediation.hooks.conformance import names, run
from flyball.remediation.hooks.kit import Check, HookNotReached, Trial
from flyball.remediation.signing import signed_headers
from tests.processes import free_port
from tests.remediation._hooks import OTHER_SECRET, SECRET


def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "hook_receiver.py"
    spec = importlib.util.spec_from_file_location("hook_receiver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


receiver = example()
Hook: Any = receiver.Hook
Order = dict[str, Any]


class Good(Hook):  # type: ignore[misc]
    """The example; the broken ones below differ from it in one thing each."""


class ChecksNoSignature(Good):
    def signed(self, headers: dict[str, str], body: bytes) -> bool:
        return True


class TakesOldSignatures(Good):
    """Compares the signature and not the time."""

    def signed(self, headers: dict[str, str], body: bytes) -> bool:
        given = {k.lower(): v for k, v in headers.items()}
        at = datetime.fromtimestamp(int(given.get("webhook-timestamp", "0")), UTC)
        good: str = self.webhook.sign(given.get("webhook-id", ""), at, body.decode())
        return good == given.get("webhook-signature")


class TellsEverybody(Good):
    """The status needs no signature."""

    def signed(self, headers: dict[str, str], body: bytes) -> bool:
        return not body or bool(super().signed(headers, body))


class KnowsAttemptsNotOperations(Good):
    """Tells copies by the message, not by the operation: another attempt is another order to it."""

    def start(self, order: Order) -> Order:
        self.attempts: dict[str, int]
        self.attempts = getattr(self, "attempts", {})
        before = self.attempts.get(order["operation_id"], order["attempt"])
        self.attempts[order["operation_id"]] = order["attempt"]
        if before != order["attempt"]:
            self.write(order["operation_id"], "start", "accepted", order)
            self.work.put((order["operation_id"], "start"))
        return super().start(order)  # type: ignore[no-any-return]


class DoesEveryCopy(Good):
    """Does what it is told, each time that it is told."""

    def start(self, order: Order) -> Order:
        id = order["operation_id"]
        if self.status(id, "start") in ("accepted", "running", "succeeded"):
            self.world.act(id, order["action"], order["targets"])
            self.db.execute("update orders set runs = runs + 1 where id = ? and verb = 'start'", (id,))
        return super().start(order)  # type: ignore[no-any-return]


class TakesAnotherOrderForTheSame(Good):
    def start(self, order: Order) -> Order:
        if self.status(order["operation_id"], "start"):
            return self.answer(order["operation_id"], "start")  # type: ignore[no-any-return]
        return super().start(order)  # type: ignore[no-any-return]


class ForgetsCancelsOfTheUnknown(Good):
    """Says cancelled, and remembers nothing of it."""

    def cancel(self, order: Order) -> Order:
        if order["verb"] == "cancel" and self.status(order["operation_id"], "start") is None:
            return {"status": "cancelled"}
        return super().cancel(order)  # type: ignore[no-any-return]


class KnowsNoTokens(Good):
    def is_old(self, order: Order) -> bool:
        return False


class SaysCancelledAndGoesOn(Good):
    def cancel(self, order: Order) -> Order:
        answer: Order = super().cancel(order)
        return {**answer, "status": "cancelled"} if answer["runs"] else answer


class FailsTheSecondUndo(Good):
    def undo(self, order: Order) -> Order:
        if self.status(order["operation_id"], "undo") == "succeeded":
            return {"status": "failed_not_applied", "detail": "there is nothing to undo"}
        return super().undo(order)  # type: ignore[no-any-return]


class UndoesTwice(Good):
    def undo(self, order: Order) -> Order:
        answer: Order = super().undo(order)
        if order["attempt"] > 1:
            self.write(order["operation_id"], "undo", "accepted", order)
            self.work.put((order["operation_id"], "undo"))
        return answer


class LimitsRecovery(Good):
    def take(self, order: Order) -> Order:
        if order["verb"] in ("cancel", "undo"):
            self.recent: list[float] = [t for t in getattr(self, "recent", []) if t > time.monotonic() - 1]
            self.recent.append(time.monotonic())
            if len(self.recent) > 20:
                return {"status": "rejected", "code": "rate_limit", "transient": True}
        return super().take(order)  # type: ignore[no-any-return]


class DoesDryRuns(Good):
    def dry_run(self, order: Order) -> Order:
        answer: Order = super().dry_run(order)
        self.world.act(order["operation_id"], order["action"], order["targets"])
        return answer


class PredictsNothing(Good):
    def dry_run(self, order: Order) -> Order:
        return {"status": "accepted"}


class TakesAnyAction(Good):
    def start(self, order: Order) -> Order:
        return super().start({**order, "action": "drain"})  # type: ignore[no-any-return]


class HasNoDeadline(Good):
    def start(self, order: Order) -> Order:
        return super().start({**order, "deadline": time.time() + 60})  # type: ignore[no-any-return]


class ReadsAnything(Good):
    """However long a body is, it is read and carried out."""

    largest_bytes = 1 << 30


@contextmanager
def serving(folder: Path, kind: type[Good] = Good) -> Iterator[Trial]:
    hook = kind(folder, receiver.World(folder, ["node-1"]), SECRET.get_secret_value(), 0.01)
    server = receiver.serve(hook, 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield trial(server.server_port)
    finally:
        server.shutdown()
        server.server_close()


def trial(port: int) -> Trial:
    """Patient with nothing: everything here is on this machine."""

    def pause(seconds: float) -> None:
        time.sleep(min(seconds, 0.05))

    return Trial(url=f"http://127.0.0.1:{port}/", secret=SECRET, action="drain", targets=("node-1",), wait_s=5.0, pause=pause)  # fmt: skip


def failed(checks: list[Check]) -> set[str]:
    return {c.name for c in checks if c.result == "failed"}


def test_the_example_passes_all_that_can_be_tried_without_killing_it(tmp_path: Path) -> None:
    with serving(tmp_path) as t:
        checks = run(t)
    assert [c.name for c in checks] == names()
    assert {c.name: c.why for c in checks if c.result != "passed"} == {
        "crash": "needs --command: the kit has to kill and start the receiver itself",
        "callback": "needs --listen: the receiver has to tell the kit as it would tell Flyball",
    }
    assert (tmp_path / "nodes" / "node-1").read_text() == "ready"


BROKEN: list[tuple[type[Good], set[str]]] = [
    (ChecksNoSignature, {"signature_missing", "signature_wrong", "signature_old", "signature_of_another_body", "signature_of_status"}),
    (TakesOldSignatures, {"signature_old"}),
    (TellsEverybody, {"signature_of_status"}),
    (KnowsAttemptsNotOperations, {"duplicate", "other_order"}),
    (DoesEveryCopy, {"duplicate", "duplicate_at_once", "timeout_after_acceptance", "other_order", "old_token", "undo_twice"}),
    (TakesAnotherOrderForTheSame, {"other_order", "old_token"}),
    (ForgetsCancelsOfTheUnknown, {"cancel_before_start"}),
    (KnowsNoTokens, {"old_token"}),
    (SaysCancelledAndGoesOn, {"cancel"}),
    (FailsTheSecondUndo, {"undo_twice"}),
    (UndoesTwice, {"undo_twice"}),
    (LimitsRecovery, {"recovery_not_limited"}),
    (DoesDryRuns, {"dry_run"}),
    (PredictsNothing, {"dry_run"}),
    (TakesAnyAction, {"unknown_action"}),
    (HasNoDeadline, {"deadline_passed"}),
    (ReadsAnything, {"large_body"}),
]  # fmt: skip


CONTROLS = {"signature_missing", "dry_run", "duplicate", "cancel_before_start", "undo_twice"}
"""Run beside: they must pass where something else is broken."""


@pytest.mark.parametrize(("kind", "finds"), BROKEN, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_a_broken_receiver_fails_the_check_of_what_is_broken(
    kind: type[Good], finds: set[str], tmp_path: Path
) -> None:
    with serving(tmp_path, kind) as t:
        assert failed(run(t, sorted(finds | CONTROLS))) == finds


Told = tuple[str, dict[str, str], bytes]


@pytest.mark.parametrize(
    ("secret", "says"),
    [
        pytest.param(SECRET, "", id="signed"),
        pytest.param(OTHER_SECRET, "not believed", id="signed with another secret"),
        pytest.param(None, "came nothing", id="not told"),
    ],
)
def test_a_callback_has_to_be_signed(secret: SecretStr | None, says: str, tmp_path: Path) -> None:
    told: list[Told] = []

    class Tells(Good):
        def tell(self, id: str, verb: str) -> None:
            body = json.dumps(self.answer(id, verb))
            if secret is not None:
                headers = signed_headers([secret], f"{id}.{verb}.ended", body, time.time())
                told.append((f"/v1/operations/{id}", headers, body.encode()))

    with serving(tmp_path, Tells) as t:
        (check,) = run(replace(t, heard=lambda: list(told), wait_s=1.0), ["callback"])
    assert (check.result == "passed", says in check.why) == (not says, True), check


def test_what_a_check_sent_expected_and_got_is_told(tmp_path: Path) -> None:
    with serving(tmp_path, HasNoDeadline) as t:
        (check,) = run(t, ["deadline_passed"])
    assert (
        check.why
        == "start, five seconds after its deadline: expected rejected; came HTTP 200, accepted runs 0"
    )
    assert [e.ok for e in check.exchanges] == [False]


def test_a_check_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'duplicate'"):
        run(trial(free_port()), ["duplicates"])


def test_a_receiver_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(HookNotReached, match="start the receiver"):
        run(trial(free_port()))


def test_every_check_says_what_it_asks(tmp_path: Path) -> None:
    with serving(tmp_path) as t:
        assert all(c.asks.endswith(".") for c in run(t, ["unknown_action", "duplicate"]))
