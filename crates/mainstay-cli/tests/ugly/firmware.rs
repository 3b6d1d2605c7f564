//! UEFI variables and the TPM's state travel with the VM, there and back.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use mainstay_kvm::libvirt::XmlKind;
use mainstay_lab::{HOME, LedgerCopy, RECOVERY};

use crate::support::World;

/// Where a copy's firmware keeps its variables, and its TPM its state.
struct State {
    variables: PathBuf,
    tpm: PathBuf,
}

async fn state_of(world: &World, site: &str) -> Result<State> {
    let (found, vm) = world.lab.vm("vm1", LedgerCopy::Active).await?;
    ensure!(found.name() == site, "the VM is at {}", found.name());
    let xml = found.libvirt().xml(vm, XmlKind::Live).await?;
    let between = |from: &str, to: &str| Some(xml.split(from).nth(1)?.split(to).next()?.to_owned());
    let variables = between("<nvram", "</nvram>").context("UEFI variables")?;
    let variables = PathBuf::from(variables.rsplit('>').next().context("a path")?);
    // Where a copy was made from a recovery point, its description says where the state is.
    let tpm = match xml.split("<tpm").nth(1).and_then(|tpm| tpm.split("</tpm>").next()) {
        Some(tpm) if tpm.contains("path='") => PathBuf::from(
            tpm.split("path='").nth(1).and_then(|rest| rest.split('\'').next()).context("a path")?,
        ),
        _ => {
            let base = variables.parent().and_then(Path::parent).context("libvirt's directory")?;
            base.join("swtpm").join(vm.to_string()).join("tpm2")
        }
    };
    Ok(State { variables, tpm })
}

impl State {
    /// Changes both as the guest might: in the spare block of the variables, which the firmware uses only while it tidies
    /// them up, and by a file beside the TPM's own.
    fn mark(&self, word: &str) -> Result<()> {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::File::options().write(true).open(&self.variables)?;
        file.write_all_at(word.as_bytes(), file.metadata()?.len() - 4096)?;
        std::fs::write(self.tpm.join("mark"), word)?;
        Ok(())
    }

    fn has(&self, word: &str) -> Result<()> {
        let variables = std::fs::read(&self.variables)?;
        ensure!(
            variables.windows(word.len()).any(|window| window == word.as_bytes()),
            "{} has no '{word}'",
            self.variables.display()
        );
        let mark = std::fs::read_to_string(self.tpm.join("mark"))
            .with_context(|| format!("{} has no mark", self.tpm.display()))?;
        ensure!(mark == word, "the TPM's state has '{mark}', not '{word}'");
        // The TPM's own state is there too, and the emulator accepted it: the VM runs.
        let state = std::fs::metadata(self.tpm.join("tpm2-00.permall"))?;
        ensure!(state.len() > 0, "the TPM's state is empty");
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn firmware_variables_and_tpm_state_go_there_and_come_back() -> Result<()> {
    let mut world = World::up("firmware").await?;
    let mut vm = world.guest("vm1", "")?;
    vm.has_uefi_and_tpm = true;
    world.protect(&vm).await?;
    let home = state_of(&world, HOME).await?;
    home.mark("changed at home")?;
    world.wait_point("vm1").await?;

    world.cli(&["planned-failover", "vm1", "--direction", "PrimaryToRecovery"]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    let away = state_of(&world, RECOVERY).await?;
    assert!(away.variables != home.variables && away.tpm != home.tpm);
    away.has("changed at home")?;
    away.mark("changed there")?;
    world.cli(&["commit", "vm1"]).expect(0);

    world.cli(&["planned-failover", "vm1", "--direction", "RecoveryToPrimary"]).expect(6);
    world.cli(&["complete-failover", "vm1"]).expect(0);
    world.whole("vm1", HOME).await?;
    let home = state_of(&world, HOME).await?;
    home.has("changed there")?;
    world.proved()
}
