"""A mail server for tests: aiosmtpd, told what to demand. Prints its port, then one JSON line for each mail.

Usage: mail_server.py PORT [--tls CERTIFICATE KEY] [--user NAME PASSWORD] [--refuse ADDRESS]
"""

import argparse
import asyncio
import email
import email.policy
import json
import ssl

from aiosmtpd.smtp import SMTP, AuthResult


class Mailbox:
    def __init__(self, refused):
        self.refused = refused

    async def handle_RCPT(self, _server, _session, envelope, address, _options):
        if address == self.refused:
            return "550 there is no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server, session, envelope):
        mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
        told = {
            "to": envelope.rcpt_tos,
            "from": envelope.mail_from,
            "subject": mail["Subject"],
            "id": mail["Message-ID"],
            "text": mail.get_content(),
            "is_secured": session.ssl is not None,
            "user": (session.auth_data or b"").decode() or None,
        }
        print(json.dumps(told), flush=True)
        return "250 OK"


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--tls", nargs=2)
    parser.add_argument("--user", nargs=2)
    parser.add_argument("--refuse")
    arguments = parser.parse_args()
    options = {}
    if arguments.tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*arguments.tls)
        options |= {"tls_context": context, "require_starttls": True}
    if arguments.user:

        def authenticate(_server, _session, _envelope, _mechanism, data):
            given = [data.login.decode(), data.password.decode()]
            return AuthResult(success=given == arguments.user, auth_data=data.login)

        options |= {"auth_required": True, "authenticator": authenticate}
    mailbox = Mailbox(arguments.refuse)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(mailbox, hostname="localhost", loop=loop, **options), "127.0.0.1", arguments.port
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
