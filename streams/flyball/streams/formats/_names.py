"""One spelling for what sources spell in many ways: providers, models, finish reasons; and the bounds of fields."""

from __future__ import annotations

import hashlib
from typing import Final

MAX_LABEL: Final = 512
MAX_COUNT: Final = 1_000_000_000_000

PROVIDERS: Final[dict[str, str]] = {
    "aws.bedrock": "bedrock", "aws_bedrock": "bedrock", "amazon-bedrock": "bedrock", "amazon_bedrock": "bedrock",
    "bedrock_converse": "bedrock", "aws": "bedrock",
    "azure.ai.openai": "azure", "az.ai.openai": "azure", "azure-openai": "azure", "azure_openai": "azure",
    "azure_text": "azure",
    "azure.ai.inference": "azure_ai", "az.ai.inference": "azure_ai",
    "gcp.gemini": "gemini", "gcp.gen_ai": "gemini", "google": "gemini", "google_genai": "gemini",
    "google.generative-ai": "gemini", "google-gla": "gemini", "google_ai_studio": "gemini", "gemini": "gemini",
    "gcp.vertex_ai": "vertex_ai", "vertexai": "vertex_ai", "google.vertex": "vertex_ai", "google-vertex": "vertex_ai",
    "google_vertexai": "vertex_ai", "vertex_ai_beta": "vertex_ai", "vertex.anthropic": "vertex_ai",
    "mistral_ai": "mistral", "mistralai": "mistral", "x_ai": "xai", "x-ai": "xai", "moonshot_ai": "moonshot",
    "moonshotai": "moonshot", "ibm.watsonx.ai": "watsonx", "watsonx_ai": "watsonx", "cohere_chat": "cohere",
    "text-completion-openai": "openai", "openai_chat": "openai", "together_ai": "together", "togetherai": "together",
    "fireworks_ai": "fireworks", "huggingface_hub": "huggingface", "_other": "",
    # Frameworks that name themselves as the provider: who served the call is not said.
    "langchain": "", "langgraph": "", "llamaindex": "", "llama_index": "", "crewai": "", "litellm": "", "unknown": "",
}  # fmt: skip
"""Known spellings (lower case) → our short name; an empty one means that it says nothing. Others stay as they are."""

_FINISH: Final[dict[str, str]] = {
    "tool_call": "tool_calls", "tool_use": "tool_calls", "function_call": "tool_calls", "function_calls": "tool_calls",
    "end_turn": "stop", "stop_sequence": "stop", "eos": "stop", "completed": "stop", "finish": "stop", "complete": "stop",
    "max_tokens": "length", "max_output_tokens": "length", "incomplete": "length", "model_length": "length",
    "refusal": "content_filter", "safety": "content_filter", "prohibited_content": "content_filter",
    "content_filtered": "content_filter", "guardrail_intervened": "content_filter", "recitation": "content_filter",
}  # fmt: skip
_TELLING: Final = ("content_filter", "length", "error", "tool_calls")
"""Of several choices' reasons, the one that an operator wants to see."""

provider_names: dict[str, str] = {}
"""Spellings seen → names, for those who look up before they call."""
model_names: dict[str, str] = {}
finish_names: dict[str, str] = {}


def provider_name(raw: str) -> str:
    """`openai.chat`, `gcp.vertex_ai`, `AWS_Bedrock` → `openai`, `vertex_ai`, `bedrock`.

    >>> provider_name("anthropic.messages"), provider_name("aws.bedrock"), provider_name("langchain")
    ('anthropic', 'bedrock', '')
    """
    found = provider_names.get(raw)
    if found is None:
        name = raw.strip().lower()
        while name not in PROVIDERS and "." in name:
            name = name.rpartition(".")[0]
        found = label(PROVIDERS.get(name, name))
        if len(provider_names) < 10_000:
            provider_names[raw] = found
    return found


def model_name(raw: str) -> str:
    """The model without the provider that LiteLLM writes before it: `openai/gpt-4.1` → `gpt-4.1`."""
    found = model_names.get(raw)
    if found is None:
        head, slash, tail = raw.partition("/")
        prefixed = slash and tail and provider_name(head) != "" and head.replace("_", "").isalnum()
        found = label(tail if prefixed else raw)
        if len(model_names) < 10_000:
            model_names[raw] = found
    return found


def finish_name(raw: str) -> str:
    """One finish reason in one spelling: `tool-calls`, `tool_use`, `tool_call` → `tool_calls`."""
    found = finish_names.get(raw)
    if found is None:
        word = raw.strip().lower().rpartition(".")[2].replace("-", "_")
        found = label(_FINISH.get(word, word))
        if len(finish_names) < 10_000:
            finish_names[raw] = found
    return found


def finish_of(reasons: list[str]) -> str:
    """One reason for a call with several choices: the most telling, else the first."""
    if len(reasons) == 1:
        return finish_name(reasons[0])
    names = [n for n in map(finish_name, reasons) if n]
    return next((t for t in _TELLING if t in names), names[0] if names else "")


def label(text: str) -> str:
    """Cut to what a label may hold."""
    return text if len(text) <= MAX_LABEL else text[:MAX_LABEL]


def identity(text: str) -> str:
    """An id that fits into a label and still differs where the long one did: cutting would make copies of strangers."""
    if len(text) <= MAX_LABEL:
        return text
    return (
        text[:64] + "#" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    )
