//! Operations of the API that need no host, over the wire.

use std::sync::Arc;

use crate::support::{MAC, Seed, Server, put_item, seed};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mainstay_api::arm::{ExportJobDetails, JobProperties, Resource};
use mainstay_control::{
    ManualClock, SystemClock,
    app::Requester,
    db::{EventRecord, ItemRecord},
};
use mainstay_model::{Health, ItemState, Phase, TestFailoverState};
use mainstay_provider::{Disk, Finding, FindingSeverity};
use serde_json::{Value, json};

async fn ask(server: &Server, method: &str, path: &str, body: &Value) -> Value {
    let (status, text) = server.send(method, &server.at(path), Some(body.to_string().into_bytes())).await;
    assert!((200..300).contains(&status), "{method} {path}: {status} {text}");
    if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() }
}

async fn get(server: &Server, path: &str) -> Value {
    server.administrator.get(&server.at(path)).await.unwrap()
}

/// A refusal's status, code and message.
async fn refusal(server: &Server, method: &str, path: &str, body: &Value) -> (u16, String, String) {
    let (status, text) = server.send(method, &server.at(path), Some(body.to_string().into_bytes())).await;
    let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status} {text}"));
    let word = |name: &str| error["error"][name].as_str().unwrap_or_default().to_owned();
    (status, word("code"), word("message"))
}

fn item_path(seed: &Seed) -> String {
    format!(
        "replicationFabrics/home/replicationProtectionContainers/{}/replicationProtectedItems/vm1",
        seed.container
    )
}

#[tokio::test]
async fn jobs_are_exported_whole_in_every_form_and_the_link_ends() {
    let clock = Arc::new(ManualClock::default());
    let server = Server::start(clock.clone()).await;
    let control = server.records().await;
    for index in 0..250 {
        control.create_fabric(&format!("site{index}"), Requester("t".to_owned())).await.unwrap();
    }
    let seed = seed(&control).await;
    let export = async |body: Value| -> (Resource<JobProperties>, String) {
        let path = server.at("replicationJobs/export");
        let name =
            server.administrator.begin(reqwest::Method::POST, &path, Some(&body)).await.unwrap().unwrap();
        let job: Resource<JobProperties> =
            server.administrator.get(&server.at(&format!("replicationJobs/{name}"))).await.unwrap();
        let details: ExportJobDetails =
            serde_json::from_value(job.properties.custom_details.clone()).unwrap();
        let link = format!("{}?{}", details.blob_uri.unwrap(), details.sas_token.unwrap());
        (job, link)
    };
    let download = async |link: &str| {
        let response = server.http.get(link).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };

    let (job, link) = export(json!({})).await;
    assert_eq!(job.properties.scenario_name, "ExportJobs");
    let (status, text) = download(&link).await;
    assert_eq!(status, 200);
    let all: Value = serde_json::from_str(&text).unwrap();
    // 250 sites, two more, a policy and a mapping; not the export itself.
    assert_eq!(all["value"].as_array().unwrap().len(), 254);
    let mut names: Vec<_> =
        all["value"].as_array().unwrap().iter().map(|job| job["name"].to_string()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 254, "each job once");

    let policies = json!({ "jobName": "AddProtectionProfile", "jobStatus": "Succeeded", "jobOutputType": "Excel", "timezoneOffset": 60 });
    let (_, text) = download(&export(policies).await.1).await;
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].starts_with("\u{feff}Name,ScenarioName"), "{text}");
    assert!(lines[1].contains("\"AddProtectionProfile\"") && lines[1].contains("+01:00\""), "{text}");
    let sites = json!({ "fabricId": server.at("replicationFabrics/home"), "jobOutputType": "Xml" });
    let (_, text) = download(&export(sites).await.1).await;
    assert_eq!(text.matches("<Job>").count(), 1, "{text}");
    assert!(text.contains("<TargetObjectName>home</TargetObjectName>"), "{text}");
    let none = json!({ "affectedObjectTypes": "ProtectionEntity,RecoveryPlan" });
    assert_eq!(download(&export(none).await.1).await.1, "{\"value\":[]}");

    // Whoever changes the link, or comes too late, gets nothing; the job still says what it was.
    let wrong = format!("{}x", &link[..link.len() - 1]);
    assert_eq!(download(&wrong).await.0, 403);
    assert_eq!(download(link.split('?').next().unwrap()).await.0, 403);
    clock.advance_ms(25 * 3_600_000);
    assert_eq!(download(&link).await.0, 403);
    let late: Value = get(&server, &format!("replicationJobs/{}", job.name)).await;
    let details = &late["properties"]["customDetails"];
    assert_eq!(details["instanceType"], "ExportJobDetails");
    assert_eq!((details.get("blobUri"), details.get("sasToken")), (None, None));

    for (body, field) in [
        (json!({ "startTime": "yesterday" }), "startTime"),
        (json!({ "jobStatus": "Succeeded,Sleeping" }), "jobStatus"),
        (json!({ "jobOutputType": "Pdf" }), "jobOutputType"),
        (json!({ "timezoneOffset": 100_000 }), "timezoneOffset"),
        (json!({ "startTime": "2026-02-01T00:00:00Z", "endTime": "2026-01-01T00:00:00Z" }), "startTime"),
    ] {
        let (status, _, message) = refusal(&server, "POST", "replicationJobs/export", &body).await;
        assert_eq!(status, 400);
        assert!(message.starts_with(field), "{message}");
    }
    assert_eq!(refusal(&server, "POST", "replicationJobs/export", &json!({ "fabricId": "x" })).await.0, 404);
    drop(seed);
    server.running.stop().await;
}

/// All of a listing by its pages, and how many there were.
async fn pages(server: &Server, path: &str) -> (Vec<Value>, usize) {
    let (mut all, mut count) = (Vec::new(), 0);
    let mut next = Some(server.at(path));
    while let Some(path) = next {
        let page: Value = server.administrator.get(&path).await.unwrap();
        all.extend(page["value"].as_array().unwrap().iter().cloned());
        next = page["nextLink"].as_str().map(|link| link.strip_prefix(&server.url).unwrap().to_owned());
        count += 1;
    }
    (all, count)
}

#[tokio::test]
async fn events_are_found_however_old_they_are() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let event = |code: &str, time_ms: i64| EventRecord {
        time_ms,
        ..control.event(
            "VmHealth",
            code,
            Health::Normal,
            "it".to_owned(),
            "vm1".to_owned(),
            "home".to_owned(),
        )
    };
    let now_ms = control.clock.now_ms();
    let mut transaction = control.db.begin().await.unwrap();
    let rare = event("Rare", now_ms - 10_000);
    transaction.add_event(&rare).await.unwrap();
    for index in 0..1_250 {
        // Several in the same moment.
        transaction.add_event(&event("Frequent", now_ms - index / 3)).await.unwrap();
    }
    transaction.commit().await.unwrap();
    let (all, count) = pages(&server, "replicationEvents").await;
    assert_eq!((all.len(), count), (1_251, 13));
    let mut names: Vec<_> = all.iter().map(|event| event["name"].to_string()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 1_251, "each event once");
    let filter = mainstay_api::encode_segment("EventCode eq 'Rare'");
    let (found, count) = pages(&server, &format!("replicationEvents?$filter={filter}")).await;
    assert_eq!((found.len(), count), (1, 1));
    assert_eq!(found[0]["name"], rare.id);
    let one = get(&server, &format!("replicationEvents/{}", rare.id.to_uppercase())).await;
    assert_eq!(one, found[0]);
    server.running.stop().await;
}

#[tokio::test]
async fn protectable_items_come_in_pages_as_long_as_the_client_wants() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let seed = seed(&server.records().await).await;
    let path = format!(
        "replicationFabrics/home/replicationProtectionContainers/{}/replicationProtectableItems",
        seed.container
    );
    let names = |found: &[Value]| -> Vec<String> {
        found.iter().map(|item| item["properties"]["friendlyName"].as_str().unwrap().to_owned()).collect()
    };
    let (all, count) = pages(&server, &path).await;
    assert_eq!((names(&all), count), (vec!["vm1".to_owned(), "vm2".to_owned()], 1));
    let (taken, count) = pages(&server, &format!("{path}?$take=1")).await;
    assert_eq!((taken, count), (all.clone(), 2));
    let filter = mainstay_api::encode_segment("protectionStatus eq 'Unprotected'");
    let (free, _) = pages(&server, &format!("{path}?$filter={filter}")).await;
    assert_eq!(names(&free), ["vm2"]);
    for wrong in ["$take=0", "$take=x", "$skipToken=x", "$filter=colour%20eq%20'red'"] {
        let (status, text) = server.send("GET", &server.at(&format!("{path}?{wrong}")), None).await;
        assert_eq!(status, 400, "{wrong}: {text}");
    }
    server.running.stop().await;
}

/// One disk that cannot be replicated is told before anybody tries, and whoever tries is told how to go on without it.
#[tokio::test]
async fn a_vm_with_a_disk_that_cannot_be_replicated_is_protected_without_it() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    let mut host = control.provider(seed.home).await.unwrap();
    let vms = &mut host.discovery.as_mut().unwrap().inventory.vms;
    let vm = vms.iter_mut().find(|vm| vm.id == seed.other_vm).unwrap();
    let shared =
        Disk { key: "vdb".to_owned(), is_os_disk: false, is_replicable: false, ..vm.disks[0].clone() };
    vm.disks.push(shared);
    vm.findings.push(Finding {
        code: "DiskShared".to_owned(),
        severity: FindingSeverity::Warning,
        message: "disk vdb is shared with other VMs".to_owned(),
        remedy: "Move it, or leave it out.".to_owned(),
    });
    let mut transaction = control.db.begin().await.unwrap();
    transaction.put_resource(&host).await.unwrap();
    transaction.commit().await.unwrap();

    let container = format!("replicationFabrics/home/replicationProtectionContainers/{}", seed.container);
    let protectable = format!("{container}/replicationProtectableItems/{}", seed.other_vm);
    let found = get(&server, &protectable).await;
    let told = found["properties"]["protectionReadinessErrors"][0].as_str().unwrap();
    assert!(told.starts_with("without vdb: disk vdb is shared with other VMs. Move it, "), "{told}");
    let path = format!("{container}/replicationProtectedItems/vm2");
    let mut body = json!({ "properties": {
        "policyId": "policy",
        "protectableItemId": server.at(&protectable),
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" },
    } });
    let (status, text) = server.send("PUT", &server.at(&path), Some(body.to_string().into_bytes())).await;
    let error: Value = serde_json::from_str(&text).unwrap();
    let detail = &error["error"]["details"][0];
    assert_eq!((status, &detail["code"]), (400, &json!("DiskNotReplicable")), "{text}");
    assert!(detail["message"].as_str().unwrap().contains("disk vdb is shared with other VMs"), "{text}");
    assert!(detail["recommendedAction"].as_str().unwrap().contains("--exclude-disk vdb"), "{text}");
    body["properties"]["providerSpecificDetails"]["disksToInclude"] = json!(["vda"]);
    ask(&server, "PUT", &path, &body).await;
    server.running.stop().await;
}

#[tokio::test]
async fn settings_of_the_vault_are_kept() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let path = "replicationAlertSettings/defaultAlertSetting";
    assert_eq!(get(&server, path).await["properties"]["sendToOwners"], "DoNotSend");
    let body = json!({ "properties": {
        "sendToOwners": "true", "customEmailAddresses": ["ops@example.org", "night@example.org"], "locale": "",
    } });
    let put = ask(&server, "PUT", path, &body).await;
    assert_eq!(put["properties"]["locale"], "en-US");
    assert_eq!(put, get(&server, path).await);
    assert_eq!(get(&server, "replicationAlertSettings").await["value"][0], put);
    // What was answered can be sent back.
    assert_eq!(ask(&server, "PUT", path, &put).await, put);
    for (field, value) in [
        ("sendToOwners", json!("perhaps")),
        ("customEmailAddresses", json!(["ops at example.org"])),
        ("customEmailAddresses", json!("ops@example.org")),
    ] {
        let (status, _, message) =
            refusal(&server, "PUT", path, &json!({ "properties": { field: value } })).await;
        assert_eq!(status, 400);
        assert!(message.contains(&format!("properties.{field}")), "{message}");
    }
    assert_eq!(get(&server, path).await, put);
    assert_eq!(refusal(&server, "PUT", "replicationAlertSettings/other", &body).await.0, 404);

    let solution = json!({ "properties": { "migrationSolutionId": "/subscriptions/s/solutions/x" } });
    let put = ask(&server, "PUT", "replicationVaultSettings/default", &solution).await;
    assert_eq!(put["properties"], solution["properties"]);
    assert_eq!(get(&server, "replicationVaultSettings").await["value"][0], put);
    assert_eq!(ask(&server, "PUT", "replicationVaultSettings/default", &put).await, put);

    let path = "extendedInformation/vaultExtendedInfo";
    let (status, code, _) = refusal(&server, "GET", path, &json!({})).await;
    assert_eq!((status, code.as_str()), (404, "ResourceExtendedInfoNotFound"));
    let key = json!({ "properties": { "integrityKey": "J99wzS27fmJ+Wjot7xO5wA==", "algorithm": "None" } });
    let put = ask(&server, "PUT", path, &key).await;
    let patched = ask(&server, "PATCH", path, &json!({ "properties": { "algorithm": "AES256" } })).await;
    assert_eq!(patched["properties"]["integrityKey"], "J99wzS27fmJ+Wjot7xO5wA==");
    assert_eq!(patched["properties"]["algorithm"], "AES256");
    assert_ne!(patched["etag"], put["etag"]);
    assert_eq!(get(&server, path).await, patched);
    server.running.stop().await;
}

#[tokio::test]
async fn a_certificate_is_examined_before_credentials_are_answered() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let path = "certificates/credentials";
    let pem = server.authority_pem.clone();
    let text: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let body = |certificate: &str| json!({ "properties": { "authType": "AAD", "certificate": certificate } });
    let answer = ask(&server, "PUT", path, &body(&text)).await;
    let told = &answer["properties"];
    assert_eq!((&told["authType"], &told["certificate"]), (&json!("AzureActiveDirectory"), &json!(text)));
    assert_eq!(told["aadTenantId"], server.tenant.as_str());
    assert_eq!(told["thumbprint"].as_str().unwrap().len(), 40);
    assert!(told["subject"].as_str().unwrap().contains("CN="), "{told}");
    // As some clients send it: the text of the file, encoded once more.
    let twice = ask(&server, "PUT", path, &body(&STANDARD.encode(&text))).await;
    assert_eq!(twice["properties"]["thumbprint"], told["thumbprint"]);
    for wrong in ["AAAA", "not Base64", ""] {
        let (status, code, message) = refusal(&server, "PUT", path, &body(wrong)).await;
        assert_eq!(status, 400, "{code} {message}");
        assert!(message.contains("properties.certificate"), "{message}");
    }
    let expired = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(vec!["old".to_owned()]).unwrap();
    parameters.not_before = rcgen::date_time_ymd(2001, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(2002, 1, 1);
    let expired = STANDARD.encode(parameters.self_signed(&expired).unwrap().der());
    let (status, code, message) = refusal(&server, "PUT", path, &body(&expired)).await;
    assert_eq!((status, code.as_str()), (400, "InvalidCertificate"));
    assert!(message.contains("until 2002-01-01"), "{message}");
    server.running.stop().await;
}

#[tokio::test]
async fn the_vault_says_what_is_in_it_and_what_it_can_do() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    seed(&control).await;
    let usages = get(&server, "replicationUsages").await;
    assert_eq!(usages["value"][0]["protectedItemCount"], 1);
    assert_eq!(usages["value"][0]["registeredServersCount"], 2);
    assert_eq!(usages["value"][0]["monitoringSummary"]["unHealthyProviderCount"], 2);
    let usages = get(&server, "usages").await;
    let count =
        usages["value"].as_array().unwrap().iter().find(|one| one["name"]["value"] == "ProtectedItemCount");
    assert_eq!(count.unwrap()["currentValue"], 1);
    let systems = get(&server, "replicationSupportedOperatingSystems?instanceType=HyperVReplicaAzure").await;
    assert_eq!(systems["properties"]["supportedOsList"][0]["instanceType"], "HyperVReplicaAzure");
    let others = get(&server, "replicationSupportedOperatingSystems?instanceType=A2A").await;
    assert_eq!(others["properties"]["supportedOsList"], json!([]));

    let group = format!("/subscriptions/{}/resourceGroups/group", server.tenant);
    let namespace = "providers/Microsoft.RecoveryServices";
    let all: Value = server.administrator.get(&format!("/{namespace}/operations")).await.unwrap();
    let names: Vec<_> =
        all["value"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert!(names.iter().any(|name| name.ends_with("/replicationProtectedItems/failoverCancel/action")));
    let of_group: Value = server.administrator.get(&format!("{group}/{namespace}/operations")).await.unwrap();
    assert_eq!(all, of_group);
    let question = format!("{group}/{namespace}/locations/here/checkNameAvailability");
    for (name, is_free) in [("VAULT", false), ("another", true)] {
        let body = json!({ "type": "Microsoft.RecoveryServices/Vaults", "name": name });
        let answer: Value = server.administrator.post(&question, &body).await.unwrap();
        assert_eq!(answer["nameAvailable"], is_free);
    }
    server.running.stop().await;
}

#[tokio::test]
async fn networks_are_mapped_changed_and_unmapped() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    seed(&control).await;
    let network = "replicationFabrics/home/replicationNetworks/lan";
    let mapping = format!("{network}/replicationNetworkMappings/map1");
    let away = server.at("replicationFabrics/away/replicationNetworks/lan");
    let body = json!({ "properties": {
        "recoveryFabricName": "Microsoft Azure",
        "recoveryNetworkId": away,
        "fabricSpecificDetails": { "instanceType": "VmmToAzure" },
    } });
    ask(&server, "PUT", &mapping, &body).await;
    let made = get(&server, &mapping).await;
    let properties = &made["properties"];
    assert_eq!((&properties["state"], &properties["recoveryNetworkId"]), (&json!("Paired"), &json!(away)));
    assert_eq!(properties["primaryNetworkId"], server.at(network));
    for path in [format!("{network}/replicationNetworkMappings"), "replicationNetworkMappings".to_owned()] {
        assert_eq!(get(&server, &path).await["value"], json!([made]));
    }
    // Sent back as it was answered nothing changes; an update changes what it names.
    ask(&server, "PUT", &mapping, &made).await;
    assert_eq!(get(&server, &mapping).await, made);
    ask(&server, "PATCH", &mapping, &json!({ "properties": { "recoveryNetworkId": "island" } })).await;
    let changed = get(&server, &mapping).await;
    assert_eq!(changed["properties"]["recoveryNetworkFriendlyName"], "island");

    let unknown = json!({ "properties": { "recoveryNetworkId": "ocean" } });
    let (status, code, message) = refusal(&server, "PUT", &mapping, &unknown).await;
    assert_eq!((status, code.as_str()), (400, "NetworkNotFound"));
    assert!(message.contains("'ocean'"), "{message}");
    let second = format!("{network}/replicationNetworkMappings/map2");
    assert_eq!(refusal(&server, "PUT", &second, &body).await.0, 409);
    let nowhere = "replicationFabrics/home/replicationNetworks/ocean/replicationNetworkMappings/map1";
    assert_eq!(refusal(&server, "PUT", nowhere, &body).await.0, 404);
    assert_eq!(refusal(&server, "PATCH", &second, &body).await.0, 404);
    assert_eq!(get(&server, &mapping).await, changed);
    let logical = get(&server, "replicationFabrics/home/replicationLogicalNetworks").await;
    assert_eq!(logical["value"].as_array().unwrap().len(), 2);
    let one = get(&server, "replicationFabrics/home/replicationLogicalNetworks/island").await;
    assert_eq!(one["properties"]["logicalNetworkDefinitionsStatus"], "LogicalNetworkDefinitionsIsolated");
    server.administrator.delete(&server.at(&mapping)).await.unwrap();
    assert_eq!(refusal(&server, "GET", &mapping, &json!({})).await.0, 404);
    server.running.stop().await;
}

#[tokio::test]
async fn items_tell_sizes_and_put_a_warning_out_of_sight() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    let path = item_path(&seed);
    let sizes = get(&server, &format!("{path}/targetComputeSizes")).await;
    let names: Vec<_> = sizes["value"].as_array().unwrap().iter().map(|size| size["name"].clone()).collect();
    assert!(names.contains(&json!("2x4096")) && !names.contains(&json!("4x2048")), "{names:?}");

    let errors = |item: &Value| item["properties"]["healthErrors"].as_array().unwrap().clone();
    let before = get(&server, &path).await;
    let warning = errors(&before).into_iter().find(|error| error["errorCode"] == "161011").unwrap();
    assert_eq!(warning["customerResolvability"], "Allowed");
    let resolve = format!("{path}/resolveHealthErrors");
    let body = |id: &Value| json!({ "properties": { "healthErrors": [{ "healthErrorId": id }] } });
    let broken = errors(&before).into_iter().find(|error| error["errorCode"] == "AgentDisconnected").unwrap();
    assert_eq!(broken["customerResolvability"], "NotAllowed");
    for (id, code) in [(&broken["errorId"], "HealthErrorNotResolvable"), (&json!("0"), "HealthErrorNotFound")]
    {
        let (status, found, _) = refusal(&server, "POST", &resolve, &body(id)).await;
        assert_eq!((status, found.as_str()), (400, code));
    }
    let empty = json!({ "properties": { "healthErrors": [] } });
    assert_eq!(refusal(&server, "POST", &resolve, &empty).await.0, 400);
    assert_eq!(errors(&get(&server, &path).await).len(), errors(&before).len());
    ask(&server, "POST", &resolve, &body(&warning["errorId"])).await;
    let after = get(&server, &path).await;
    assert_eq!(errors(&after).len(), errors(&before).len() - 1);
    assert_eq!(after["properties"]["failoverHealth"], "Normal");

    let (status, code, message) =
        refusal(&server, "POST", &format!("{path}/failoverCancel"), &json!({})).await;
    assert_eq!((status, code.as_str()), (409, "OperationNotAllowed"));
    assert!(message.contains("no failover of 'vm1' is under way"), "{message}");
    server.running.stop().await;
}

#[tokio::test]
async fn what_a_rehearsal_showed_is_told_with_the_job_that_cleaned_it_up() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    let state = ItemState { test_failover: TestFailoverState::WaitingForCleanup, ..seed.item.state };
    put_item(&control, &ItemRecord { state, ..seed.item.clone() }).await;
    let path = server.at(&format!("{}/testFailoverCleanup", item_path(&seed)));
    let body = json!({ "properties": { "comments": "booted,\nchecked" } });
    let name = server.administrator.begin(reqwest::Method::POST, &path, Some(&body)).await.unwrap().unwrap();
    let job = get(&server, &format!("replicationJobs/{name}")).await;
    let details = &job["properties"]["customDetails"];
    assert_eq!(
        (&details["instanceType"], &details["comments"]),
        (&json!("TestFailoverJobDetails"), &json!("booted,\nchecked"))
    );
    assert_eq!(details["affectedObjectDetails"]["primaryVmName"], "vm1");
    server.running.stop().await;
}

/// What keeps an operation from being begun is the state, and not that in this state there are no recovery points.
#[tokio::test]
async fn a_state_that_does_not_allow_an_operation_is_told_before_a_point_that_does_not_exist() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    let point = "0b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77";
    let failover = json!({ "properties": {
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure", "recoveryPointId": point },
    } });
    let change = json!({ "properties": { "recoveryPointId": point } });
    let home = json!({ "properties": {
        "failoverDirection": "RecoveryToPrimary",
        "providerSpecificDetails": {
            "instanceType": "HyperVReplicaAzureFailback",
            "providerIdForAlternateRecovery": point,
        },
    } });
    let cases = [
        ("testFailover", &failover, Phase::UnplannedFailoverCommitted, Phase::Protected),
        ("unplannedFailover", &failover, Phase::UnplannedFailoverCommitted, Phase::Protected),
        (
            "applyRecoveryPoint",
            &change,
            Phase::UnplannedFailoverCommitted,
            Phase::UnplannedFailoverCommitPending,
        ),
        ("plannedFailover", &home, Phase::Protected, Phase::UnplannedFailoverCommitted),
    ];
    for (verb, body, refusing, allowing) in cases {
        let in_phase = async |phase| {
            let state = ItemState { phase, ..seed.item.state };
            put_item(&control, &ItemRecord { state, ..seed.item.clone() }).await;
            let path = server.at(&format!("{}/{verb}", item_path(&seed)));
            let (status, text) = server.send("POST", &path, Some(body.to_string().into_bytes())).await;
            (status, serde_json::from_str::<Value>(&text).unwrap())
        };
        let (status, answer) = in_phase(refusing).await;
        assert_eq!(status, 409, "{verb}: {answer}");
        let detail = &answer["error"]["details"][0];
        let remedy = detail["recommendedAction"].as_str().unwrap();
        assert!(remedy.starts_with("Allowed now: "), "{verb}: {answer}");
        assert_eq!(in_phase(allowing).await.0, 404, "{verb}");
    }
    server.running.stop().await;
}

#[tokio::test]
async fn what_was_answered_can_be_put_back_with_a_change() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    for path in [
        "replicationFabrics/home".to_owned(),
        "replicationPolicies/policy".to_owned(),
        format!(
            "replicationFabrics/home/replicationProtectionContainers/{}/replicationProtectionContainerMappings/mapping",
            seed.container
        ),
        format!("replicationFabrics/home/replicationRecoveryServicesProviders/{}", seed.home),
    ] {
        let before = get(&server, &path).await;
        let mut body = before.clone();
        if path.contains("replicationRecoveryServicesProviders") {
            let identity = json!({ "tenantId": "t", "applicationId": "a", "objectId": "o", "audience": "x", "aadAuthority": "y" });
            body["properties"]["machineName"] = json!("home-host");
            body["properties"]["authenticationIdentityInput"] = identity.clone();
            body["properties"]["resourceAccessIdentityInput"] = identity;
        }
        ask(&server, "PUT", &path, &body).await;
        assert_eq!(get(&server, &path).await, before, "{path}");
    }
    let policy = "replicationPolicies/policy";
    let mut body = get(&server, policy).await;
    body["properties"]["providerSpecificDetails"]["recoveryPointHistoryDurationInHours"] = json!(48);
    ask(&server, "PUT", policy, &body).await;
    let details = &get(&server, policy).await["properties"]["providerSpecificDetails"];
    assert_eq!(
        (&details["recoveryPointHistoryDurationInHours"], &details["replicationInterval"]),
        (&json!(48), &json!(300))
    );

    // A provider that does not exist registers itself.
    let new = format!("replicationFabrics/home/replicationRecoveryServicesProviders/{}", seed.recovery);
    let identity = json!({});
    let body = json!({ "properties": {
        "machineName": "x", "authenticationIdentityInput": identity, "resourceAccessIdentityInput": identity,
    } });
    let (status, code, _) = refusal(&server, "PUT", &new, &body).await;
    assert_eq!((status, code.as_str()), (400, "ProviderRegistersItself"));

    let path = item_path(&seed);
    let mut body = get(&server, &path).await;
    body["properties"]["providerSpecificDetails"]["recoveryAzureVmName"] = json!("vm1-recovered");
    body["properties"]["providerSpecificDetails"]["vmNics"][0]["ipConfigs"][0]["recoveryStaticIPAddress"] =
        json!("10.0.0.7/24");
    ask(&server, "PUT", &path, &body).await;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(300);
    let after = loop {
        let found = get(&server, &path).await;
        if found["properties"]["providerSpecificDetails"]["recoveryAzureVmName"] == "vm1-recovered" {
            break found;
        }
        assert!(std::time::Instant::now() < deadline, "the item is as it was: {found}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    let nic = &after["properties"]["providerSpecificDetails"]["vmNics"][0];
    assert_eq!(
        (&nic["nicId"], &nic["ipConfigs"][0]["recoveryStaticIPAddress"]),
        (&json!(MAC), &json!("10.0.0.7/24"))
    );
    let mut other = after.clone();
    other["properties"]["policyId"] = json!("another");
    assert_eq!(refusal(&server, "PUT", &path, &other).await.0, 409);
    server.running.stop().await;
}
