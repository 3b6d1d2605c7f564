//! What the guest feels: how long its own synced writes of 4 KiB take, timed inside it. Phases of each kind follow each
//! other, several times, so that what the machine does besides falls on all of them, and the median of each kind's phases counts: what
//! else wants the processors or the disk for a minute spoils a few phases, and would decide a percentile of all writes.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{Item, LabAction};
use reqwest::Method;
use serde_json::json;

use crate::{
    figure::{Figure, median, percentile, short},
    output::note,
    stand::{GUEST_TIMEOUT, Scale, Stand, protect},
};

const VM: &str = "timed";
const COPY_FREQUENCY_SECONDS: u32 = 5;
const WRITES_PER_SECOND: u64 = 50;
const FILE_MIB: u64 = 64;
const LOOK: Duration = Duration::from_millis(2);

/// Latencies in milliseconds, by what goes on.
#[derive(Default)]
struct Phases {
    unprotected: Rounds,
    protected: Rounds,
    frozen: Rounds,
}

/// Latencies of all rounds, and each round's 99th percentile.
#[derive(Default)]
struct Rounds {
    all: Vec<f64>,
    p99: Vec<f64>,
}

impl Rounds {
    fn add(&mut self, latencies: Vec<f64>) {
        self.p99.extend(percentile(&latencies, 0.99));
        self.all.extend(latencies);
    }

    /// Of a phase in the middle.
    fn p99(&self) -> f64 {
        median(&self.p99).unwrap_or(f64::NAN)
    }

    fn told(&self) -> String {
        let middle = median(&self.all).unwrap_or(f64::NAN);
        let rounds: Vec<_> = self.p99.iter().map(|value| short(*value)).collect();
        format!("median {} ms, p99 by round {}", short(middle), rounds.join(" "))
    }
}

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    let rounds = scale.pick(9, 1);
    let time = Duration::from_secs(scale.pick(15, 11));
    Stand::with(dir, async |stand| {
        stand.filled_guest(VM, 1, FILE_MIB, FILE_MIB * 4).await?;
        let mut phases = Phases::default();
        for round in 1..=rounds {
            phases.unprotected.add(latencies(stand, time).await?);
            let item = protect(&stand.lab, VM, COPY_FREQUENCY_SECONDS).await?;
            let before = item.points().await?.len();
            phases.protected.add(latencies(stand, time).await?);
            let cycles = item.points().await?.len() - before;
            ensure!(cycles >= 2, "only {cycles} cycles ran during the measurement");
            phases.frozen.add(frozen(stand, &item, time).await?);
            let body = json!({ "properties": { "disableProtectionReason": "NotSpecified" } });
            item.run(Method::POST, "remove", &body).await?;
            note(&format!(
                "round {round}: unprotected {}; protected {}; server frozen {}",
                phases.unprotected.told(),
                phases.protected.told(),
                phases.frozen.told()
            ));
        }
        let figure = |name: &str, value: &Rounds, peer: &Rounds, aim: f64| Figure {
            name: name.to_owned(),
            value: value.p99(),
            unit: "ms",
            peer: Some(peer.p99()),
            ratio: value.p99() / peer.p99(),
            aim,
            accept: 1.2,
            note: format!("{} writes; {}; peer: {}", value.all.len(), value.told(), peer.told()),
        };
        Ok(vec![
            figure("guest-write-p99-protected", &phases.protected, &phases.unprotected, 1.05),
            figure("guest-write-p99-server-frozen", &phases.frozen, &phases.protected, 1.0),
        ])
    })
    .await
}

/// Freezes the server in the middle of a cycle, when it harms most, and thaws it after the measurement.
async fn frozen(stand: &mut Stand, item: &Item, time: Duration) -> Result<Vec<f64>> {
    let deadline = Instant::now() + GUEST_TIMEOUT;
    while item.status().await?.cycle.is_none() {
        ensure!(Instant::now() < deadline, "no cycle begins");
        tokio::time::sleep(LOOK).await;
    }
    stand.lab.act(LabAction::Pause, "server").await?;
    let measured = latencies(stand, time).await;
    stand.lab.act(LabAction::Resume, "server").await?;
    let measured = measured?;
    let newest = item.points().await?.last().copied().context("a recovery point")?;
    item.wait_points(newest.time_ms, 1).await.context("replication did not go on after the thaw")?;
    Ok(measured)
}

/// Has the guest write for some time; milliseconds of each write.
async fn latencies(stand: &Stand, time: Duration) -> Result<Vec<f64>> {
    let answer = stand.load(VM, &format!("latency {WRITES_PER_SECOND} {}", time.as_secs()), time).await?;
    let micros = answer["micros"].as_array().context("latencies")?;
    Ok(micros.iter().filter_map(serde_json::Value::as_f64).map(|micros| micros / 1000.0).collect())
}
