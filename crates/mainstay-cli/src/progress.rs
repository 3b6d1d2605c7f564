//! How far something long is, in words; and an item's initial replication, followed to its end.

use std::time::Duration;

use mainstay_api::v1::{CycleProgress, DiskProgress, ItemStatus};

use crate::{
    exit::RefusedError,
    output,
    session::{Item, Session},
};

/// Bytes dealt with out of all; nothing while it is not known how many there are.
fn share(done: u64, total: u64) -> Option<String> {
    let percent = done.saturating_mul(100).checked_div(total)?;
    Some(format!("{} of {}, {percent} %", output::bytes(done), output::bytes(total)))
}

/// What is being done, and how far it is: `Replicating changes (1.00 GiB of 4.00 GiB, 25 %)`.
pub(crate) fn text(progress: &CycleProgress) -> String {
    match share(progress.bytes_done, progress.bytes_total) {
        Some(share) if progress.phase.is_empty() => format!("({share})"),
        Some(share) => format!("{} ({share})", progress.phase),
        None => progress.phase.clone(),
    }
}

/// How far it is with a disk; `None` where it does not go disk by disk, or there is nothing to do with this one.
pub(crate) fn of_disk(progress: &CycleProgress, key: &str) -> Option<String> {
    let DiskProgress { bytes_done, bytes_total, .. } = progress.disks.iter().find(|disk| disk.key == key)?;
    share(*bytes_done, *bytes_total)
}

/// How often an item is looked at while its initial replication is followed.
const POLL: Duration = Duration::from_secs(1);

/// Follows an item's initial replication on standard error until the item is protected. What is wrong meanwhile is told, and
/// waited for: replication goes on by itself.
pub(crate) async fn until_protected(session: &Session, path: &str) -> anyhow::Result<Item> {
    let bar = output::spinner()?;
    let mut told = Vec::new();
    loop {
        let item: Item = session.client.get(path).await?;
        let it = &item.properties;
        let name = &it.friendly_name;
        match it.protection_state.as_str() {
            "Protected" => {
                bar.finish_and_clear();
                output::note(&format!("'{name}' is protected"));
                return Ok(item);
            }
            "EnablingProtection"
            | "InitialReplicationInProgress"
            | "InitialReplicationRecoveryCompletionPending" => {}
            _ => {
                bar.finish_and_clear();
                let reason = format!(
                    "'{name}' is no longer on its way to being protected: {}",
                    it.protection_state_description
                );
                return Err(RefusedError {
                    reason,
                    allowed: item.into_known().properties.allowed_operations,
                }
                .into());
            }
        }
        for error in it.health_errors.iter().filter(|error| error.error_category == "Replication") {
            if !told.contains(&error.error_message) {
                bar.suspend(|| output::note(&format!("{}: {}", error.error_level, error.error_message)));
                bar.suspend(|| output::hint(&error.recommended_action));
                told.push(error.error_message.clone());
            }
        }
        let initial = &it.provider_specific_details.initial_replication_details;
        let percent = &initial.initial_replication_progress_percentage;
        let mut message = format!("{} of '{name}': {percent} %", it.protection_state_description);
        // An extra: an older server does not tell it.
        let status: Option<ItemStatus> =
            session.client.get(&session.v1(&format!("/items/{}", item.name))).await.ok();
        for disk in status.and_then(|status| status.cycle).into_iter().flat_map(|cycle| cycle.disks) {
            if let Some(share) = share(disk.bytes_done, disk.bytes_total) {
                message = format!("{message}; {} {share}", disk.key);
            }
        }
        bar.set_message(message);
        bar.tick();
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_as_far_as_it_is_known() {
        let disk = |key: &str, bytes_done, bytes_total| DiskProgress {
            key: key.to_owned(),
            bytes_done,
            bytes_total,
        };
        let mut progress = CycleProgress {
            phase: "Replicating changes".to_owned(),
            bytes_done: 1 << 30,
            bytes_total: 4 << 30,
            bytes_moved: 0,
            disks: vec![disk("vda", 1 << 30, 2 << 30), disk("vdb", 0, 0)],
        };
        assert_eq!(text(&progress), "Replicating changes (1.00 GiB of 4.00 GiB, 25 %)");
        assert_eq!(of_disk(&progress, "vda").as_deref(), Some("1.00 GiB of 2.00 GiB, 50 %"));
        assert_eq!((of_disk(&progress, "vdb"), of_disk(&progress, "vdc")), (None, None));
        progress.bytes_total = 0;
        assert_eq!(text(&progress), "Replicating changes");
    }
}
