"""Standard Webhooks, both ways: what Flyball sends is signed, and what it is sent is believed only when it is."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, SecretStr
from standardwebhooks import Webhook as Signer
from standardwebhooks import WebhookVerificationError

from flyball.core.errors import FlyballError


class SignatureRefused(FlyballError):
    """Not signed with a secret that is known, changed on its way, or more than five minutes old."""


def _is_key(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value().removeprefix("whsec_")
    try:
        size = len(base64.b64decode(text + "=" * (-len(text) % 4), validate=True))
    except (binascii.Error, ValueError) as e:
        raise ValueError("a secret is whsec_ and base64; this one is not base64") from e
    if not 24 <= size <= 64:
        raise ValueError(f"a secret has 24 to 64 bytes; this one has {size}")
    return secret


SigningSecret = Annotated[SecretStr, AfterValidator(_is_key)]
"""A setting that holds a secret to sign with: `whsec_` and 24 to 64 bytes in base64."""


def signed_headers(secrets: Sequence[SecretStr], message_id: str, body: str, now: float) -> dict[str, str]:
    """The three headers. Signed with each secret, so that secrets can be changed without a gap.

    `message_id` is the same for every try of one message: receivers tell copies by it.
    """
    when = datetime.fromtimestamp(int(now), UTC)
    signatures = (Signer(s.get_secret_value()).sign(message_id, when, body) for s in secrets)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": " ".join(signatures),
    }


def check_signature(secrets: Sequence[SecretStr], headers: Mapping[str, str], body: bytes) -> None:
    """Raises: SignatureRefused unless one of the secrets signed exactly this, less than five minutes ago by this machine's clock."""
    why = "no secret is known"
    for secret in secrets:
        try:
            Signer(secret.get_secret_value()).verify(body, dict(headers), json_parse=False)
        except WebhookVerificationError as e:
            why = str(e)
        except ValueError:
            # The library splits and decodes before it compares: headers that are no signature at all end here.
            why = "the signature cannot be read"
        else:
            return
    raise SignatureRefused(f"not believed: {why}")
