"""A gateway in front of one OpenAI-compatible address that obeys Flyball's directives: the least that an enforcement point is.

    UPSTREAM=http://127.0.0.1:8000 FLYBALL_URL=http://127.0.0.1:4390 python gateway.py 4001

A call is known by its headers: `x-tenant`, `x-app`, `x-session`. Needs flyball and httpx, nothing else.
"""

import json
import os
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from flyball.remediation.points import PointClient

UPSTREAM = httpx.Client(base_url=os.environ["UPSTREAM"], timeout=600.0)
MODELS = {"gpt-large", "gpt-small"}  # what the upstream serves: a cap to any other model is left alone
POINT = PointClient(
    os.environ["FLYBALL_URL"], token=os.environ.get("FLYBALL_TOKEN", ""), point="example-gateway"
)


class Gateway(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        labels = {"provider": "openai", "model": str(asked.get("model", ""))}
        for label, header in (("tenant", "x-tenant"), ("app", "x-app"), ("run", "x-session")):
            if self.headers.get(header):
                labels[label] = self.headers[header]

        effect = POINT.apply(labels, labels.get("run", str(uuid.uuid4())), lambda to: to["model"] in MODELS)
        if effect.refused:
            headers = {"Retry-After": f"{effect.retry_after_s:.0f}"} if effect.retry_after_s else {}
            return self.answer(effect.status, {"error": {"message": effect.refused}}, headers)
        asked["model"] = effect.labels["model"]
        if effect.max_output_tokens is not None:
            asked["max_tokens"] = min(
                asked.get("max_tokens", effect.max_output_tokens), effect.max_output_tokens
            )

        spent = 0
        try:
            told = UPSTREAM.post(self.path, json=asked)
            body = told.json()
            spent = body.get("usage", {}).get("total_tokens", 0)
        except (httpx.HTTPError, ValueError) as e:
            return self.answer(502, {"error": {"message": f"upstream: {type(e).__name__}"}})
        finally:
            POINT.charge(effect, tokens=spent)  # failed calls too: they cost nothing, and are over
        return self.answer(told.status_code, body)

    def answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed for each call."""


if __name__ == "__main__":
    POINT.start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Gateway).serve_forever()
