"""How the programs here reach a lab with Microsoft's Python SDKs, and how they write down what goes over the wire."""

import json
import time

from azure.core.credentials import AccessToken
from azure.core.pipeline.policies import SansIOHTTPPolicy

POLL = 1


class StaticToken:
    """What azure-identity would do, with a token of the server's own."""

    def __init__(self, token):
        self.token = token

    def get_token(self, *_scopes, **_options):
        return AccessToken(self.token, int(time.time()) + 24 * 3600)


class Recorder(SansIOHTTPPolicy):
    """Writes down what goes over the wire, without the token."""

    def __init__(self, path):
        super().__init__()
        self.file = open(path, "w", encoding="utf-8")

    def on_response(self, request, response):
        sent, got = request.http_request, response.http_response
        body = sent.content if hasattr(sent, "content") else sent.data
        got.read()
        text = got.text()
        self.file.write(
            json.dumps(
                {
                    "method": sent.method,
                    "url": sent.url,
                    "request_headers": {
                        key.lower(): value for key, value in sent.headers.items() if key != "Authorization"
                    },
                    "request_body": json.loads(body) if body else None,
                    "status": got.status_code,
                    "response_headers": {key.lower(): value for key, value in got.headers.items()},
                    "response_body": json.loads(text) if text else None,
                }
            )
            + "\n"
        )
        self.file.flush()


def options_of(lab, recording, version=None):
    """What the SDKs' clients are made with: a lab, and where every request and answer is written down."""
    return {
        "credential": StaticToken(lab["token"]),
        "subscription_id": lab["subscription"],
        "base_url": lab["url"],
        "connection_verify": lab["ca_file"],
        "polling_interval": POLL,
        "per_retry_policies": [Recorder(recording)],
        **({"api_version": version} if version else {}),
    }
