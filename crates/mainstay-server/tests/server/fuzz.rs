//! Nonsense from outside: bodies, paths and queries that were bent out of shape. Never an error of the server's own, and what is
//! refused has changed nothing.
//!
//! The mutations come from a seed, the same each time; `MAINSTAY_FUZZ_SEED` chooses another, `MAINSTAY_FUZZ_ROUNDS` more of them.

use std::sync::Arc;

use crate::support::{MAC, Seed, Server, put_item, seed};
use mainstay_control::{
    Control, SystemClock,
    app::Requester,
    db::{ItemRecord, JobCondition, JobState},
};
use mainstay_model::Ending;
use proptest::{
    prelude::*,
    test_runner::{RngAlgorithm, TestRng},
};
use serde_json::{Value, json};
use uuid::Uuid;

/// Times that each place of a body is bent.
const ROUNDS: usize = 8;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn rng() -> TestRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&setting("MAINSTAY_FUZZ_SEED", 7).to_le_bytes());
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

/// An operation that takes a body, with one that it takes.
struct Operation {
    method: &'static str,
    path: String,
    body: Value,
}

fn operations(server: &Server, seed: &Seed) -> Vec<Operation> {
    let vault = |method, path: &str, body| Operation { method, path: server.at(path), body };
    let details = json!({ "instanceType": "HyperVReplicaAzure", "recoveryPointId": "Latest" });
    let container = format!("replicationFabrics/home/replicationProtectionContainers/{}", seed.container);
    let item = format!("{container}/replicationProtectedItems/vm1");
    let on_item = |verb: &str, properties: Value| {
        vault("POST", &format!("{item}/{verb}"), json!({ "properties": properties }))
    };
    let policy_id = server.at("replicationPolicies/policy");
    let protectable =
        |vm: &dyn std::fmt::Display| server.at(&format!("{container}/replicationProtectableItems/{vm}"));
    let identity = json!({ "tenantId": "t", "applicationId": "a", "objectId": "o", "audience": "x", "aadAuthority": "y" });
    let policy = json!({
        "instanceType": "HyperVReplicaAzure",
        "recoveryPointHistoryDuration": 24,
        "applicationConsistentSnapshotFrequencyInHours": 1,
        "replicationInterval": 300,
        "onlineReplicationStartTime": null,
        "storageAccounts": [],
    });
    let mapping = json!({ "properties": {
        "recoveryFabricName": "Microsoft Azure",
        "recoveryNetworkId": server.at("replicationFabrics/away/replicationNetworks/lan"),
        "fabricSpecificDetails": { "instanceType": "VmmToAzure" },
    } });
    let network_mapping = "replicationFabrics/home/replicationNetworks/lan/replicationNetworkMappings/map";
    let nic = json!({
        "nicId": MAC,
        "selectionType": "SelectedByUser",
        "recoveryVMNetworkId": "lan",
        "macPolicy": "Keep",
        "ipConfigs": [{ "isPrimary": true, "isSeletedForFailover": true, "recoveryStaticIPAddress": "10.0.0.7/24" }],
    });
    let action = json!({
        "actionName": "look",
        "failoverTypes": ["TestFailover"],
        "failoverDirections": ["PrimaryToRecovery"],
        "customDetails": { "instanceType": "ManualActionDetails", "description": "Is it there?" },
    });
    let plan = json!({
        "primaryFabricId": server.at("replicationFabrics/home"),
        "recoveryFabricId": "Microsoft Azure",
        "failoverDeploymentModel": "ResourceManager",
        "groups": [{
            "groupType": "Boot",
            "replicationProtectedItems": [{ "id": server.at(&item), "virtualMachineId": seed.item.vm }],
            "startGroupActions": [action],
            "endGroupActions": [],
        }],
    });
    let plan_failover = json!({
        "failoverDirection": "PrimaryToRecovery",
        "networkType": "NoNetworkAttachAsInput",
        "sourceSiteOperations": "Required",
        "providerSpecificDetails": [{ "instanceType": "HyperVReplicaAzure", "recoveryPointType": "Latest" }],
    });
    let certificate: String =
        server.authority_pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let group = format!("/subscriptions/{}/resourceGroups/group", server.tenant);
    let other = |method, path: String, body| Operation { method, path, body };
    vec![
        vault(
            "PUT",
            "replicationFabrics/fabric1",
            json!({ "properties": { "customDetails": { "instanceType": "FabricSpecificCreationInput" } } }),
        ),
        vault(
            "PUT",
            &format!("replicationFabrics/home/replicationRecoveryServicesProviders/{}", seed.home),
            json!({ "properties": {
                "machineName": "home-host",
                "authenticationIdentityInput": identity.clone(),
                "resourceAccessIdentityInput": identity,
            } }),
        ),
        vault(
            "PUT",
            "replicationPolicies/policy1",
            json!({ "properties": { "providerSpecificInput": policy.clone() } }),
        ),
        vault(
            "PATCH",
            "replicationPolicies/policy",
            json!({ "properties": { "replicationProviderSettings": policy } }),
        ),
        vault(
            "PUT",
            &format!("{container}/replicationProtectionContainerMappings/mapping"),
            json!({ "properties": {
                "policyId": policy_id,
                "targetProtectionContainerId": "Microsoft Azure",
                "providerSpecificInput": { "instanceType": "ReplicationProviderSpecificContainerMappingInput" },
            } }),
        ),
        vault(
            "POST",
            &format!("{container}/replicationProtectionContainerMappings/mapping/remove"),
            json!({ "properties": { "providerSpecificInput": { "instanceType": "" } } }),
        ),
        vault(
            "POST",
            &format!("{container}/discoverProtectableItem"),
            json!({ "properties": { "friendlyName": "vm3", "ipAddress": "10.0.0.7", "osType": "Linux" } }),
        ),
        vault("PUT", network_mapping, mapping.clone()),
        vault("PATCH", network_mapping, mapping),
        vault(
            "PUT",
            &format!("{container}/replicationProtectedItems/vm2"),
            json!({ "properties": {
                "policyId": policy_id,
                "protectableItemId": protectable(&seed.other_vm),
                "providerSpecificDetails": {
                    "instanceType": "HyperVReplicaAzure",
                    "hvHostVmId": seed.other_vm,
                    "osType": "Linux",
                    "vhdId": "vda",
                    "disksToInclude": ["vda"],
                    "targetAzureVmName": "vm2",
                    "targetVmSize": "1x1024",
                    "useManagedDisks": "true",
                    "enableRdpOnTargetOption": "Never",
                },
            } }),
        ),
        vault(
            "PUT",
            &item,
            json!({ "properties": {
                "policyId": policy_id,
                "protectableItemId": protectable(&seed.item.vm),
                "providerSpecificDetails": {
                    "instanceType": "HyperVReplicaAzure",
                    "recoveryAzureVmName": "vm1",
                    "recoveryAzureVMSize": "2x1024",
                    "selectedRecoveryAzureNetworkId": "lan",
                    "vmNics": [nic.clone()],
                },
            } }),
        ),
        vault(
            "PATCH",
            &item,
            json!({ "properties": {
                "recoveryAzureVMName": "vm1",
                "recoveryAzureVMSize": "2x1024",
                "selectedRecoveryAzureNetworkId": "lan",
                "selectedTfoAzureNetworkId": "island",
                "selectedSourceNicId": MAC,
                "vmNics": [nic],
                "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure", "useManagedDisks": "false" },
            } }),
        ),
        on_item(
            "testFailover",
            json!({
                "failoverDirection": "PrimaryToRecovery",
                "networkType": "VmNetworkAsInput",
                "networkId": "island",
                "providerSpecificDetails": details.clone(),
            }),
        ),
        on_item("testFailoverCleanup", json!({ "comments": "done" })),
        on_item(
            "unplannedFailover",
            json!({
                "failoverDirection": "PrimaryToRecovery",
                "sourceSiteOperations": "NotRequired",
                "providerSpecificDetails": details.clone(),
            }),
        ),
        on_item(
            "plannedFailover",
            json!({ "failoverDirection": "PrimaryToRecovery", "providerSpecificDetails": details }),
        ),
        on_item(
            "plannedFailover",
            json!({
                "failoverDirection": "RecoveryToPrimary",
                "providerSpecificDetails": {
                    "instanceType": "HyperVReplicaAzureFailback",
                    "dataSyncOption": "ForSynchronization",
                    "recoveryVmCreationOption": "NoAction",
                    "providerIdForAlternateRecovery": seed.home,
                },
            }),
        ),
        on_item(
            "applyRecoveryPoint",
            json!({ "recoveryPointId": "Latest", "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" } }),
        ),
        on_item(
            "reProtect",
            json!({
                "failoverDirection": "PrimaryToRecovery",
                "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure", "hvHostVmId": seed.item.vm, "osType": "Linux" },
            }),
        ),
        vault("PUT", "replicationRecoveryPlans/plan1", json!({ "properties": plan.clone() })),
        vault("PATCH", "replicationRecoveryPlans/plan1", json!({ "properties": plan })),
        // Of a plan that does not exist: the body is looked at first.
        vault(
            "POST",
            "replicationRecoveryPlans/absent/testFailover",
            json!({ "properties": plan_failover.clone() }),
        ),
        vault(
            "POST",
            "replicationRecoveryPlans/absent/unplannedFailover",
            json!({ "properties": plan_failover.clone() }),
        ),
        vault(
            "POST",
            "replicationRecoveryPlans/absent/plannedFailover",
            json!({ "properties": plan_failover }),
        ),
        vault(
            "POST",
            "replicationRecoveryPlans/absent/testFailoverCleanup",
            json!({ "properties": { "comments": "done" } }),
        ),
        on_item("resolveHealthErrors", json!({ "healthErrors": [{ "healthErrorId": "161011" }] })),
        on_item(
            "remove",
            json!({
                "disableProtectionReason": "NotSpecified",
                "replicationProviderInput": { "instanceType": "DisableProtectionProviderSpecificInput" },
            }),
        ),
        vault(
            "POST",
            &format!("replicationJobs/{}/resume", Uuid::nil()),
            json!({ "properties": { "comments": "go on" } }),
        ),
        vault(
            "POST",
            "replicationJobs/export",
            json!({
                "startTime": "2026-01-01T00:00:00Z",
                "endTime": "2026-12-31T00:00:00Z",
                "fabricId": "home",
                "affectedObjectTypes": "ProtectionEntity",
                "jobStatus": "Succeeded",
                "jobOutputType": "Json",
                "jobName": "EnableDr",
                "timezoneOffset": 60.0,
            }),
        ),
        vault(
            "PUT",
            "replicationAlertSettings/defaultAlertSetting",
            json!({ "properties": { "sendToOwners": "Send", "customEmailAddresses": ["a@example.org"], "locale": "en-US" } }),
        ),
        vault(
            "PUT",
            "replicationVaultSettings/default",
            json!({ "properties": { "migrationSolutionId": "/a/b" } }),
        ),
        vault(
            "PUT",
            "extendedInformation/vaultExtendedInfo",
            json!({ "properties": { "integrityKey": "AAAA", "algorithm": "None" } }),
        ),
        vault(
            "PATCH",
            "extendedInformation/vaultExtendedInfo",
            json!({ "properties": { "algorithm": "None" } }),
        ),
        vault(
            "PUT",
            "certificates/one",
            json!({ "properties": { "authType": "AAD", "certificate": certificate } }),
        ),
        other(
            "PUT",
            server.vault.id(),
            json!({ "location": "mainstay", "sku": { "name": "Standard" }, "tags": { "a": "b" }, "properties": {} }),
        ),
        other("PATCH", server.vault.id(), json!({ "tags": { "stage": "test" } })),
        other(
            "POST",
            format!("{group}/providers/Microsoft.RecoveryServices/locations/here/checkNameAvailability"),
            json!({ "type": "Microsoft.RecoveryServices/Vaults", "name": "vault" }),
        ),
        other("POST", "/api/v1/tokens".to_owned(), json!({ "label": "x", "role": "Reader", "days": 1 })),
        other(
            "POST",
            "/api/v1/servicePrincipals".to_owned(),
            json!({ "name": "x", "role": "Reader", "days": 1 }),
        ),
        other(
            "POST",
            "/api/v1/register".to_owned(),
            json!({ "secret": "x", "host": "h", "version": "1", "certificateRequest": "x" }),
        ),
    ]
}

/// Pointers to every value within a body, the whole included.
fn places(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| places(value, format!("{at}/{name}"), found));
        }
        Value::Array(entries) => {
            entries
                .iter()
                .enumerate()
                .for_each(|(index, value)| places(value, format!("{at}/{index}"), found));
        }
        _ => {}
    }
    found.push(at);
}

/// A value that does not belong where it is put.
fn nonsense(rng: &mut TestRng) -> Value {
    let deep = (0..100).fold(json!(1), |inner, _| json!({ "properties": [inner] }));
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(4_000_000_000_u64),
        json!(u64::MAX),
        json!(1e308),
        json!(0.5),
        json!(""),
        json!(" "),
        json!("nonsense"),
        json!("ä\u{0}\u{202e}"),
        json!("../../../etc/passwd"),
        json!("'; DROP TABLE items; --"),
        json!("x".repeat(70_000)),
        json!([]),
        json!([[null, "x", 1]]),
        json!({}),
        json!({ "instanceType": "A2A", "properties": {} }),
        deep,
    ];
    values[rng.random_range(0..values.len())].clone()
}

/// A body bent at a place: a value replaced, left out, or written twice; now and then the text itself is broken.
fn bend(body: &Value, place: &str, rng: &mut TestRng) -> Vec<u8> {
    let mut bent = body.clone();
    let (parent, name) = place.rsplit_once('/').unwrap_or(("", ""));
    match rng.random_range(0..12) {
        0 if !place.is_empty() => match bent.pointer_mut(parent).unwrap() {
            Value::Object(fields) => drop(fields.remove(name)),
            Value::Array(entries) => entries.clear(),
            _ => unreachable!("a place's parent holds it"),
        },
        1 => {
            // The same field twice.
            let text = bent.to_string();
            return format!("{{\"properties\":{},{}", nonsense(rng), &text[1..]).into_bytes();
        }
        2 => {
            let mut text = bent.to_string().into_bytes();
            text[rng.random_range(0..bent.to_string().len())] = 0xff;
            return text;
        }
        3 => {
            let mut text = bent.to_string().into_bytes();
            text.truncate(rng.random_range(0..bent.to_string().len()));
            return text;
        }
        4 => return format!("{}{}", "[".repeat(50_000), "]".repeat(50_000)).into_bytes(),
        5 => {
            if let Some(Value::Object(fields)) = bent.pointer_mut(place) {
                fields.insert("unknown\u{0}".to_owned(), nonsense(rng));
            }
        }
        _ => *bent.pointer_mut(place).unwrap() = nonsense(rng),
    }
    bent.to_string().into_bytes()
}

/// All that a client can change, in one text. What reconcilers note of health is left out.
async fn state(control: &Arc<Control>) -> String {
    let items: Vec<_> = control
        .db
        .items()
        .await
        .unwrap()
        .iter()
        .map(|item| {
            let ItemRecord { name, policy, target, state, resolved_errors, .. } = ItemRecord::clone(item);
            (name, policy, target, state, resolved_errors)
        })
        .collect();
    let all = JobCondition::All(Vec::new());
    format!(
        "{items:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{}",
        control.vault().await.unwrap(),
        control.hosted_vaults().await.unwrap(),
        control.recovery_plans().await.unwrap(),
        control.fabrics().await.unwrap(),
        control.policies().await.unwrap(),
        control.container_mappings().await.unwrap(),
        control.network_mappings().await.unwrap(),
        control.providers().await.unwrap(),
        control.alert_setting().await.unwrap(),
        control.vault_settings().await.unwrap(),
        control.tokens().await.unwrap(),
        control.service_principals().await.unwrap(),
        control.db.count_jobs(&all).await.unwrap(),
    )
}

/// Ends what an accepted request began, and puts everything back. A job that waits for its host, which is away for ever, is
/// ended by hand while the server is down.
async fn restore(mut server: Server, control: &Arc<Control>, seed: &Seed) -> Server {
    let open = control.db.open_jobs().await.unwrap();
    if !open.is_empty() {
        let end = async || {
            for mut job in open {
                job.state = JobState::Ended(Ending::Failed);
                let mut transaction = control.db.begin().await.unwrap();
                transaction.put_job(&job).await.unwrap();
                transaction.commit().await.unwrap();
            }
        };
        server = server.restart(end).await;
    }
    for item in control.db.items().await.unwrap().iter() {
        let mut transaction = control.db.begin().await.unwrap();
        transaction.remove_item(item.id).await.unwrap();
        transaction.commit().await.unwrap();
    }
    put_item(control, &seed.item).await;
    let by = || Requester("test".to_owned());
    for fabric in control.fabrics().await.unwrap() {
        if !["home", "away"].contains(&fabric.name.as_str()) {
            control.remove_fabric(&fabric.name, by()).await.unwrap();
        }
    }
    control.put_container_mapping("home", "mapping", "policy", Some("away"), by()).await.unwrap();
    let recovery = (Some("away"), "lan");
    control.put_network_mapping("home", "lan", "map", recovery, by()).await.unwrap();
    server
}

fn judge(what: &str, status: u16, text: &str) {
    assert!(status < 500, "{what}: {status} {text}");
    if status >= 400 {
        let error: Value = serde_json::from_str(text).unwrap_or_else(|_| panic!("{what}: {status} {text}"));
        let message = error["error"]["message"].as_str().unwrap_or_default();
        assert!(!message.is_empty() && message.len() < 5000, "{what}: {text}");
    }
}

#[tokio::test]
async fn bent_bodies_are_refused_whole_or_taken_whole() {
    let mut server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    server = restore(server, &control, &seed).await;
    let mut rng = rng();
    let rounds = setting("MAINSTAY_FUZZ_ROUNDS", ROUNDS as u64);
    let (mut refused, mut taken) = (0, 0);
    for Operation { method, path, body } in operations(&server, &seed) {
        let mut all = Vec::new();
        places(&body, String::new(), &mut all);
        for place in &all {
            for _ in 0..rounds {
                let before = state(&control).await;
                let sent = bend(&body, place, &mut rng);
                let shown: String = String::from_utf8_lossy(&sent).chars().take(600).collect();
                let what = format!("{method} {path} at '{place}' with {shown}");
                let (status, text) = server.send(method, &path, Some(sent)).await;
                judge(&what, status, &text);
                if status >= 400 {
                    refused += 1;
                    assert_eq!(before, state(&control).await, "{what}: {status} {text}");
                } else {
                    taken += 1;
                    server = restore(server, &control, &seed).await;
                }
            }
        }
        // Unbent it is taken, or refused for the state that things are in (or for asking too often): otherwise nothing was tested.
        let (status, text) = server.send(method, &path, Some(body.to_string().into_bytes())).await;
        judge(&path, status, &text);
        let is_for_state = matches!(status, 401 | 404 | 409 | 429);
        assert!(status < 300 || is_for_state, "{method} {path} {body}: {status} {text}");
        server = restore(server, &control, &seed).await;
    }
    assert!(refused > 500 && taken > 50, "{refused} refused, {taken} taken");
    server.running.stop().await;
}

#[tokio::test]
async fn bent_paths_and_queries_are_refused() {
    let mut server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    let paths: Vec<String> = operations(&server, &seed).into_iter().map(|operation| operation.path).collect();
    let long = "a".repeat(5000);
    let segments =
        ["%00", "%ff", "%", "..%2f..%2fx", "'", "%7b%22a%22%3a1%7d", "%F0%9F%98%80", "-1", " ", &long];
    let methods = ["GET", "PUT", "PATCH", "POST", "DELETE"];
    let mut rng = rng();
    for path in &paths {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        for index in 0..parts.len() {
            let mut bent: Vec<&str> = parts.clone();
            match rng.random_range(0..4) {
                0 => drop(bent.remove(index)),
                1 => bent.insert(index, parts[rng.random_range(0..parts.len())]),
                _ => bent[index] = segments[rng.random_range(0..segments.len())],
            }
            let method = methods[rng.random_range(0..methods.len())];
            let bent = format!("/{}", bent.join("/").replace(' ', "%20"));
            let before = state(&control).await;
            let (status, text) = server.send(method, &bent, Some(b"{}".to_vec())).await;
            judge(&format!("{method} {bent}"), status, &text);
            if status >= 400 {
                assert_eq!(before, state(&control).await, "{method} {bent}: {status} {text}");
            } else if method != "GET" {
                server = restore(server, &control, &seed).await;
            }
        }
    }
    let values =
        ["", "'", "(((((", "a eq", "JobStatus eq 'x' or", "StartTime gt 'never'", "1.2", "x/y", "%ff", &long];
    for listing in ["replicationJobs", "replicationEvents", "replicationProtectedItems", "replicationFabrics"]
    {
        for name in ["$filter", "$skipToken", "skipToken", "$take", "api-version", "x"] {
            for value in values {
                let value = value.replace(' ', "%20").replace('\'', "%27");
                let path = server.at(&format!("{listing}?{name}={value}&{name}"));
                let (status, text) = server.send("GET", &path, None).await;
                judge(&path, status, &text);
            }
        }
    }
    for link in ["", "x", &Uuid::nil().to_string(), "%ff"] {
        let (status, text) = server.send("GET", &format!("/jobExports/{link}?sig=%ff&sig=x"), None).await;
        judge(link, status, &text);
        assert!(status >= 400, "{link}");
    }
    server.running.stop().await;
}
