//! From an accepted failover to the running VM, without a shutdown of the source (which has just been killed).

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use mainstay_block::{
    BLOCK_BYTES,
    frame::{Effort, FrameBuilder},
};
use mainstay_lab::{HOME, Item, Lab, LabAction, LedgerCopy, LedgerVm, RECOVERY};
use mainstay_store::{Consistency, FrameUse, PointMeta, SessionSpec, Store, StoreOptions, local_storage};
use uuid::Uuid;

use crate::{
    data::Random,
    figure::{Figure, median, spread},
    output::note,
    stand::{GUEST_TIMEOUT, Scale, Stand, protect},
};

/// The guest's own file system; points that are added for the number's sake change what lies behind it.
const FILE_SYSTEM_MIB: u64 = 64;
/// Blocks that each added point changes.
const BLOCKS_PER_POINT: u64 = 64;
/// A cycle in the middle of a measurement would be another measurement.
const COPY_FREQUENCY_SECONDS: u32 = 3600;

/// What differs between the figures.
struct Case {
    name: &'static str,
    disk_mib: u64,
    /// Recovery points; more than one are put into the store while server and source site are down.
    points: u64,
    /// Whether the source site's agent is down.
    is_home_lost: bool,
}

const CASES: [Case; 5] = [
    Case { name: "failover-to-running", disk_mib: 256, points: 1, is_home_lost: false },
    Case { name: "failover-to-running-10-gb-disks", disk_mib: 10 << 10, points: 1, is_home_lost: false },
    Case { name: "failover-to-running-1-tb-disks", disk_mib: 1 << 20, points: 1, is_home_lost: false },
    Case { name: "failover-to-running-home-lost-1-point", disk_mib: 256, points: 1, is_home_lost: true },
    Case { name: "failover-to-running-home-lost-200-points", disk_mib: 256, points: 200, is_home_lost: true },
];

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    let samples = scale.pick(3, 1);
    Stand::with(dir, async |stand| {
        let mut seconds: Vec<Vec<f64>> = CASES.iter().map(|_| Vec::new()).collect();
        // Round by round, so that a noisy moment of the machine does not fall on one figure alone.
        for sample in 0..samples {
            for (index, (case, seconds)) in CASES.iter().zip(&mut seconds).enumerate() {
                let found =
                    fail_over(stand, case, &format!("vm{index}x{sample}")).await.context(case.name)?;
                note(&format!("{}: {found:.2} s", case.name));
                seconds.push(found);
            }
        }
        let figure = |(case, seconds): (&Case, &Vec<f64>)| {
            let value = median(seconds).unwrap_or(f64::NAN);
            Figure {
                name: case.name.to_owned(),
                value,
                unit: "s",
                peer: None,
                ratio: value,
                aim: 1.0,
                accept: 3.0,
                note: format!("median of {samples}, {} s", spread(seconds)),
            }
        };
        Ok(CASES.iter().zip(&seconds).map(figure).collect())
    })
    .await
}

/// Makes a guest, protects it, kills it, fails over; then ends the copy, so that it takes nothing from the next.
async fn fail_over(stand: &mut Stand, case: &Case, vm: &str) -> Result<f64> {
    stand
        .guest(LedgerVm {
            disk_mib: case.disk_mib,
            file_system_mib: Some(FILE_SYSTEM_MIB),
            options: "ledger.rate=5 ledger.ring_mib=4".to_owned(),
            ..LedgerVm::new(vm)
        })
        .await?;
    let item = protect(&stand.lab, vm, COPY_FREQUENCY_SECONDS).await?;
    if case.is_home_lost {
        stand.lab.act(LabAction::Stop, &format!("agent:{HOME}")).await?;
    }
    if case.points > 1 {
        let replica = item.status().await?.id.parse()?;
        stand.lab.act(LabAction::Stop, "server").await?;
        add_points(&stand.lab, replica, case.points - 1).await?;
        stand.lab.act(LabAction::Start, "server").await?;
        stand.lab.wait_connected(RECOVERY).await?;
        let found = item.points().await?.len() as u64;
        ensure!(found == case.points, "there are {found} recovery points, not {}", case.points);
    }
    let elapsed = stand.fail_over(&item, vm).await?;
    proves_itself(stand, &item, vm).await?;
    stand.lab.act(LabAction::Kill, &format!("vm:{vm}@{RECOVERY}")).await?;
    if case.is_home_lost {
        stand.lab.act(LabAction::Start, &format!("agent:{HOME}")).await?;
        stand.lab.wait_connected(HOME).await?;
    }
    Ok(elapsed.as_secs_f64())
}

/// A VM that runs and is not whole would be no result.
async fn proves_itself(stand: &Stand, item: &Item, vm: &str) -> Result<()> {
    let ledger = stand.lab.ledger(vm, LedgerCopy::Active, GUEST_TIMEOUT).await?;
    ensure!(ledger.site == RECOVERY, "'{vm}' runs at {}", ledger.site);
    ensure!(
        ledger.corrupt == 0 && ledger.gaps == 0 && ledger.disks_agree,
        "the ledger of '{vm}' is not whole: {ledger:?}"
    );
    let location = item.show().await?.active_location;
    ensure!(location == "Recovery", "the item is active at {location}");
    Ok(())
}

/// Adds real recovery points to a replica, each with changes of its own, while no server has the store open.
async fn add_points(lab: &Lab, replica: Uuid, count: u64) -> Result<()> {
    let storage = local_storage(&lab.dir().join("server/store"))?;
    let store = Store::open(storage, StoreOptions::default());
    let info = store.replica(replica).await?;
    let head = info.head.context("the replica has no recovery point")?;
    let head = store.point(replica, head).await?;
    let definition = store.definition(replica, head.id).await?;
    let mut random = Random::new(3);
    let first = (FILE_SYSTEM_MIB << 20) / BLOCK_BYTES;
    let blocks = head.disks.first().context("a disk")?.bytes / BLOCK_BYTES - first;
    let mut parent = head.id;
    for number in 1..=count {
        let spec = SessionSpec {
            session: Uuid::new_v4(),
            replica,
            generation: info.generation,
            parent: Some(parent),
            disks: head.disks.clone(),
            fork: false,
        };
        let session = store.begin(spec).await?;
        let mut places: Vec<u64> = (0..BLOCKS_PER_POINT).map(|_| first + random.next() % blocks).collect();
        places.sort_unstable();
        places.dedup();
        let mut frame = FrameBuilder::new();
        for place in places {
            let mut block = vec![0; BLOCK_BYTES as usize];
            random.noise(&mut block);
            frame.push_data(0, place, &block)?;
        }
        session.append(1, frame.finish(Effort::Small)?, FrameUse::Changed).await?;
        let meta = PointMeta {
            time_ms: head.time_ms + number,
            consistency: Consistency::Crash,
            definition: Some(Bytes::clone(&definition)),
        };
        parent = session.commit(meta).await?;
    }
    Ok(())
}
