//! What is known of replicas since they were last read through.

use mainstay_api::v1::{DamagedObject, ItemScrub, ScrubState};
use mainstay_control::{Control, db::ItemRecord};

use super::super::convert::time_text;

pub(super) fn shown(control: &Control, item: &ItemRecord) -> ItemScrub {
    let (scrub, bytes_read) = (&item.scrub, control.scrubs.progress(item.id));
    let damaged = scrub.damage.iter().map(|damage| DamagedObject {
        key: damage.key.clone(),
        what: damage.what.clone(),
        points: damage.points as u64,
    });
    let state = match bytes_read {
        Some(_) => ScrubState::Running,
        None if scrub.requested_ms.is_some() || scrub.is_recheck_due => ScrubState::Requested,
        None => ScrubState::Idle,
    };
    ItemScrub {
        item: item.name.clone(),
        vm: item.vm_name.clone(),
        state,
        bytes_read,
        finished: scrub.finished_ms.map(time_text),
        objects: scrub.objects,
        bytes: scrub.bytes,
        mended: scrub.mended,
        damage: damaged.collect(),
        damaged_points: scrub.damaged_points.iter().map(ToString::to_string).collect(),
        is_repair_pending: scrub.wants_repair(),
    }
}
