//! A home VM that is gone is made anew, with empty disks, for a failback to fill.

use std::path::{Path, PathBuf};

use mainstay_model::VmId;
use mainstay_provider::{SiteError, StagingSpec, VmDefinition};

use crate::command::{argument, run};
use crate::definition::Definition;
use crate::error::{While as _, not_found, refused};
use crate::files::give;
use crate::host::Host;
use crate::inventory::machines;
use crate::probe::hardware_acceleration;
use crate::xml::{Adaptation, DiskSource, Domain, adapt};

/// Defines the VM unless it exists.
pub(crate) async fn create_home(
    host: &Host,
    vm: VmId,
    definition: &VmDefinition,
    spec: &StagingSpec,
) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    if host.exists(vm).await? {
        return Ok(());
    }
    let definition = Definition::decode(definition)?;
    let source = Domain::parse(&definition.xml)?;
    if host.libvirt.find_by_name(&source.name).await?.is_some() {
        return Err(refused(
            format!("this host has another VM named {}", source.name),
            "Rename it, or fail back to another host.",
        ));
    }
    // Beside the overlays of recovery VMs, because this is where the host keeps what Mainstay makes.
    let directory = host.files.directory().join("home").join(vm.to_string());
    host.make_directory(&directory).await?;
    let owner = host.owner().await?;
    let mut disks = Vec::new();
    for wanted in &spec.disks {
        let disk = source.disk(&wanted.key);
        let disk = disk.ok_or_else(|| not_found(format!("the definition has no disk {}", wanted.key)))?;
        let format = if disk.format == "qcow2" { "qcow2" } else { "raw" };
        let path = choose_path(disk.path.as_deref(), &directory, &wanted.key, format);
        if !path.exists() {
            let new_path = path.with_extension("new");
            let size = wanted.size_bytes.to_string();
            run("qemu-img", &["create", "-q", "-f", format, argument(&new_path)?, &size]).await?;
            give(&new_path, owner)?;
            std::fs::rename(&new_path, &path).doing("naming a home disk")?;
        }
        disks.push(DiskSource::Image { key: wanted.key.clone(), path, format: format.to_owned() });
    }
    let adaptation = Adaptation {
        id: vm,
        name: &source.name,
        mark: None,
        vcpus: None,
        memory_bytes: None,
        disks: &disks,
        nics: None,
        has_hardware: hardware_acceleration().await.is_ok(),
        machines: &machines(host).await?,
        nvram: definition.write_nvram(&directory, owner)?,
        tpm: definition.write_tpm(&directory, owner).await?,
    };
    let xml = adapt(&definition.xml, &adaptation)?;
    host.libvirt.define(xml).await.doing("defining the home VM")?;
    Ok(())
}

/// The old place, if it is free and its directory exists; else a place of ours.
fn choose_path(old: Option<&str>, directory: &Path, key: &str, format: &str) -> PathBuf {
    let ours = directory.join(format!("{key}.{format}"));
    let old = old.map(Path::new).filter(|path| !path.starts_with("/dev"));
    match old {
        Some(old) if !ours.exists() && !old.exists() && old.parent().is_some_and(Path::is_dir) => {
            old.to_owned()
        }
        _ => ours,
    }
}
