//! Bytes that a failback moves for each byte that changed at the recovery site.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, Images, Job, LedgerCopy, RECOVERY};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    figure::Figure,
    stand::{GUEST_TIMEOUT, Scale, Stand, now_ms, point_after, protect},
};

const VM: &str = "returning";

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    let (file_mib, blocks) = scale.pick((256, 4096), (32, 512));
    Stand::with(dir, async |stand| {
        stand.filled_guest(VM, 5, file_mib, file_mib * 2).await?;
        let filled_ms = now_ms();
        let item = protect(&stand.lab, VM, 5).await?;
        point_after(&item, filled_ms).await?;
        let images = Images::open(&stand.lab, item.status().await?.id.parse()?)?;
        stand.fail_over(&item, VM).await?;
        let chosen = item.points().await?.last().copied().context("the point that was failed over to")?;
        item.run(Method::POST, "failoverCommit", &json!({})).await?;
        stand.lab.ledger(VM, LedgerCopy::Active, GUEST_TIMEOUT).await?;
        let before = images.read(chosen.id).await?;
        stand.load(VM, &format!("scatter {blocks}"), Duration::from_millis(500)).await?;

        let body = json!({ "properties": { "failoverDirection": "RecoveryToPrimary", "providerSpecificDetails": {
            "instanceType": "HyperVReplicaAzureFailback", "dataSyncOption": "ForDownTime",
            "recoveryVmCreationOption": "NoAction" } } });
        let job: Job = item.run(Method::POST, "plannedFailover", &body).await?;
        let synchronized = number(&job.output("VmDataSync"), "/bytes_moved")?;
        let job = item.resume(&job).await?;
        let output = job.output("VmFailback");
        let rest = number(&output, "/moved/bytes_moved")?;
        let point: Uuid =
            output.pointer("/point").and_then(Value::as_str).context("the last point")?.parse()?;
        let after = images.read(point).await?;
        let changed = after.bytes_changed_since(Some(&before)) as f64;
        let ledger = stand.lab.ledger(VM, LedgerCopy::Active, GUEST_TIMEOUT).await?;
        ensure!(ledger.site == HOME, "'{VM}' runs at {}, not at {HOME}", ledger.site);
        ensure!(ledger.corrupt == 0 && ledger.gaps == 0, "the ledger is not whole: {ledger:?}");
        ensure!(changed >= f64::from(blocks) * 4096.0 * 0.9, "only {changed} bytes changed at {RECOVERY}");
        let value = (synchronized + rest) as f64 / changed;
        Ok(vec![Figure {
            name: "failback-per-changed-byte".to_owned(),
            value,
            unit: "bytes",
            peer: None,
            ratio: value,
            aim: 1.05,
            accept: 1.3,
            note: format!(
                "{:.1} MB of distinct blocks changed; {:.1} MB moved while the VM ran, {:.2} MB after it stopped",
                changed / 1e6,
                synchronized as f64 / 1e6,
                rest as f64 / 1e6
            ),
        }])
    })
    .await
}

fn number(value: &Value, pointer: &str) -> Result<u64> {
    value.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("{pointer} of {value}"))
}
