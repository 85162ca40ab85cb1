"""What `flyball init` writes: settings with their meaning beside them, and one runbook with its tests."""

from __future__ import annotations

from importlib.resources import files as package_files
from typing import Final

_SETTINGS: Final = """\
# Flyball's settings: what stands here is the default, unless it says otherwise. All settings: docs/settings.md

host: 127.0.0.1        # other addresses need `tokens`
port: 4390
data: flyball-data     # folder of the database; paths count from this file
runbooks: [runbooks]   # default: the shipped ones alone; one of the same name replaces a shipped one

# What Flyball may do by itself: observe < suggest < approve < auto. A runbook's own mode must allow it too.
mode: suggest

# How often Flyball may wake you in error, all series together.
false_pages_per_week: 2
page_severity: high

# Where alerts go. Slack, or anything that takes Slack's incoming webhooks:
# notify:
#   channels:
#     - kind: slack
#       url: {env: SLACK_WEBHOOK_URL}       # secrets may come from variables
#   egress:
#     networks: [10.0.0.0/8]                # only for receivers in your own network

# GPUs and inference servers:
# scrape:
#   - url: http://gpu-node-1:9400/metrics     # dcgm-exporter
#   - url: http://vllm-1:8000/metrics
"""

NEXT_STEPS: Final = """
Start it:             flyball run --config {config}

Send LiteLLM traffic: in LiteLLM's config.yaml
                          litellm_settings:
                            callbacks: ["generic_api"]
                      and in its environment
                          GENERIC_LOGGER_ENDPOINT=http://127.0.0.1:4390/ingest/litellm

And let it act there: the same list with the guard in it, and FLYBALL_URL=http://127.0.0.1:4390
                            callbacks: ["generic_api", "flyball.remediation.points.litellm.guard"]

Send OpenTelemetry:   OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4390 OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf

See that it arrives:  flyball status      What is wrong: flyball doctor"""


def files() -> dict[str, str]:
    runbook = package_files("flyball.runbooks") / "library" / "provider-failover.yaml"
    return {"flyball.yaml": _SETTINGS, "runbooks/provider-failover.yaml": runbook.read_text()}
