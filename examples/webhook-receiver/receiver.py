"""Receives Flyball's signed webhooks, and believes none that is not signed.

    pip install standardwebhooks
    export HOOK_SECRET=whsec_$(openssl rand -base64 32)
    python receiver.py 9911

and in flyball.yaml, with the same variable set for `flyball run`:

    notify:
      channels:
        - {kind: webhook, url: "http://127.0.0.1:9911/", secrets: [{env: HOOK_SECRET}]}
      egress:
        networks: ["127.0.0.0/8"]
"""

import os
import sys
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

from standardwebhooks import Webhook, WebhookVerificationError

LARGEST_BYTES = 64_000


class Receiver(BaseHTTPRequestHandler):
    webhook: Webhook
    seen: ClassVar[OrderedDict[str, None]] = OrderedDict()

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST_BYTES:
            return self.answer(413)
        body = self.rfile.read(int(length))
        try:
            event = self.webhook.verify(body, {name.lower(): value for name, value in self.headers.items()})
        except WebhookVerificationError:
            return self.answer(401)  # not from Flyball, changed on its way, or older than five minutes
        # A message whose answer was lost comes again under the same id.
        if self.headers["webhook-id"] not in self.seen:
            self.seen[self.headers["webhook-id"]] = None
            while len(self.seen) > 10_000:
                self.seen.popitem(last=False)
            print(event["type"], event["data"]["title"], flush=True)
        return self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was received is printed above."""


if __name__ == "__main__":
    Receiver.webhook = Webhook(os.environ["HOOK_SECRET"])
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
