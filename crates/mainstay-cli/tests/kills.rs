//! Random kills and cancels in every workflow, on real VMs. Long: `make soak` runs it.

use std::path::PathBuf;

use mainstay_lab::{DiskImage, GuestImages, Lab, LabOptions, kills};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a round takes about 100 s in software emulation; part of `make soak`"]
async fn kills_change_nothing_but_time() {
    let seed = std::env::var("MAINSTAY_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let rounds = std::env::var("MAINSTAY_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    let dir = std::env::temp_dir().join(format!("mainstay-kills-{}", std::process::id()));
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
    let outcome = kills::run(&mut lab, seed, rounds, &|text| println!("{text}")).await;
    if outcome.is_ok() {
        Lab::down(&dir).await.unwrap();
    }
    let report = outcome.unwrap_or_else(|error| panic!("{error:#}; the lab is left in {}", dir.display()));
    let longest = report.cancels.iter().map(|(_, time)| time.as_secs_f64()).fold(0.0, f64::max);
    println!(
        "{} kills and {} cancels with seed {seed}; the longest cancel took {longest:.1} s",
        report.kills.len(),
        report.cancels.len()
    );
}
