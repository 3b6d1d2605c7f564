//! The age of the newest durable recovery point under load, sampled from outside.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    figure::{Figure, median, percentile, short},
    stand::{Scale, Stand, now_ms, protect},
};

const VM: &str = "busy";
const COPY_FREQUENCY_SECONDS: u32 = 5;
/// 20 MB/s, rounded up to whole KiB.
const CHURN_KIB_PER_SECOND: u64 = 19_532;
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
/// Longest gap between two samples that still counts as sampling.
const GAP_MAX: Duration = Duration::from_millis(100);
/// The first cycles under load are not yet in rhythm.
const WARM_UP: Duration = Duration::from_secs(10);

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    let time = Duration::from_secs(scale.pick(95, 20));
    let file_mib = scale.pick(512, 128);
    Stand::with(dir, async |stand| {
        stand.filled_guest(VM, 5, file_mib, file_mib * 2).await?;
        let item = protect(&stand.lab, VM, COPY_FREQUENCY_SECONDS).await?;
        let load_time = WARM_UP + time + Duration::from_secs(5);
        let words = format!("churn {CHURN_KIB_PER_SECOND} {}", load_time.as_secs());
        let churn = stand.load(VM, &words, load_time);
        let sampling = async {
            tokio::time::sleep(WARM_UP).await;
            let changed_before = item.status().await?.bytes_changed;
            let (begun, mut ages, mut gaps) = (Instant::now(), Vec::new(), Vec::new());
            let mut last = begun;
            while begun.elapsed() < time {
                let newest = item.points().await?.last().copied().context("a recovery point")?;
                // The answer's age is judged when it has arrived: that makes it older, never younger.
                ages.push((now_ms() - newest.time_ms) as f64 / 1000.0);
                gaps.push(last.elapsed().as_secs_f64());
                last = Instant::now();
                tokio::time::sleep(SAMPLE_EVERY).await;
            }
            let changed = item.status().await?.bytes_changed - changed_before;
            anyhow::Ok((ages, gaps, changed as f64 / begun.elapsed().as_secs_f64()))
        };
        let (churned, sampled) = tokio::try_join!(churn, sampling)?;
        let (ages, gaps, changed) = sampled;
        let written = churned["bytes"].as_f64().context("what was written")?
            / churned["seconds"].as_f64().context("how long")?;
        ensure!(
            written >= 19.5e6,
            "the guest wrote only {} MB/s: this machine is too busy for the measurement",
            short(written / 1e6)
        );
        let late = gaps.iter().filter(|gap| **gap > GAP_MAX.as_secs_f64() + 0.05).count();
        let value = percentile(&ages, 0.99).unwrap_or(f64::NAN);
        Ok(vec![Figure {
            name: "rpo-p99-5-s-policy".to_owned(),
            value,
            unit: "s",
            peer: None,
            ratio: value,
            aim: 5.0,
            accept: 10.0,
            note: format!(
                "median {}, largest {} s of {} samples in {} s ({late} later than 150 ms); {} MB/s written in random pieces of 64 KiB, {} MB/s found changed",
                short(median(&ages).unwrap_or(f64::NAN)),
                short(percentile(&ages, 1.0).unwrap_or(f64::NAN)),
                ages.len(),
                time.as_secs(),
                short(written / 1e6),
                short(changed / 1e6)
            ),
        }])
    })
    .await
}
