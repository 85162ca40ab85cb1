"""OpenAI calls as OpenTelemetry spans, sent to Flyball. No line knows of Flyball: the variables do.

    pip install openai opentelemetry-sdk opentelemetry-exporter-otlp-proto-http opentelemetry-instrumentation-openai-v2
    export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4390 OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf OTEL_SERVICE_NAME=checkout-bot
    python app.py

Where Flyball asks for tokens: OTEL_EXPORTER_OTLP_HEADERS="Authorization=Bearer%20TOKEN"
"""

import openai
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.openai_v2 import OpenAIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
OpenAIInstrumentor().instrument(tracer_provider=provider)

openai.OpenAI().chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}])
provider.shutdown()  # sends what still waits
