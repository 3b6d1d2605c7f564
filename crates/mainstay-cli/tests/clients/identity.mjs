// Signs in with @azure/identity as a service principal and works with Microsoft's JavaScript SDK.
//
// Usage: node identity.mjs URL RESOURCE_GROUP VAULT; AZURE_TENANT_ID, AZURE_CLIENT_ID, AZURE_CLIENT_SECRET and
// NODE_EXTRA_CA_CERTS in the environment. Exits with 0 when everything was as it should be.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const load = createRequire(`${process.env.MAINSTAY_NODE_MODULES}/`);
const { ClientSecretCredential } = load("@azure/identity");
const { SiteRecoveryManagementClient } = load("@azure/arm-recoveryservices-siterecovery");

const [server, group, vault] = process.argv.slice(2);
const { AZURE_TENANT_ID: tenant, AZURE_CLIENT_ID: clientId, AZURE_CLIENT_SECRET: secret } = process.env;
const signIn = (secret) =>
  new ClientSecretCredential(tenant, clientId, secret, { authorityHost: server, disableInstanceDiscovery: true });

const client = new SiteRecoveryManagementClient(signIn(secret), tenant, { endpoint: server });
const fabrics = [];
for await (const fabric of client.replicationFabrics.list(vault, group)) fabrics.push(fabric.name);
assert.deepEqual(fabrics.sort(), ["home", "recovery"]);
const providers = client.replicationRecoveryServicesProviders;
const { value: provider } = await providers.listByReplicationFabrics(vault, group, "home").next();
const refreshed = await providers.beginRefreshProviderAndWait(vault, group, "home", provider.name, {
  updateIntervalInMs: 1000,
});
assert.equal(refreshed.properties.connectionStatus, "Connected");
await assert.rejects(signIn("wrong").getToken("https://management.azure.com/.default"), /mainstay principal list/);
