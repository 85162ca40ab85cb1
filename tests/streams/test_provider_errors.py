"""Every cell of the published error tables, and the spellings that sources give them, becomes the right class."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.core.errorclass import CLASSES
from flyball.core.errors import ConfigError
from flyball.streams.provider_errors import Classifier

CLASSIFIER = Classifier()

CASES = [
    # OpenAI
    ("rate_limited", {"status": 429, "code": "rate_limit_exceeded", "type": "requests", "message": "Rate limit reached for gpt-4.1 in organization o on requests per min (RPM): Limit 3. Visit https://platform.openai.com/account/billing to add a payment method."}),
    ("rate_limited", {"status": 429, "code": "rate_limit_exceeded", "type": "tokens", "message": "Request too large for gpt-4.1 on tokens per min (TPM): Limit 30000, Requested 40000."}),
    ("quota_exhausted", {"status": 429, "code": "insufficient_quota", "type": "insufficient_quota"}),
    ("quota_exhausted", {"status": 429, "message": "You exceeded your current quota, please check your plan and billing details."}),
    ("quota_exhausted", {"status": 429, "code": "credit_balance_exhausted"}),
    ("quota_exhausted", {"status": 429, "code": "organization_spend_limit_exceeded"}),
    ("quota_exhausted", {"status": 429, "code": "project_spend_limit_exceeded"}),
    ("quota_exhausted", {"status": 429, "code": "organization_usage_limit_exceeded"}),
    ("quota_exhausted", {"status": 400, "code": "billing_hard_limit_reached", "message": "Billing hard limit has been reached"}),
    ("overloaded", {"status": 503, "message": "The engine is currently overloaded, please try again later"}),
    ("overloaded", {"status": 503, "message": "Slow Down"}),
    ("server_error", {"status": 500, "message": "The server had an error while processing your request."}),
    ("server_error", {"status": 502}),
    ("timeout", {"status": 408}),
    ("auth", {"status": 401, "message": "Incorrect API key provided."}),
    ("auth", {"status": 403, "code": "unsupported_country_region_territory"}),
    ("not_found", {"status": 404, "message": "The model does not exist or you do not have access to it."}),
    ("context_too_long", {"status": 400, "code": "context_length_exceeded"}),
    ("context_too_long", {"status": 400, "message": "This model's maximum context length is 128000 tokens. However, your messages resulted in 131072 tokens."}),
    ("content_filter", {"status": 400, "code": "content_policy_violation"}),
    ("bad_request", {"status": 400, "message": "Invalid value for 'temperature': expected a number between 0 and 2."}),
    # Anthropic
    ("rate_limited", {"provider": "anthropic", "status": 429, "type": "rate_limit_error", "message": "This request would exceed your organization's rate limit of 50 requests per minute."}),
    ("quota_exhausted", {"provider": "anthropic", "status": 402, "type": "billing_error"}),
    ("quota_exhausted", {"provider": "anthropic", "status": 429, "type": "rate_limit_error", "message": "{'message': 'Spend limit reached for this workspace.', 'details': {'error_code': 'enforced_spend_limit_reached'}}"}),
    ("quota_exhausted", {"provider": "anthropic", "status": 400, "type": "invalid_request_error", "message": "Your credit balance is too low to access the API."}),
    ("overloaded", {"provider": "anthropic", "status": 529, "type": "overloaded_error"}),
    ("server_error", {"provider": "anthropic", "status": 500, "type": "api_error"}),
    ("timeout", {"provider": "anthropic", "status": 504, "type": "timeout_error"}),
    ("auth", {"provider": "anthropic", "status": 401, "type": "authentication_error"}),
    ("auth", {"provider": "anthropic", "status": 403, "type": "permission_error"}),
    ("not_found", {"provider": "anthropic", "status": 404, "type": "not_found_error"}),
    ("context_too_long", {"provider": "anthropic", "status": 400, "type": "invalid_request_error", "message": "prompt is too long: 212345 tokens > 200000 maximum"}),
    ("context_too_long", {"provider": "anthropic", "status": 413, "type": "request_too_large"}),
    # Gemini and Vertex
    ("rate_limited", {"provider": "gemini", "status": 429, "code": "RESOURCE_EXHAUSTED", "message": "Resource has been exhausted (e.g. check quota)."}),
    ("rate_limited", {"provider": "gemini", "status": 429, "message": "You exceeded your current quota. quotaId: GenerateRequestsPerMinutePerProject retryDelay: 12s"}),
    ("quota_exhausted", {"provider": "gemini", "status": 429, "code": "quota_exceeded"}),
    ("quota_exhausted", {"provider": "gemini", "status": 429, "message": "You exceeded your current quota. quotaId: GenerateRequestsPerDayPerProject"}),
    ("quota_exhausted", {"provider": "gemini", "status": 402}),
    ("overloaded", {"provider": "gemini", "status": 503, "code": "UNAVAILABLE"}),
    ("server_error", {"provider": "gemini", "status": 500, "code": "INTERNAL"}),
    ("timeout", {"provider": "vertex_ai", "status": 504, "code": "DEADLINE_EXCEEDED"}),
    ("auth", {"provider": "vertex_ai", "status": 403}),
    ("context_too_long", {"provider": "gemini", "status": 400, "code": "INVALID_ARGUMENT", "message": "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."}),
    ("bad_request", {"provider": "gemini", "status": 400, "code": "INVALID_ARGUMENT"}),
    ("content_filter", {"provider": "gemini", "message": "finishReason: SAFETY"}),
    # Bedrock
    ("rate_limited", {"provider": "bedrock", "status": 429, "type": "ThrottlingException"}),
    ("quota_exhausted", {"provider": "bedrock", "status": 400, "type": "ServiceQuotaExceededException"}),
    ("overloaded", {"provider": "bedrock", "status": 503, "type": "ServiceUnavailable"}),
    ("overloaded", {"provider": "bedrock", "status": 429, "type": "ModelNotReadyException"}),
    ("server_error", {"provider": "bedrock", "status": 500, "type": "InternalFailure"}),
    ("server_error", {"provider": "bedrock", "status": 424, "type": "ModelErrorException"}),
    ("timeout", {"provider": "bedrock", "status": 408, "type": "ModelTimeoutException"}),
    ("auth", {"provider": "bedrock", "status": 403, "type": "AccessDenied"}),
    ("auth", {"provider": "bedrock", "status": 403, "type": "InvalidClientTokenId"}),
    ("not_found", {"provider": "bedrock", "status": 404, "type": "FTUFormNotFilled"}),
    ("context_too_long", {"provider": "bedrock", "status": 400, "type": "ValidationException", "message": "Input is too long for requested model."}),
    ("bad_request", {"provider": "bedrock", "status": 400, "type": "ValidationException"}),
    ("stream_interrupted", {"provider": "bedrock", "type": "ModelStreamErrorException"}),
    # Azure OpenAI
    ("rate_limited", {"provider": "azure", "status": 429, "message": "Requests to the ChatCompletions Operation have exceeded call rate limit of your current pricing tier."}),
    ("overloaded", {"provider": "azure", "status": 429, "message": "The system is experiencing high demand."}),
    ("quota_exhausted", {"provider": "azure", "status": 403, "message": "This subscription is temporarily blocked."}),
    ("timeout", {"provider": "azure", "status": 408}),
    ("not_found", {"provider": "azure", "status": 404, "code": "DeploymentNotFound"}),
    ("content_filter", {"provider": "azure", "status": 400, "code": "content_filter", "message": "The response was filtered due to the prompt triggering the content management policy."}),
    ("server_error", {"provider": "azure", "code": "content_filter_error"}),
    # through LiteLLM
    ("rate_limited", {"code": "429", "type": "RateLimitError", "normalized": "429_RATE_LIMIT_EXCEEDED", "message": "litellm.RateLimitError: RateLimitError: OpenAIException - Rate limit reached"}),
    ("quota_exhausted", {"code": "429", "type": "RateLimitError", "normalized": "429_RATE_LIMIT_EXCEEDED", "message": "litellm.RateLimitError: OpenAIException - You exceeded your current quota, please check your plan"}),
    ("quota_exhausted", {"code": "billing_hard_limit_reached", "type": "BadRequestError", "normalized": "400_INVALID_REQUEST"}),
    ("overloaded", {"code": "503", "type": "ServiceUnavailableError", "normalized": "503_PROVIDER_OVERLOADED"}),
    ("overloaded", {"code": "529", "type": "APIError", "normalized": "503_PROVIDER_OVERLOADED"}),
    ("overloaded", {"code": "500", "type": "InternalServerError", "normalized": "503_PROVIDER_OVERLOADED", "message": 'AnthropicError - {"error": {"type": "overloaded_error"}}'}),
    ("context_too_long", {"code": "400", "type": "ContextWindowExceededError", "normalized": "400_CONTEXT_WINDOW_EXCEEDED"}),
    ("content_filter", {"code": "content_filter", "type": "BadRequestError", "normalized": "400_INVALID_REQUEST"}),
    ("auth", {"code": "401", "type": "AuthenticationError", "normalized": "401_AUTHENTICATION_FAILED"}),
    ("timeout", {"code": "408", "type": "Timeout", "normalized": "408_UPSTREAM_TIMEOUT"}),
    ("connection", {"code": "500", "type": "InternalServerError", "normalized": "500_PROVIDER_CONNECTION_ERROR", "message": "Connection error."}),
    ("gateway_local", {"code": "429", "type": "RouterRateLimitError", "normalized": "429_NO_HEALTHY_DEPLOYMENTS"}),
    ("gateway_local", {"normalized": "429_BUDGET_EXCEEDED"}),
    ("gateway_local", {"code": "429", "type": "HTTPException", "message": "429: {'error': {'type': 'agent_session_blocked'}}"}),
    ("gateway_local", {"type": "openai.RateLimitError", "message": "Error code: 429 - session s-1 stopped by directive d-1"}),
    ("gateway_local", {"code": "400", "type": "ProxyException", "message": "No connected db."}),
    # no status, no type: the sentence alone (Vercel AI SDK, openai 3.x)
    ("not_found", {"type": "AI_APICallError", "message": "The model does not exist or you do not have access to it."}),
    ("connection", {"type": "AI_APICallError", "message": "Cannot connect to API: connect ECONNREFUSED 127.0.0.1:4899"}),
    ("timeout", {"type": "TimeoutError", "message": "The operation was aborted due to timeout"}),
    ("cancelled", {"type": "AbortError", "message": "This operation was aborted"}),
    ("overloaded", {"type": "APIError", "message": "The engine is currently overloaded, please try again later"}),
    ("timeout", {"type": "openai.InternalServerError", "message": "Error code: 504 - Gateway timeout"}),
    ("stream_interrupted", {"type": "httpx.RemoteProtocolError", "message": "peer closed connection without sending complete message body (incomplete chunked read)"}),
    ("unknown", {"type": "_OTHER"}),
]  # fmt: skip


@pytest.mark.parametrize(("klass", "told"), CASES)
def test_an_error_of_the_tables_gets_its_class(klass: str, told: dict[str, object]) -> None:
    assert CLASSIFIER.classify(**told) == klass  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spelling", "klass"),
    [
        ("RateLimitError", "rate_limited"),
        ("openai.RateLimitError", "rate_limited"),
        ("rate_limit_error", "rate_limited"),
        ("langchain_openai.chat_models.base.OpenAIRateLimitError", "rate_limited"),
        ("pydantic_ai.exceptions.ModelRateLimitError", "rate_limited"),
        ("pydantic_ai.exceptions.ModelQuotaExceededError", "quota_exhausted"),
        ("anthropic.EnforcedSpendLimitReachedError", "quota_exhausted"),
        ("ModelOverloadedError", "overloaded"),
        ("AnthropicOverloadedError", "overloaded"),
        ("overloaded_error", "overloaded"),
        ("pydantic_ai.exceptions.ModelContextWindowExceededError", "context_too_long"),
        ("OpenAIModelNotFoundError", "not_found"),
        ("client_timeout_error", "timeout"),
        ("APITimeoutError", "timeout"),
        ("OpenAIConnectionError", "connection"),
        ("connection_error", "connection"),
        ("anthropic.AuthenticationError", "auth"),
        ("OpenAIInvalidRequestError", "bad_request"),
        ("429", "rate_limited"),
        ("503", "overloaded"),
    ],
)
def test_a_type_alone_is_understood_in_every_spelling(spelling: str, klass: str) -> None:
    assert CLASSIFIER.classify(type=spelling) == klass


def test_what_litellm_appends_to_a_message_does_not_mislead() -> None:
    appended = (
        "Error code: 400 - Invalid value for 'temperature'\nmodel=chat. context_window_fallbacks=None. fallbacks=[]\n"
        "Deployment Info: request_timeout: None\ntimeout: None"
    )
    assert CLASSIFIER.classify(type="openai.BadRequestError", message=appended) == "bad_request"


def test_request_ids_do_not_make_the_cache_grow() -> None:
    classifier = Classifier()
    for i in range(1000):
        classifier.classify(type="APIError", message=f"Overloaded, request_id req_{i:08x}")
    assert len(classifier._seen) < 20


def test_the_same_error_classifies_the_same_through_the_cache() -> None:
    for klass, told in CASES:
        assert CLASSIFIER.classify(**told) == klass  # type: ignore[arg-type]


@given(st.text(), st.text(), st.text(), st.integers(-5, 1000) | st.text(max_size=5) | st.none())
def test_whatever_is_told_the_class_is_a_known_one(
    type_: str, code: str, message: str, status: int | str | None
) -> None:
    assert CLASSIFIER.classify(type=type_, code=code, message=message, status=status) in CLASSES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {class: overloded, status: [529]}", "did you mean 'overloaded'"),
        ("- {class: overloaded, stauts: [529]}", "did you mean 'status'"),
        ("- {class: overloaded}", "match everything"),
        ("- {class: overloaded, message: ['(']}", "regular expression"),
        ("class: overloaded", "list of matchers"),
        ("- {class: [", "not YAML"),
    ],
)
def test_a_broken_matcher_file_is_refused_with_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        Classifier(text)
