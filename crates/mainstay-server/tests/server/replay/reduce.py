"""Makes recording.json from a recording of traffic between the az command line and Site Recovery: facts only.

Usage: reduce.py RECORDING.jsonl

Of each request are kept: method, path with names of ours for everybody's names, the keys of its body with values of ours, the
answer's status, the names and forms of the headers that tell how the work goes on, and the shape of its body: keys, types, and those
words that come from a fixed vocabulary. No ids, names, texts or times.
"""

import json
import pathlib
import re
import sys

# Keys whose values are words of the API, not somebody's.
WORDS = {
    "activeLocation", "allowedOperations", "backupStorageVersion", "bcdrState", "customerResolvability", "encryption",
    "enableRdpOnTargetOption", "errorCategory", "errorLevel", "fabricType", "failoverDeploymentModel", "failoverHealth",
    "generation", "groupType", "hasFibreChannelAdapter", "hasPhysicalDisk", "hasSharedVhd", "health",
    "initialReplicationType", "instanceType", "ipAddressType", "kekState", "licenseType", "pairingStatus",
    "primaryFabricProvider", "protectedItemType", "protectionState", "protectionStateDescription", "protectionStatus",
    "provisioningState", "publicNetworkAccess", "recoveryIPAddressType", "replicationHealth", "replicationProviders", "role",
    "scenarioName", "selectionType", "sqlServerLicenseType", "state", "status", "supportedReplicationProviders",
    "switchProviderState", "testFailoverState", "testFailoverStateDescription", "type", "useManagedDisks", "vhdType",
    "vmProtectionState", "vmProtectionStateDescription",
}
HEADERS = ("azure-asyncoperation", "location")
# Whose names they are, in the order in which they are looked for.
NAMES = [
    (r"(?i)/subscriptions/[^/?]+", "/subscriptions/{subscription}"),
    (r"(?i)/resourceGroups/[^/?]+", "/resourceGroups/{group}"),
    (r"/vaults/[^/?]+", "/vaults/{vault}"),
    (r"/replicationOperationStatus/[^/?]+", "/replicationOperationStatus/{operation}"),
    (r"/operationresults/[^/?]+", "/operationresults/{operation}"),
    (r"/replicationPolicies/[^/?]+", "/replicationPolicies/{policy}"),
    (r"/replicationFabrics/[^/?]+", "/replicationFabrics/{fabric}"),
    (r"/replicationProtectionContainers/[^/?]+", "/replicationProtectionContainers/{container}"),
    (r"/replicationProtectionContainerMappings/[^/?]+", "/replicationProtectionContainerMappings/{mapping}"),
    (r"/replicationProtectableItems/[^/?]+", "/replicationProtectableItems/{vm}"),
    (r"/replicationProtectedItems/[^/?]+", "/replicationProtectedItems/{item}"),
    (r"/replicationRecoveryPlans/[^/?]+", "/replicationRecoveryPlans/{plan}"),
    (r"/virtualNetworks/[^/?]+", "/virtualNetworks/{network}"),
    (r"/subnets/[^/?]+", "/subnets/{subnet}"),
    (r"/storageAccounts/[^/?]+", "/storageAccounts/{storage}"),
    (r"(?<=skipToken=)[^&]+", "{page}"),
]
# Values of requests that are somebody's.
VALUES = {"disksToInclude": ["{disk}"], "vhdId": "{disk}", "location": "{location}", "targetAzureVmName": "{vmName}"}


def template(text):
    text = re.sub(r"^https://[^/]+", "", text)
    for pattern, name in NAMES:
        text = re.sub(pattern, name, text)
    return text


def request(node, key=None):
    if key in VALUES:
        return VALUES[key]
    if isinstance(node, dict):
        return {name: request(value, name) for name, value in node.items()}
    if isinstance(node, list):
        return [request(one, key) for one in node]
    return template(node) if isinstance(node, str) else node


def shape(node, key=None):
    if isinstance(node, dict):
        return {name: shape(value, name) for name, value in node.items()}
    if isinstance(node, list):
        return [shape(one, key) for one in node]
    if node is None:
        return "null"
    if isinstance(node, bool):
        return "bool"
    if isinstance(node, (int, float)):
        return "number"
    return f"={node}" if key in WORDS else "text"


def path_of(url):
    path, _, query = template(url).partition("?")
    kept = [pair for pair in query.split("&") if not pair.startswith("api-version=")]
    return "?".join([path, "&".join(kept)]) if kept else path


def main():
    rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
    reduced = []
    for row in rows:
        kept = {"method": row["method"], "path": path_of(row["url"])}
        if row["request"]:
            kept["request"] = request(row["request"])
        kept["status"] = row["status"]
        headers = {name: path_of(row["headers"][name][0]) for name in HEADERS if name in row["headers"]}
        if headers:
            kept["headers"] = headers
        if row["response"] is not None:
            kept["body"] = shape(row["response"])
        # Asked again and again until it was done: once is as good.
        if not reduced or kept != reduced[-1]:
            reduced.append(kept)
    target = pathlib.Path(__file__).parent / "recording.json"
    target.write_text(json.dumps(reduced, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
