//! Random kills and cancels in every workflow, on real VMs.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]
#![expect(
    clippy::print_stdout,
    reason = "what is broken is told as it happens: with the seed, it is how a failure is found again"
)]

use std::{path::PathBuf, time::Duration};

use mainstay_lab::{DiskImage, GuestImages, Lab, LabOptions, kills};

/// Labs side by side: what one waits for leaves the processors to the other.
const LABS: u64 = 2;

/// So many kills of the server or an agent there are in each lab at least.
const OURS_MIN: usize = 10;

/// One round, unless `MAINSTAY_ROUNDS` says otherwise: a few dozen kills. `MAINSTAY_SEED`: the first lab's; the next have the next.
#[tokio::test(flavor = "multi_thread")]
async fn kills_change_nothing_but_time() {
    let seed = number("MAINSTAY_SEED", 1);
    let rounds = number("MAINSTAY_ROUNDS", 1);
    let mut labs = tokio::task::JoinSet::new();
    for lab in 0..LABS {
        labs.spawn(in_a_lab(seed + lab, rounds));
    }
    let reports = labs.join_all().await;
    let kills: usize = reports.iter().map(|report| report.kills.len()).sum();
    let cancels: Vec<_> = reports.into_iter().flat_map(|report| report.cancels).collect();
    let longest = cancels.iter().filter_map(|(_, time)| *time).max().unwrap_or(Duration::ZERO);
    println!(
        "{kills} kills and {} cancels with {LABS} seeds from {seed} on; the longest undisturbed cancel took {:.1} s",
        cancels.len(),
        longest.as_secs_f64()
    );
}

async fn in_a_lab(seed: u64, rounds: u64) -> kills::KillReport {
    let dir = mainstay_lab::scratch_dir().join(format!("mainstay-kills-{}-{seed}", std::process::id()));
    let options = LabOptions {
        has_relays: true,
        far_server: None,
        vms: 1,
        disk_mib: 64,
        format: DiskImage::Qcow2,
        guest_options: "ledger.rate=20 ledger.churn_kib=128".to_owned(),
        program: PathBuf::from(env!("CARGO_BIN_EXE_mainstay")),
        images: GuestImages::find().unwrap(),
    };
    let mut lab = Lab::up(&dir, &options).await.unwrap();
    let outcome = kills::run(&mut lab, seed, rounds, OURS_MIN, &|text| println!("{seed}: {text}")).await;
    if outcome.is_ok() {
        Lab::down(&dir).await.unwrap();
    }
    outcome.unwrap_or_else(|error| panic!("{error:#}; the lab is left in {}", dir.display()))
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().map_or(otherwise, |text| text.parse().unwrap())
}
