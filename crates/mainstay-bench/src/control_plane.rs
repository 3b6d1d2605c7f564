//! How fast the server answers when there is much in it: 5,000 replicated items and 50,000 jobs in the database of a real
//! server process, whose reconcilers look after them meanwhile. Their hosts are away; what their cycles would write into the
//! database, this program writes there, at the pace of a policy of five minutes. Times of single requests are the server's,
//! as its `Server-Timing` says; times of the 200 clients are theirs, until the last byte of the answer.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mainstay_api::{
    arm::{List, Resource},
    encode_segment,
};
use mainstay_control::{
    app::ProviderRecord,
    db::{
        Db, DiskRecord, ItemRecord, JobRecord, JobState, ReplicationRecord, ScrubRecord, StepRecord,
        TargetRecord,
    },
    jobs::tasks,
};
use mainstay_lab::{HOME, Lab, LabAction, RECOVERY};
use mainstay_model::{
    Ending, ItemId, ItemState, JobId, Operation, Phase, PointId, ProviderId, ReplicationPolicy, StepState,
    VmId,
};
use mainstay_provider::{
    Acceleration, Discovery, Disk, DiskFormat, Firmware, HostFacts, Inventory, MacPolicy, Network,
    NetworkKind, NicPlan, PowerState, Progress, VirtualMachine,
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    figure::{Figure, median, percentile, short},
    stand::{Scale, Stand, now_ms},
};

const POLICY: &str = "five-minutes";
const COPY_FREQUENCY: Duration = Duration::from_secs(300);
const VMS_OF_A_HOST: usize = 100;
/// Clients that look after an operation, each at the pace that the server asks for.
const POLLERS: usize = 200;
const POLL: Duration = Duration::from_secs(1);

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    Stand::with(dir, async |stand| {
        let (items, jobs) = (scale.pick(5_000, 200), scale.pick(50_000, 1_000));
        stand.lab.act(LabAction::Stop, "server").await?;
        let db = Db::open(&stand.lab.dir().join("server/mainstay.db")).await?;
        let filled = fill(&db, items, jobs).await?;
        stand.lab.act(LabAction::Start, "server").await?;
        let is_over = Arc::new(AtomicBool::new(false));
        let churn = tokio::spawn(churn(db, filled.items, is_over.clone()));
        let figures = ask(&stand.lab, &filled.jobs, scale).await;
        is_over.store(true, Ordering::Relaxed);
        let written = churn.await??;
        let mut figures = figures?;
        for figure in &mut figures {
            figure.note = format!("{}; {items} items, {jobs} jobs, {written} cycles written", figure.note);
        }
        Ok(figures)
    })
    .await
}

/// What is in the database.
struct Filled {
    items: Vec<ItemId>,
    jobs: Vec<JobId>,
}

async fn fill(db: &Db, items: usize, jobs: usize) -> Result<Filled> {
    let policy = mainstay_control::app::PolicyRecord {
        name: POLICY.to_owned(),
        policy: ReplicationPolicy {
            copy_frequency_seconds: u32::try_from(COPY_FREQUENCY.as_secs())?,
            retention_hours: 24,
            app_consistent_frequency_hours: 0,
            bytes_per_second_max: None,
        },
    };
    let recovery = host(RECOVERY, 0);
    let mut transaction = db.begin().await?;
    transaction.put_resource(&policy).await?;
    transaction.put_resource(&recovery).await?;
    let mut known: Vec<ItemRecord> = Vec::with_capacity(items);
    while known.len() < items {
        let mut home = host(HOME, known.len());
        let last = items.min(known.len() + VMS_OF_A_HOST);
        let mut vms = Vec::new();
        for number in known.len()..last {
            let item = item(number, home.id, recovery.id);
            transaction.insert_item(&item).await?;
            vms.push(machine(&item));
            known.push(item);
        }
        home.discovery = Some(discovery(&home.name, vms));
        transaction.put_resource(&home).await?;
    }
    let mut made = Vec::with_capacity(jobs);
    let began_ms = now_ms() - i64::try_from(jobs)? * 1_000;
    for number in 0..jobs {
        let item = &known[number % items];
        let operation = Operation::ALL[number % Operation::ALL.len()];
        let ending = if number % 10 == 0 { Ending::Failed } else { Ending::Succeeded };
        let job = job(item, operation, ending, began_ms + i64::try_from(number)? * 1_000);
        transaction.put_job(&job).await?;
        made.push(job.id);
    }
    transaction.commit().await?;
    Ok(Filled { items: known.iter().map(|item| item.id).collect(), jobs: made })
}

fn host(fabric: &str, number: usize) -> ProviderRecord {
    ProviderRecord {
        id: ProviderId(Uuid::new_v4()),
        name: format!("{fabric}-simulated-{number}"),
        fabric: fabric.to_owned(),
        registered_ms: now_ms(),
        last_seen_ms: now_ms(),
        version: "1".to_owned(),
        discovery: None,
        discovered_ms: None,
        public_key: None,
        has_connected: true,
    }
}

fn discovery(name: &str, vms: Vec<VirtualMachine>) -> Discovery {
    Discovery {
        host: HostFacts {
            name: name.to_owned(),
            hypervisor: "simulated".to_owned(),
            manager: "simulated".to_owned(),
            acceleration: Acceleration::Software,
            capabilities: Vec::new(),
            processors: 64,
            memory_bytes: 1 << 40,
            free_bytes: 1 << 42,
            findings: Vec::new(),
        },
        inventory: Inventory {
            vms,
            networks: vec![Network { name: "production".to_owned(), kind: NetworkKind::Production }],
        },
        waiting: Vec::new(),
        generations: Vec::new(),
    }
}

fn machine(item: &ItemRecord) -> VirtualMachine {
    let disk = |disk: &DiskRecord| Disk {
        key: disk.key.clone(),
        path: format!("/var/lib/libvirt/images/{}-{}.qcow2", item.name, disk.key),
        format: DiskFormat::Qcow2,
        size_bytes: disk.size_bytes,
        is_os_disk: disk.is_os_disk,
        is_replicable: true,
    };
    VirtualMachine {
        id: item.vm,
        name: item.vm_name.clone(),
        power: PowerState::Running,
        firmware: Firmware::Uefi,
        vcpus: 2,
        memory_bytes: 4 << 30,
        has_tpm: false,
        has_guest_agent: true,
        autostart: false,
        disks: item.disks.iter().map(disk).collect(),
        nics: Vec::new(),
        findings: Vec::new(),
    }
}

fn item(number: usize, primary_provider: ProviderId, recovery_provider: ProviderId) -> ItemRecord {
    let name = format!("vm-{number:05}");
    let disk = |key: &str, is_os_disk| DiskRecord {
        key: key.to_owned(),
        size_bytes: 64 << 30,
        format: "Qcow2".to_owned(),
        is_os_disk,
        is_included: true,
    };
    ItemRecord {
        id: ItemId(Uuid::new_v4()),
        vm_name: name.clone(),
        fabric: HOME.to_owned(),
        primary_provider,
        recovery_fabric: RECOVERY.to_owned(),
        recovery_provider,
        vm: VmId(Uuid::new_v4()),
        autostart: false,
        former_home: None,
        given_up: Vec::new(),
        policy: POLICY.to_owned(),
        state: ItemState { phase: Phase::Protected, ..ItemState::new() },
        disks: vec![disk("vda", true), disk("vdb", false)],
        target: TargetRecord {
            name: name.clone(),
            nics: vec![NicPlan {
                mac: format!(
                    "52:54:00:{:02x}:{:02x}:{:02x}",
                    number >> 16,
                    (number >> 8) & 255,
                    number & 255
                ),
                network: None,
                mac_policy: MacPolicy::Keep,
                address: None,
            }],
            ..TargetRecord::default()
        },
        recovery_vm: None,
        test_vm: None,
        failover: None,
        stand_downs: Vec::new(),
        old_copy: None,
        not_started: None,
        scrub: ScrubRecord::default(),
        replication: ReplicationRecord {
            last_point: Some(PointId(Uuid::new_v4())),
            last_point_ms: Some(now_ms()),
            last_cycle_ms: Some(now_ms()),
            initial_percent: 100,
            ..ReplicationRecord::default()
        },
        created_ms: now_ms(),
        last_failover_ms: None,
        last_test_failover_ms: None,
        resolved_errors: Vec::new(),
        version: 1,
        name,
    }
}

/// A job that has ended, with the whole log of its workflow.
fn job(item: &ItemRecord, operation: Operation, ending: Ending, created_ms: i64) -> JobRecord {
    let mut job = JobRecord {
        id: JobId(Uuid::new_v4()),
        operation,
        item: item.id,
        item_name: item.name.clone(),
        vm_name: item.vm_name.clone(),
        plan: None,
        fabric: item.fabric.clone(),
        params: Value::Null,
        requested_by: "bench".to_owned(),
        state: JobState::Ended(ending),
        is_cancel_requested: false,
        created_ms,
        ended_ms: Some(created_ms + 500),
        steps: Vec::new(),
    };
    let step = |task: mainstay_control::jobs::Task| StepRecord {
        name: task.name.into_owned(),
        state: StepState::Succeeded,
        started_ms: Some(created_ms),
        ended_ms: Some(created_ms + 100),
        attempts: 1,
        output: json!({ "bytesMoved": 123_456_789 }),
        errors: Vec::new(),
        progress: Progress::default(),
    };
    job.steps = tasks(&job).into_iter().map(step).collect();
    job
}

/// Writes what cycles write, item after item, at the pace of the policy. Answers how many.
async fn churn(db: Db, items: Vec<ItemId>, is_over: Arc<AtomicBool>) -> Result<usize> {
    let pace = COPY_FREQUENCY / u32::try_from(items.len())?;
    let mut ticks = tokio::time::interval(pace);
    let mut written = 0;
    for id in items.iter().cycle() {
        ticks.tick().await;
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let mut transaction = db.begin().await?;
        let mut item = transaction.item(*id).await?.context("an item of ours")?;
        item.replication.last_point = Some(PointId(Uuid::new_v4()));
        item.replication.last_point_ms = Some(now_ms());
        item.replication.last_cycle_ms = Some(now_ms());
        item.replication.bytes_changed += 1 << 20;
        transaction.update_item(&item).await?;
        transaction.commit().await?;
        written += 1;
    }
    db.close().await;
    Ok(written)
}

/// Milliseconds that a request took: the server's, by its own word, and until the client had the last byte.
struct Time {
    server: f64,
    client: f64,
}

/// A connection as an impatient client keeps it.
struct Asker {
    http: reqwest::Client,
    url: String,
    token: String,
}

impl Asker {
    fn new(lab: &Lab) -> Result<Self> {
        let connection = lab.file().connection()?;
        let authority = reqwest::Certificate::from_pem(connection.authority_pem.as_bytes())?;
        let http = reqwest::Client::builder().tls_certs_only([authority]).build()?;
        Ok(Self { http, url: connection.url, token: connection.token })
    }

    /// How long it took, and the answer.
    async fn get(&self, path: &str) -> Result<(Time, Vec<u8>)> {
        let began = Instant::now();
        let response = self
            .http
            .get(format!("{}{path}", self.url))
            .bearer_auth(&self.token)
            .send()
            .await?
            .error_for_status()?;
        let server = response.headers().get("server-timing").context("the server's time")?.to_str()?;
        let server = server.strip_prefix("total;dur=").context("the server's time")?.parse()?;
        let body = response.bytes().await?;
        Ok((Time { server, client: began.elapsed().as_secs_f64() * 1000.0 }, body.to_vec()))
    }

    /// Times of so many requests, the paths in turn.
    async fn times(&self, paths: &[String], count: usize) -> Result<Vec<Time>> {
        let mut times = Vec::with_capacity(count);
        for path in paths.iter().cycle().take(count) {
            times.push(self.get(path).await?.0);
        }
        Ok(times)
    }
}

async fn ask(lab: &Lab, jobs: &[JobId], scale: Scale) -> Result<Vec<Figure>> {
    let (vault, asker) = (lab.vault_path(), Asker::new(lab)?);
    let versioned = |path: &str| format!("{vault}/{path}?api-version=2024-04-01");
    // All pages, as a client finds them; and all items in them.
    let mut pages = vec![versioned("replicationProtectedItems")];
    let mut items = Vec::new();
    loop {
        let (_, body) = asker.get(pages.last().context("a page")?).await?;
        let page: List<Resource<Value>> = serde_json::from_slice(&body)?;
        items.extend(page.value.into_iter().map(|item| format!("{}?api-version=2024-04-01", item.id)));
        let Some(next) = page.next_link else { break };
        pages.push(next.strip_prefix(&asker.url).context("a page of this server")?.to_owned());
    }
    ensure!(pages.len() == items.len().div_ceil(100), "{} items on {} pages", items.len(), pages.len());
    let filters = [
        "JobStatus eq 'Failed' and JobName eq 'UnplannedFailover'",
        "JobStatus eq 'Succeeded' and StartTime eq '2020-01-01T00:00:00Z'",
        "ObjectName eq 'vm-00042'",
        // Nothing passes.
        "JobName eq 'Failover'",
    ];
    let filtered =
        filters.map(|filter| format!("{}&$filter={}", versioned("replicationJobs"), encode_segment(filter)));

    let count = scale.pick(1_000, 100);
    let listed = asker.times(&pages, count).await?;
    // Everywhere in the list, and none twice in a row.
    let spread: Vec<String> = (0..items.len()).map(|index| items[index * 37 % items.len()].clone()).collect();
    let got = asker.times(&spread, count).await?;
    let jobs_listed = asker.times(&filtered, count).await?;
    let polled = poll(lab, jobs, scale.pick(30, 5)).await?;
    let memory = memory_peak_bytes(lab.file().server_pid)?;

    let figure = |name: &str, times: &[Time], of: fn(&Time) -> f64, aim: f64, accept: f64| {
        let p99 = |of: fn(&Time) -> f64| percentile(&times.iter().map(of).collect::<Vec<_>>(), 0.99);
        let middle = median(&times.iter().map(of).collect::<Vec<_>>()).unwrap_or(f64::NAN);
        let value = p99(of).unwrap_or(f64::NAN);
        Figure {
            name: name.to_owned(),
            value,
            unit: "ms",
            peer: None,
            ratio: value,
            aim,
            accept,
            note: format!(
                "{} requests, median {} ms, p99 until the client has it {} ms",
                times.len(),
                short(middle),
                short(p99(|time| time.client).unwrap_or(f64::NAN))
            ),
        }
    };
    let server: fn(&Time) -> f64 = |time| time.server;
    let megabytes = memory as f64 / 1e6;
    Ok(vec![
        figure("list-items-page-p99", &listed, server, 10.0, 20.0),
        figure("get-item-p99", &got, server, 1.0, 2.0),
        figure("list-jobs-filtered-p99", &jobs_listed, server, 10.0, 20.0),
        figure("poll-operations-200-clients-p99", &polled, |time| time.client, 25.0, 50.0),
        Figure {
            name: "server-memory".to_owned(),
            value: megabytes,
            unit: "MB",
            peer: None,
            ratio: megabytes,
            aim: 256.0,
            accept: 512.0,
            note: "the most that was resident".to_owned(),
        },
    ])
}

/// Clients with a connection each, all at once, each of which looks after an operation of its own.
async fn poll(lab: &Lab, jobs: &[JobId], rounds: u32) -> Result<Vec<Time>> {
    let mut clients = Vec::with_capacity(POLLERS);
    for number in 0..POLLERS {
        let job = jobs[number * jobs.len() / POLLERS];
        let path = format!("{}/replicationOperationStatus/{job}?api-version=2024-04-01", lab.vault_path());
        let asker = Asker::new(lab)?;
        // The connection is made before it counts, as that of a client that has begun an operation.
        asker.get(&path).await?;
        clients.push((asker, path));
    }
    let mut tasks = Vec::with_capacity(POLLERS);
    for (number, (asker, path)) in clients.into_iter().enumerate() {
        let first = POLL * u32::try_from(number)? / u32::try_from(POLLERS)?;
        tasks.push(tokio::spawn(async move {
            tokio::time::sleep(first).await;
            let mut times = Vec::new();
            for _ in 0..rounds {
                times.push(asker.get(&path).await?.0);
                tokio::time::sleep(POLL).await;
            }
            anyhow::Ok(times)
        }));
    }
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    Ok(times)
}

/// The most memory that a process has had resident.
fn memory_peak_bytes(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}
