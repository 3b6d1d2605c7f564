"""Makes the files here from the official OpenAPI files: structure only, no prose and no examples.

Usage: strip.py SPECIFICATION_DIRECTORY
"""

import json
import pathlib
import sys

FILES = [
    "common-types/resource-management/v1/types.json",
    "common-types/resource-management/v1/privatelinks.json",
    "common-types/resource-management/v2/types.json",
    "common-types/resource-management/v3/types.json",
    "common-types/resource-management/v5/types.json",
    "recoveryservices/resource-manager/Microsoft.RecoveryServices/stable/2024-04-01/registeredidentities.json",
    "recoveryservices/resource-manager/Microsoft.RecoveryServices/stable/2024-04-01/replicationusages.json",
    "recoveryservices/resource-manager/Microsoft.RecoveryServices/stable/2024-04-01/vaults.json",
    "recoveryservices/resource-manager/Microsoft.RecoveryServices/stable/2024-04-01/vaultusages.json",
    "recoveryservicessiterecovery/resource-manager/Microsoft.RecoveryServices/stable/2024-04-01/service.json",
]
PROSE = {"description", "summary", "title", "externalDocs"}


def strip(node):
    if isinstance(node, list):
        return [strip(one) for one in node]
    if not isinstance(node, dict):
        return node
    # A property may be called `description`: its value is a schema, not text.
    kept = {key: value for key, value in node.items() if key not in PROSE or isinstance(value, dict)}
    kept.pop("x-ms-examples", None)
    return {key: strip(value) for key, value in kept.items()}


def main():
    source, here = pathlib.Path(sys.argv[1]), pathlib.Path(__file__).parent / "specification"
    for name in FILES:
        stripped = strip(json.loads((source / name).read_text(encoding="utf-8")))
        # What the format demands, without what it says.
        if "info" in stripped:
            stripped["info"]["title"] = pathlib.Path(name).stem
        for path in stripped.get("paths", {}).values():
            for operation in path.values():
                for response in operation.get("responses", {}).values() if isinstance(operation, dict) else []:
                    response.setdefault("description", "")
        target = here / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(stripped, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
