// The tutorial's journey, driven by Microsoft's JavaScript SDK for Site Recovery.
//
// Usage: node journey.mjs LAB_JSON VM RECORDING [API_VERSION]
//
// Writes every request and its answer to RECORDING, one JSON object per line. Prints one JSON line per step. Between the
// steps it reads a line from standard input: the test that runs it looks at the guest there. Exits with 0 when every step
// ended as it should.

import assert from "node:assert/strict";
import { appendFileSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const load = createRequire(`${process.env.MAINSTAY_NODE_MODULES}/`);
const { SiteRecoveryManagementClient } = load("@azure/arm-recoveryservices-siterecovery");

const POLL = 1000;
// In software emulation on a busy machine a guest takes its time.
const PATIENCE = 600_000;

const [labFile, vmName, recording, apiVersion] = process.argv.slice(2);
const lab = JSON.parse(readFileSync(labFile, "utf-8"));

// What @azure/identity would do, with a token of the server's own.
const credential = { getToken: async () => ({ token: lab.token, expiresOnTimestamp: Date.now() + 86_400_000 }) };

// Writes down what goes over the wire, without the token.
const recorder = {
  name: "recorder",
  async sendRequest(request, next) {
    const response = await next(request);
    const headers = { ...request.headers.toJSON() };
    delete headers.authorization;
    const body = (text) => (text ? JSON.parse(text) : null);
    appendFileSync(
      recording,
      `${JSON.stringify({
        method: request.method,
        url: request.url,
        request_headers: headers,
        request_body: body(request.body),
        status: response.status,
        response_headers: response.headers.toJSON(),
        response_body: body(response.bodyAsText),
      })}\n`,
    );
    return response;
  },
};

const client = new SiteRecoveryManagementClient(credential, lab.subscription, {
  endpoint: lab.url,
  additionalPolicies: [{ policy: recorder, position: "perRetry" }],
  ...(apiVersion ? { apiVersion } : {}),
});
const waiting = { updateIntervalInMs: POLL };

const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
async function told(step) {
  console.log(JSON.stringify({ step }));
  if ((await answers.next()).done) {
    throw new Error("the test has gone away");
  }
}

async function all(pages) {
  const found = [];
  for await (const one of pages) {
    found.push(one);
  }
  return found;
}

async function until(what, probe) {
  const deadline = Date.now() + PATIENCE;
  while (Date.now() < deadline) {
    const found = await probe();
    if (found) {
      return found;
    }
    await sleep(POLL);
  }
  throw new Error(`waited in vain for ${what}`);
}

const where = [lab.vault, lab.resource_group];
const home = lab.sites[0].fabric;

const fabrics = await all(client.replicationFabrics.list(...where));
assert(fabrics.some((fabric) => fabric.name === home && fabric.properties.bcdrState === "Valid"));
const [provider] = await all(client.replicationRecoveryServicesProviders.listByReplicationFabrics(...where, home));
assert.equal(provider.properties.connectionStatus, "Connected");
await client.replicationRecoveryServicesProviders.beginRefreshProviderAndWait(...where, home, provider.name, waiting);
const [container] = await all(client.replicationProtectionContainers.listByReplicationFabrics(...where, home));
const place = [...where, home, container.name];

const policy = await client.replicationPolicies.beginCreateAndWait(
  ...where,
  "sdk",
  {
    properties: {
      providerSpecificInput: {
        instanceType: "HyperVReplicaAzure",
        recoveryPointHistoryDuration: 2,
        applicationConsistentSnapshotFrequencyInHours: 0,
        replicationInterval: 30,
      },
    },
  },
  waiting,
);
assert.equal(policy.properties.providerSpecificDetails.replicationInterval, 30);
const mapping = await client.replicationProtectionContainerMappings.beginCreateAndWait(
  ...place,
  "sdk",
  { properties: { policyId: policy.id, targetProtectionContainerId: "Microsoft Azure" } },
  waiting,
);
assert.equal(mapping.properties.state, "Paired");
const protectable = (
  await all(client.replicationProtectableItems.listByReplicationProtectionContainers(...place))
).find((one) => one.properties.friendlyName === vmName);
assert.equal(protectable.properties.protectionStatus, "Unprotected");
const disks = protectable.properties.customDetails.diskDetails.map((disk) => disk.vhdId);

const items = client.replicationProtectedItems;
const here = [...place, "sdk-item"];
const item = await items.beginCreateAndWait(
  ...here,
  {
    properties: {
      policyId: policy.id,
      protectableItemId: protectable.id,
      providerSpecificDetails: {
        instanceType: "HyperVReplicaAzure",
        hvHostVmId: protectable.name,
        vmName,
        osType: "Linux",
        vhdId: disks[0],
        disksToInclude: disks,
      },
    },
  },
  waiting,
);
assert.equal(item.properties.providerSpecificDetails.instanceType, "HyperVReplicaAzure");

const state = async () => (await items.get(...here)).properties;
const points = () => all(client.recoveryPoints.listByReplicationProtectedItems(...here));
await until("protection", async () => (await state()).protectionState === "Protected");
const [point] = await until("recovery points", async () => {
  const found = await points();
  return found.length > 0 && found;
});
assert.equal((await client.recoveryPoints.get(...here, point.name)).id, point.id);
await told("protected");

await items.beginTestFailoverAndWait(
  ...here,
  {
    properties: {
      failoverDirection: "PrimaryToRecovery",
      networkType: "NoNetworkAttachAsInput",
      providerSpecificDetails: { instanceType: "HyperVReplicaAzure" },
    },
  },
  waiting,
);
assert.deepEqual((await state()).allowedOperations, ["TestFailoverCleanup"]);
await told("test-failover");
await items.beginTestFailoverCleanupAndWait(...here, { properties: { comments: "works" } }, waiting);
assert.equal((await state()).failoverHealth, "Normal");
await told("test-failover-cleanup");

await items.beginUnplannedFailoverAndWait(
  ...here,
  {
    properties: {
      failoverDirection: "PrimaryToRecovery",
      sourceSiteOperations: "NotRequired",
      providerSpecificDetails: { instanceType: "HyperVReplicaAzure", recoveryPointId: (await points())[0].id },
    },
  },
  waiting,
);
assert.equal((await state()).activeLocation, "Recovery");
await told("failover");

await items.beginApplyRecoveryPointAndWait(
  ...here,
  {
    properties: {
      recoveryPointId: (await points()).at(-1).id,
      providerSpecificDetails: { instanceType: "HyperVReplicaAzure" },
    },
  },
  waiting,
);
await told("change-recovery-point");
await items.beginFailoverCommitAndWait(...here, waiting);
assert.equal((await points()).length, 0);
await told("failover-commit");

// The operation ends with the failback, which waits for its completion: nobody waits for it here.
const failback = items.beginPlannedFailoverAndWait(
  ...here,
  {
    properties: {
      failoverDirection: "RecoveryToPrimary",
      providerSpecificDetails: {
        instanceType: "HyperVReplicaAzureFailback",
        dataSyncOption: "ForDownTime",
        recoveryVmCreationOption: "NoAction",
      },
    },
  },
  waiting,
);
const jobs = client.replicationJobs;
const job = await until("the failback to wait for its completion", async () => {
  const filter = "JobStatus eq 'Suspended' and JobName eq 'Failback'";
  return (await all(jobs.list(...where, { filter })))[0];
});
assert(job.properties.allowedActions.includes("Resume"));
await told("failback-synchronize");
await jobs.beginResumeAndWait(...where, job.name, { properties: { comments: "go" } }, waiting);
await failback;
assert.equal((await jobs.get(...where, job.name)).properties.state, "Succeeded");
assert.equal((await state()).activeLocation, "Primary");
await told("failback-complete");
await items.beginFailoverCommitAndWait(...here, waiting);
await told("failback-commit");

await items.beginReprotectAndWait(
  ...here,
  {
    properties: {
      failoverDirection: "PrimaryToRecovery",
      providerSpecificDetails: { instanceType: "HyperVReplicaAzure" },
    },
  },
  waiting,
);
await until("protection", async () => (await state()).protectionState === "Protected");
await told("reverse-replication");

await items.beginPlannedFailoverAndWait(
  ...here,
  {
    properties: {
      failoverDirection: "PrimaryToRecovery",
      providerSpecificDetails: { instanceType: "HyperVReplicaAzure" },
    },
  },
  waiting,
);
assert.equal((await state()).activeLocation, "Recovery");
await told("planned-failover");

await items.beginDeleteAndWait(
  ...here,
  { properties: { disableProtectionReason: "NotSpecified" } },
  waiting,
);
assert.equal((await all(items.list(...where))).length, 0);
await client.replicationProtectionContainerMappings.beginDeleteAndWait(...place, "sdk", {}, waiting);
await client.replicationPolicies.beginDeleteAndWait(...where, "sdk", waiting);
const names = (await all(jobs.list(...where))).map((one) => one.properties.scenarioName);
assert.equal(names[0], "RemoveProtectionProfile");
assert(names.includes("AddProtectionProfile"));
assert((await all(client.replicationEvents.list(...where))).length > 0);
await told("disabled");
answers.return?.();
process.stdin.destroy();
