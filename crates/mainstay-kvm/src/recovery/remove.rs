//! Removing a recovery VM with everything that belongs to it.

use mainstay_model::VmId;
use mainstay_provider::{PowerState, SiteError};

use super::{read_record, reserve};
use crate::capture::abandon;
use crate::error::{While as _, refused};
use crate::files::remove_directory;
use crate::host::Host;
use crate::libvirt::XmlKind;

/// Removes the domain, then its network, then its files.
pub(crate) async fn remove(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    if host.exists(vm).await? {
        let domain = host.domain(vm, XmlKind::Inactive).await?;
        if domain.recovery.is_none() {
            return Err(refused(
                format!("VM {} was not made by Mainstay and is not removed", domain.name),
                "Remove it with your own tools if it is not needed.",
            ));
        }
        if host.power(vm).await? != PowerState::Off {
            host.libvirt.destroy(vm).await.doing("stopping the recovery VM")?;
        }
        host.libvirt.undefine(vm).await.doing("removing the recovery VM")?;
    }
    abandon(host, vm).await?;
    let record = read_record(host, vm)?;
    if let Some(record) = &record {
        reserve::remove(&host.libvirt, &record.reservations).await?;
    }
    let own_network = record.and_then(|record| record.own_network);
    // A multicast group is there as long as somebody is in it.
    if let Some(network) = own_network.filter(|network| !network.starts_with("mcast:")) {
        host.libvirt.destroy_network(network).await.doing("removing the isolated network")?;
    }
    remove_directory(&host.files.recovery(vm))
}
