// Judges recorded requests and answers by the official OpenAPI files, with Microsoft's own validator (oav).
//
// Usage: node judge.mjs SPECIFICATION_DIRECTORY RECORDING.jsonl
// Prints one JSON object: how many pairs were judged, which were left out, and what is wrong.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const load = createRequire(`${process.env.MAINSTAY_NODE_MODULES}/`);
const { LiveValidator } = load("oav/dist/lib/liveValidation/liveValidator");

const [directory, recording] = process.argv.slice(2);

// Called by every client and described by no official file: see docs/asr-compatibility.md.
const undescribed = [/\/replicationOperationStatus\//i, /\/operationresults\//i];

// What the service's own recorded answers have too, and the validator does not take: the type has a subtype, or is a subtype's
// subtype, and oav then looks for the word in the wrong generation.
const not_found = "DISCRIMINATOR_VALUE_NOT_FOUND";
const recorded = [
  { operation: /^ReplicationProtectableItems_/, code: not_found, message: '"HyperVVirtualMachine"' },
  { operation: /^ReplicationJobs_/, code: not_found, message: '"RecoveryPlanGroupTaskDetails"' },
  { operation: /^ReplicationJobs_/, code: not_found, message: '"VirtualMachineTaskDetails"' },
];
const is_recorded = ({ operation, code, message }) =>
  recorded.some((known) => known.operation.test(operation) && known.code === code && message.includes(known.message));

const validator = new LiveValidator({
  directory,
  swaggerPathsPattern: ["specification/**/2024-04-01/*.json"],
  excludedSwaggerPathsPattern: [],
  git: { shouldClone: false },
  isPathCaseSensitive: false,
  loadValidatorInBackground: false,
  loadValidatorInInitialize: true,
});
await validator.initialize();

const outcome = { judged: 0, left_out: 0, operations: {}, recorded: [], errors: [] };
for (const line of readFileSync(recording, "utf-8").split("\n").filter(Boolean)) {
  const { method, url, request_headers, request_body, status, response_headers, response_body } = JSON.parse(line);
  if (undescribed.some((pattern) => pattern.test(url))) {
    outcome.left_out += 1;
    continue;
  }
  const result = await validator.validateLiveRequestResponse({
    liveRequest: { method, url, headers: request_headers, body: request_body ?? undefined },
    liveResponse: { statusCode: String(status), headers: response_headers, body: response_body ?? undefined },
  });
  outcome.judged += 1;
  const operation = result.requestValidationResult.operationInfo?.operationId ?? "?";
  outcome.operations[operation] = (outcome.operations[operation] ?? 0) + 1;
  for (const [side, found] of [
    ["request", result.requestValidationResult],
    ["response", result.responseValidationResult],
  ]) {
    if (found.runtimeException) {
      outcome.errors.push({ side, method, url, operation, code: found.runtimeException.code, message: found.runtimeException.message });
    }
    for (const { code, message, pathsInPayload: at } of found.errors) {
      const error = { side, method, url, operation, code, message, at };
      (is_recorded(error) ? outcome.recorded : outcome.errors).push(error);
    }
  }
}
console.log(JSON.stringify(outcome));
