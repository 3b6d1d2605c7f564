//! A home VM that is gone is made anew, with empty disks, for a failback to fill; and goes again if it was not filled.

use std::path::{Path, PathBuf};

use mainstay_model::VmId;
use mainstay_provider::{PowerState, SiteError, StagingSpec, VmDefinition};
use serde::{Deserialize, Serialize};

use crate::command::{argument, run};
use crate::definition::Definition;
use crate::error::{While as _, not_found, refused};
use crate::files::{check_disk_key, give, read_record, remove_directory, remove_file, write_record};
use crate::host::Host;
use crate::inventory::machines;
use crate::probe::hardware_acceleration;
use crate::xml::{Adaptation, DiskSource, Domain, adapt};

/// A VM that was made and not yet filled. Written before anything is made; goes with the merge.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct MadeRecord {
    /// Images that were made for it, wherever they are.
    images: Vec<PathBuf>,
}

fn home_directory(host: &Host, vm: VmId) -> PathBuf {
    // Beside the overlays of recovery VMs, because this is where the host keeps what Mainstay makes.
    host.files.directory().join("home").join(vm.to_string())
}

pub(super) fn made_path(host: &Host, vm: VmId) -> PathBuf {
    home_directory(host, vm).join("made.json")
}

/// Removes a VM that was made and not filled.
pub(crate) async fn remove_home(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    let Some(made) = read_record::<MadeRecord>(&made_path(host, vm))? else { return Ok(()) };
    if host.exists(vm).await? {
        if host.power(vm).await? != PowerState::Off {
            // Its disks are empty or half filled: whoever started it runs nothing that could be lost.
            host.libvirt.destroy(vm).await.doing("stopping a home VM that was made for a failback")?;
        }
        host.libvirt.undefine(vm).await.doing("removing a home VM that was made for a failback")?;
    }
    for image in made.images {
        remove_file(&image)?;
    }
    remove_directory(&home_directory(host, vm))
}

/// Defines the VM unless it exists.
pub(crate) async fn create_home(
    host: &Host,
    vm: VmId,
    definition: &VmDefinition,
    spec: &StagingSpec,
) -> Result<(), SiteError> {
    spec.disks.iter().try_for_each(|disk| check_disk_key(&disk.key))?;
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
    let directory = home_directory(host, vm);
    host.make_directory(&directory).await?;
    let owner = host.owner().await?;
    let mut disks = Vec::new();
    let mut made = read_record(&made_path(host, vm))?.unwrap_or(MadeRecord { images: Vec::new() });
    for wanted in &spec.disks {
        let disk = source.disk(&wanted.key);
        let disk = disk.ok_or_else(|| not_found(format!("the definition has no disk {}", wanted.key)))?;
        let format = if disk.format == "qcow2" { "qcow2" } else { "raw" };
        let path = choose_path(disk.path.as_deref(), &directory, &wanted.key, format);
        if !path.exists() {
            if !made.images.contains(&path) {
                made.images.push(path.clone());
            }
            write_record(&made_path(host, vm), &made)?;
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
