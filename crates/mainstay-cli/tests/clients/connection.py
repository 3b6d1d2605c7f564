"""How the programs here reach a lab with Microsoft's Python SDKs, write down what goes over the wire, and talk to the test."""

import json
import sys
import time

from azure.core.credentials import AccessToken
from azure.core.pipeline.policies import SansIOHTTPPolicy

POLL = 1
# In software emulation on a busy machine a guest takes its time.
PATIENCE = 600


def told(step, **what):
    """Tells the test of a step, and goes on when it has looked."""
    print(json.dumps({"step": step, **what}), flush=True)
    if not sys.stdin.readline():
        sys.exit("the test has gone away")


def wait(what, probe):
    """Waits until a probe finds something; answers that."""
    deadline = time.time() + PATIENCE
    while time.time() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(POLL)
    sys.exit(f"waited in vain for {what}")


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
