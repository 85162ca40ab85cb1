"""Runs in the peers' environment: OpenAI SDK calls under one instrumentation, exported as OTLP protobuf.

python sdk_client.py openai-v2|openinference UPSTREAM FLYBALL CALLS FAILURES
"""

from __future__ import annotations

import contextlib
import sys

import openai
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def main() -> None:
    kind, upstream, flyball, calls, failures = sys.argv[1:]
    provider = TracerProvider(resource=Resource.create({"service.name": f"shop-{kind}"}))
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{flyball}/v1/traces"), schedule_delay_millis=500)
    )
    if kind == "openai-v2":
        from opentelemetry.instrumentation.openai_v2 import OpenAIInstrumentor

        OpenAIInstrumentor().instrument(tracer_provider=provider)
    else:
        from openinference.instrumentation.openai import OpenAIInstrumentor as Inference

        Inference().instrument(tracer_provider=provider)
    client = openai.OpenAI(base_url=f"{upstream}/v1", api_key="not-a-key", max_retries=0)
    for model, n in (
        ("gpt-ok", int(calls)),
        ("gpt-overloaded-503", int(failures)),
        ("gpt-quota", 1),
        ("gpt-too-long", 1),
    ):
        for _ in range(n):
            with contextlib.suppress(openai.APIStatusError):
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": "PRIVATE-WORDS"}]
                )
    provider.shutdown()


main()
