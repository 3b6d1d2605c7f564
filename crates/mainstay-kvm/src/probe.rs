//! Whether the processor can run guests here: found by running one, because `/dev/kvm` alone proves
//! nothing (nested in a hypervisor that hides the feature, a guest is created and then hangs).

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::sync::OnceCell;

/// How long the probe guest may take; it has ten bytes of code.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// `mov al, 0x10; out 0xf4, al; hlt; jmp -3` as a boot sector: writes to the debug exit device.
const PROBE_CODE: [u8; 7] = [0xb0, 0x10, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];
/// What QEMU then exits with: twice the number written, plus one.
const PROBE_EXIT: i32 = 0x21;

/// Whether hardware acceleration works on this machine, or why not. Probed once per process.
pub async fn hardware_acceleration() -> Result<(), String> {
    static RESULT: OnceCell<Result<(), String>> = OnceCell::const_new();
    RESULT.get_or_init(probe).await.clone()
}

async fn probe() -> Result<(), String> {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut flags =
        processor.lines().filter(|line| line.starts_with("flags")).flat_map(str::split_whitespace);
    if !flags.any(|flag| flag == "vmx" || flag == "svm") {
        return Err("the processor shows no virtualisation feature (vmx or svm)".to_owned());
    }
    run_probe_guest("kvm").await
}

/// Runs the probe guest with an accelerator.
async fn run_probe_guest(accelerator: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("the probe guest could not be run: {error}");
    let path = std::env::temp_dir().join(format!("mainstay-probe-{}-{accelerator}", std::process::id()));
    let mut sector = vec![0; 512];
    sector[..PROBE_CODE.len()].copy_from_slice(&PROBE_CODE);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&path, &sector).map_err(failed)?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", accelerator, "-m", "16", "-display", "none", "-nodefaults", "-no-user-config"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-drive"]);
    command.arg(format!("file={},format=raw,if=ide,readonly=off,snapshot=on", path.display()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let result = tokio::time::timeout(PROBE_TIMEOUT, command.output()).await;
    // A leftover of 512 bytes in the temporary directory harms nobody.
    let _ = std::fs::remove_file(&path);
    let output = result.map_err(|_elapsed| "a probe guest hangs under KVM".to_owned())?.map_err(failed)?;
    if output.status.code() == Some(PROBE_EXIT) {
        return Ok(());
    }
    Err(format!("the probe guest failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_probe_guest_itself_works() {
        // Emulation runs everywhere, so the guest's code is tested also where KVM is missing.
        run_probe_guest("tcg").await.unwrap();
    }
}
