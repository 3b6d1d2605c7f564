//! The whole journey on real VMs, as a new user sees it.

use std::process::Command;

use serde_json::Value;

const PHASES: [&str; 12] = [
    "initial-replication",
    "delta-replication",
    "test-failover",
    "test-failover-cleanup",
    "failover",
    "change-recovery-point",
    "failover-commit",
    "failback-synchronize",
    "failback-complete",
    "failback-commit",
    "reverse-replication",
    "planned-failover",
];

#[test]
fn the_demonstration_proves_every_phase_and_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    // Not beneath the scratch directory: the lab's machines may run as another account, which must get through.
    let dir = mainstay_lab::scratch_dir().join(format!("mainstay-journey-{}", std::process::id()));
    let report = scratch.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_mainstay"))
        .args(["demo", "--disk-size", "64M", "--json"])
        .arg(&report)
        .arg("--dir")
        .arg(&dir)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(report["ok"], true, "{told}");
    let phases = report["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|phase| phase["name"].as_str().unwrap()).collect();
    assert_eq!(names, PHASES);
    for phase in phases {
        assert_eq!(phase["proved"], true, "{phase}");
        assert_eq!(phase["ledger"]["corrupt"], 0, "{phase}");
        assert_eq!(phase["ledger"]["gaps"], 0, "{phase}");
    }
    // What a planned move costs is what changed, not what there is.
    let reverse = &phases[10];
    let (changed, moved) =
        (reverse["bytes_changed"].as_u64().unwrap(), reverse["bytes_moved"].as_u64().unwrap());
    assert!(moved * 10 <= changed * 13, "reverse replication moved {moved} bytes for {changed} changed ones");
    assert!(!dir.exists(), "{} is left behind", dir.display());
    let left = Command::new("pgrep").arg("-f").arg(&dir).output().unwrap();
    assert!(left.stdout.is_empty(), "processes are left behind: {}", String::from_utf8_lossy(&left.stdout));
}
