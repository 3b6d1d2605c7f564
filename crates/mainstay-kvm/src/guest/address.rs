//! Giving a guest an address. It lasts until the guest's own configuration is applied again; a guest that shall keep it
//! needs its configuration changed by its administrator.

use std::time::{Duration, Instant};

use mainstay_model::VmId;
use mainstay_provider::SiteError;
use serde_json::Value;

use super::{AGENT_TIMEOUT, adapters, ask, run, run_well};
use crate::error::{not_found, refused};
use crate::host::Host;

/// Sets the address of the adapter with that MAC address.
pub(crate) async fn set_address(host: &Host, vm: VmId, mac: &str, address: &str) -> Result<(), SiteError> {
    let (plain, prefix) = split(address)?;
    if crate::recovery::read_record(host, vm)?
        .is_some_and(|record| record.reservations.iter().any(|reservation| reservation.is_for(mac, address)))
        && wait_for_lease(host, vm, mac, &plain).await?
    {
        return Ok(());
    }
    let adapters = adapters(host, vm, AGENT_TIMEOUT).await?;
    let adapter = adapters.iter().find(|adapter| adapter.mac.eq_ignore_ascii_case(mac));
    let adapter = adapter.ok_or_else(|| not_found(format!("the guest has no adapter {mac}")))?;
    if adapter.addresses.iter().any(|known| known == address) {
        return Ok(());
    }
    if is_windows(host, vm).await {
        let mask = mask_of(prefix);
        let name = format!("name={}", adapter.name);
        return run_well(
            host,
            vm,
            "netsh",
            &["interface", "ipv4", "set", "address", &name, "static", &plain, &mask],
        )
        .await;
    }
    run_well(host, vm, "ip", &["link", "set", "dev", &adapter.name, "up"]).await?;
    refuse_duplicate(host, vm, &adapter.name, &plain).await?;
    run_well(host, vm, "ip", &["-4", "addr", "flush", "dev", &adapter.name]).await?;
    run_well(host, vm, "ip", &["addr", "add", address, "dev", &adapter.name]).await
}

/// How long a guest that asks for an address when it boots may take to have the one that is reserved for it.
const LEASE_TIMEOUT: Duration = Duration::from_secs(30);
const LEASE_POLL: Duration = Duration::from_millis(500);

/// Waits until the guest says that it has an address; one that does not ask for any gets it from its agent instead.
async fn wait_for_lease(host: &Host, vm: VmId, mac: &str, plain: &str) -> Result<bool, SiteError> {
    let deadline = Instant::now() + LEASE_TIMEOUT;
    loop {
        let adapters = adapters(host, vm, AGENT_TIMEOUT).await?;
        let mut own = adapters.iter().filter(|adapter| adapter.mac.eq_ignore_ascii_case(mac));
        let has = |known: &String| known.split('/').next() == Some(plain);
        if own.any(|adapter| adapter.addresses.iter().any(has)) {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        tokio::time::sleep(LEASE_POLL).await;
    }
}

/// Checks that it is an IPv4 address with a prefix, before it reaches a program in the guest.
fn split(address: &str) -> Result<(String, u8), SiteError> {
    let wrong =
        || refused(format!("'{address}' is not an IPv4 address with a prefix"), "Write it as 10.0.0.7/24.");
    let (plain, prefix) = address.split_once('/').ok_or_else(wrong)?;
    let plain: std::net::Ipv4Addr = plain.parse().map_err(|_invalid| wrong())?;
    let prefix: u8 = prefix.parse().map_err(|_invalid| wrong())?;
    if prefix > 32 { Err(wrong()) } else { Ok((plain.to_string(), prefix)) }
}

fn mask_of(prefix: u8) -> String {
    let bits = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    std::net::Ipv4Addr::from(bits).to_string()
}

async fn is_windows(host: &Host, vm: VmId) -> bool {
    ask(host, vm, "guest-get-osinfo", Value::Null).await.is_ok_and(|info| info["id"] == "mswindows")
}

/// Asks the network whether somebody has the address. A guest without `arping` cannot ask.
async fn refuse_duplicate(host: &Host, vm: VmId, adapter: &str, address: &str) -> Result<(), SiteError> {
    let asked = run(host, vm, "arping", &["-D", "-q", "-c", "2", "-w", "2", "-I", adapter, address]).await;
    match asked {
        Ok(ended) if ended.code == 1 => Err(refused(
            format!("the address {address} is in use on the network"),
            "Choose another address, or stop the machine that has it.",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_pass() {
        assert_eq!(split("10.0.0.7/24").unwrap(), ("10.0.0.7".to_owned(), 24));
        for wrong in ["10.0.0.7", "10.0.0.7/33", "x/24", "10.0.0.7/24; reboot", "-h/24"] {
            assert!(split(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            (mask_of(24), mask_of(0), mask_of(32)),
            ("255.255.255.0".into(), "0.0.0.0".into(), "255.255.255.255".into())
        );
    }
}
