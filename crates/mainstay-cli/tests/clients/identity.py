"""Signs in with azure-identity as a service principal and works with Microsoft's Python SDK.

Usage: identity.py URL CA_FILE RESOURCE_GROUP VAULT; AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET in the environment.
Exits with 0 when everything was as it should be.
"""

import os
import sys

from azure.core.exceptions import ClientAuthenticationError
from azure.identity import ClientSecretCredential
from azure.mgmt.recoveryservicessiterecovery import SiteRecoveryManagementClient


def main():
    server, ca_file, group, vault = sys.argv[1:]
    tenant, client_id = os.environ["AZURE_TENANT_ID"], os.environ["AZURE_CLIENT_ID"]

    def sign_in(secret):
        return ClientSecretCredential(
            tenant_id=tenant,
            client_id=client_id,
            client_secret=secret,
            authority=server,
            disable_instance_discovery=True,
            connection_verify=ca_file,
        )

    credential = sign_in(os.environ["AZURE_CLIENT_SECRET"])
    client = SiteRecoveryManagementClient(
        credential, tenant, base_url=server, connection_verify=ca_file, polling_interval=1
    )
    fabrics = {fabric.name for fabric in client.replication_fabrics.list(group, vault)}
    assert fabrics == {"home", "recovery"}, fabrics
    providers = client.replication_recovery_services_providers
    provider = next(iter(providers.list_by_replication_fabrics(group, vault, "home")))
    refreshed = providers.begin_refresh_provider(group, vault, "home", provider.name).result()
    assert refreshed.properties.connection_status == "Connected", refreshed
    try:
        sign_in("wrong").get_token("https://management.azure.com/.default")
    except ClientAuthenticationError as error:
        assert "mainstay principal list" in str(error), error
    else:
        sys.exit("a wrong secret was accepted")


if __name__ == "__main__":
    main()
