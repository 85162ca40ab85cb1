"""A remediation hook to start from: takes nodes out of service and puts them back, each order once, also after `kill -9`.

    pip install standardwebhooks
    export HOOK_SECRET=whsec_$(openssl rand -base64 32)
    python hook_receiver.py 9922 hook-data node-1 node-2

and in flyball.yaml, with the same variable set for `flyball run`:

    hooks:
      - {name: nodes, url: "http://127.0.0.1:9922/", secrets: [{env: HOOK_SECRET}], allow_private: true}

To make it your own, replace `World`: it is the only part that knows what a node is. Then try it:

    flyball hook conform http://127.0.0.1:9922/ --action drain --target node:node-1

With FLYBALL_URL set, the end of an operation is also told to Flyball at once; without it, Flyball asks.
"""

import json
import os
import queue
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from standardwebhooks import Webhook, WebhookVerificationError

Answer = dict[str, Any]


class World:
    """What is really acted on; here a file for each node. `done.log` has a line for everything that was done."""

    actions: ClassVar = {"drain": "drained"}

    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self.nodes, self.log = folder / "nodes", folder / "done.log"
        self.nodes.mkdir(parents=True, exist_ok=True)
        for name in nodes:
            if not (self.nodes / name).exists():
                (self.nodes / name).write_text("ready")

    def node(self, target: str) -> str:
        """Runbooks name entities, `node:node-1` or `gpu:node-1/gpu-3`; both are on the node that is acted on."""
        return target.partition(":")[2].partition("/")[0] or target

    def knows(self, targets: list[str]) -> bool:
        return bool(targets) and {self.node(t) for t in targets} <= {p.name for p in self.nodes.iterdir()}

    def look(self, targets: list[str]) -> dict[str, str]:
        """The state of each node that the targets are on."""
        return {name: (self.nodes / name).read_text() for name in sorted({self.node(t) for t in targets})}

    def act(self, id: str, action: str, targets: list[str]) -> None:
        self.restore(id, action, dict.fromkeys(self.look(targets), self.actions[action]))

    def restore(self, id: str, what: str, before: dict[str, str]) -> None:
        for name, state in before.items():
            (self.nodes / name).write_text(state)
        with self.log.open("a") as log:
            log.write(f"{id} {what} {','.join(before)}\n")


class Hook:
    """The contract. Every order is written down before it is carried out, so a restart knows what was begun."""

    largest_bytes = 64 * 1024

    def __init__(self, folder: Path, world: World, secret: str, takes_s: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.world, self.webhook, self.takes_s = world, Webhook(secret), takes_s
        self.lock = threading.RLock()
        self.work: queue.Queue[tuple[str, str]] = queue.Queue()
        self.db = sqlite3.connect(folder / "hook.db", check_same_thread=False, isolation_level=None)
        self.db.execute("pragma journal_mode = wal")
        self.db.execute("pragma synchronous = full")
        self.db.execute(
            "create table if not exists orders (id text, verb text, status text, request text, "
            "before text default '{}', runs int default 0, primary key (id, verb))"
        )
        self.db.execute("create table if not exists tokens (id text primary key, token int)")
        # Begun and not ended when the process died: nobody knows how far it got, so it is not begun again.
        self.db.execute("update orders set status = 'ambiguous' where verb = 'start' and status = 'running'")
        # Taken and not begun is carried out now. Putting back what was there before may be done twice.
        for id, verb in self.db.execute(
            "select id, verb from orders where status in ('accepted', 'running')"
        ):
            self.work.put((id, verb))

    def signed(self, headers: dict[str, str], body: bytes) -> bool:
        """Whether it is from Flyball, unchanged on its way, and not older than five minutes."""
        try:
            self.webhook.verify(body, headers, json_parse=False)
        except (WebhookVerificationError, ValueError):
            return False
        return True

    # --- what is asked --------------------------------------------------------------------------------------------

    def take(self, order: dict[str, Any]) -> Answer:
        """The answer to a request whose signature is good."""
        verbs = {"start": self.start, "cancel": self.cancel, "undo": self.undo}
        asked = verbs.get(order["verb"])
        if asked is None:
            return {"status": "rejected", "code": "unknown_verb"}
        with self.lock:
            return asked(order)

    def start(self, order: dict[str, Any]) -> Answer:
        id = order["operation_id"]
        if order["action"] not in self.world.actions:
            return {"status": "unsupported"}
        if order["dry_run"]:
            return self.dry_run(order)
        if self.is_old(order):
            return {"status": "rejected", "code": "old_token"}
        known = self.db.execute(
            "select request, status from orders where id = ? and verb = 'start'", (id,)
        ).fetchone()
        if known:
            same = not known[0] or all(
                json.loads(known[0])[k] == order[k] for k in ("action", "targets", "params")
            )
            return self.answer(id, "start") if same else {"status": "rejected", "code": "other_order"}
        if order["deadline"] < time.time():
            return {"status": "rejected", "code": "deadline"}
        if not self.world.knows(order["targets"]):
            return {"status": "rejected", "code": "unknown_target"}
        self.write(id, "start", "accepted", order)
        self.work.put((id, "start"))
        return self.answer(id, "start")

    def dry_run(self, order: dict[str, Any]) -> Answer:
        """What would be done. Changes nothing and remembers nothing."""
        targets = order["targets"]
        if not self.world.knows(targets):
            return {"status": "rejected", "code": "unknown_target"}
        ref, before = order["operation_id"], self.world.look(targets)
        return {
            "status": "accepted", "targets": targets, "predicted": {"nodes": len(before)}, "undo_ref": ref, "before": before,
        }  # fmt: skip

    def cancel(self, order: dict[str, Any]) -> Answer:
        """What is not begun never will be, even if its start arrives later than this. Else: what became of it."""
        self.is_old(order)
        if self.status(order["operation_id"], "start") in (None, "accepted"):
            self.write(order["operation_id"], "start", "cancelled")
        return self.answer(order["operation_id"], "cancel")

    def undo(self, order: dict[str, Any]) -> Answer:
        id = order["operation_id"]
        self.cancel(order)
        if self.status(id, "undo") is None:
            nothing = self.status(id, "start") in ("cancelled", "failed_not_applied")
            self.write(id, "undo", "succeeded" if nothing else "accepted", order)
            self.work.put((id, "undo"))
        return self.answer(id, "undo")

    def is_old(self, order: dict[str, Any]) -> bool:
        """Whether a newer request of the same operation was seen; remembers this one. An old undo is still an undo."""
        id, token = order["operation_id"], order["fencing_token"]
        row = self.db.execute("select token from tokens where id = ?", (id,)).fetchone()
        self.db.execute(
            "insert or replace into tokens values (?, ?)", (id, max(token, row[0] if row else token))
        )
        return row is not None and token < row[0]

    def answer(self, id: str, verb: str) -> Answer:
        """The status of an operation, as it is asked and as it is told; empty for one that was never heard of."""
        # A cancel is answered with what became of the start.
        of = "start" if verb == "cancel" else verb
        with self.lock:
            row = self.db.execute(
                "select status, before, runs, request from orders where id = ? and verb = ?", (id, of)
            ).fetchone()
        if row is None:
            return {}
        status = "accepted" if row[0] == "running" else row[0]
        attempt = json.loads(row[3])["attempt"] if row[3] else 1
        return {
            "operation_id": id, "verb": verb, "attempt": attempt, "status": status, "before": json.loads(row[1]),
            "undo_ref": id, "runs": row[2],
        }  # fmt: skip

    # --- what is done ---------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """Takes orders from the queue, one after another, for ever."""
        while True:
            id, verb = self.work.get()
            with self.lock:
                if self.status(id, verb) not in ("accepted", "running"):
                    continue  # cancelled in the meantime, or nothing to undo
                text = self.db.execute(
                    "select request from orders where id = ? and verb = 'start'", (id,)
                ).fetchone()
                order = json.loads(text[0])
                if verb == "start":
                    # The snapshot and the fact that it was begun are on disk before anything changes.
                    before = json.dumps(self.world.look(order["targets"]))
                    self.db.execute(
                        "update orders set status = 'running', before = ?, runs = runs + 1 where id = ? and verb = 'start'",
                        (before, id),
                    )
            time.sleep(self.takes_s)
            if verb == "start":
                self.world.act(id, order["action"], order["targets"])
            else:
                self.world.restore(id, "undo", self.answer(id, "start")["before"])
                self.db.execute("update orders set runs = runs + 1 where id = ? and verb = 'undo'", (id,))
            with self.lock:
                self.write(id, verb, "succeeded")
            self.tell(id, verb)

    def tell(self, id: str, verb: str) -> None:
        """The end of it, to Flyball. May fail: Flyball asks as well."""
        if not (url := os.environ.get("FLYBALL_URL")):
            return
        body, now = json.dumps(self.answer(id, verb)), datetime.now(UTC)
        name = f"{id}.{verb}.ended"
        request = urllib.request.Request(f"{url.rstrip('/')}/v1/operations/{id}", body.encode(), {
            "content-type": "application/json", "webhook-id": name, "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self.webhook.sign(name, now, body),
        })  # fmt: skip
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except (urllib.error.URLError, OSError) as e:
            print(f"{id}: not told, will be asked: {e}", file=sys.stderr)

    # --- what is remembered ---------------------------------------------------------------------------------------

    def status(self, id: str, verb: str) -> str | None:
        row = self.db.execute("select status from orders where id = ? and verb = ?", (id, verb)).fetchone()
        return row[0] if row else None

    def write(self, id: str, verb: str, status: str, order: dict[str, Any] | None = None) -> None:
        self.db.execute(
            "insert into orders (id, verb, status, request) values (?, ?, ?, ?) "
            "on conflict do update set status = excluded.status",
            (id, verb, status, json.dumps(order) if order else ""),
        )


class Handler(BaseHTTPRequestHandler):
    hook: Hook
    timeout = 10

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > self.hook.largest_bytes:
            self.close_connection = True
            return self.reply(413, {"status": "rejected", "code": "too_large"})
        body = self.rfile.read(int(length))
        if not self.hook.signed(dict(self.headers.items()), body):
            return self.reply(401, {"status": "rejected", "code": "signature"})
        try:
            answer = self.hook.take(json.loads(body))
        except (ValueError, KeyError, TypeError) as e:
            return self.reply(400, {"status": "rejected", "code": "unreadable", "detail": repr(e)})
        return self.reply(200, answer)

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if not self.hook.signed(dict(self.headers.items()), b""):
            return self.reply(401, {})
        id = path.path.rpartition("/operations/")[2]
        answer = self.hook.answer(id, parse_qs(path.query).get("verb", ["start"])[0])
        return self.reply(200 if answer else 404, answer)

    def reply(self, status: int, answer: Answer) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # who hangs up asks later
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `done.log` says what was done."""


def serve(hook: Hook, port: int) -> ThreadingHTTPServer:
    threading.Thread(target=hook.carry_out, daemon=True).start()
    return ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hook": hook}))


if __name__ == "__main__":
    where = Path(sys.argv[2])
    serve(
        Hook(
            where,
            World(where, sys.argv[3:]),
            os.environ["HOOK_SECRET"],
            float(os.environ.get("HOOK_TAKES_S", "0.2")),
        ),
        int(sys.argv[1]),
    ).serve_forever()
