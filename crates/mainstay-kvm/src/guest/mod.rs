//! Talking to the guest through its agent.

mod address;

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, GuestAddress, SiteError};
use serde_json::{Value, json};

use crate::error::failed;
use crate::host::Host;

pub(crate) use address::set_address;

/// How long a question may take. A busy guest under emulation needs seconds.
pub(crate) const AGENT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a program in the guest may run.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// An adapter as the guest sees it.
struct GuestAdapter {
    name: String,
    mac: String,
    addresses: Vec<String>,
}

async fn ask(host: &Host, vm: VmId, command: &str, arguments: Value) -> Result<Value, SiteError> {
    host.libvirt.agent(vm, command, arguments, AGENT_TIMEOUT).await
}

/// Whether the agent answers.
pub(crate) async fn is_agent_up(host: &Host, vm: VmId) -> bool {
    host.libvirt.agent(vm, "guest-ping", Value::Null, Duration::from_secs(2)).await.is_ok()
}

async fn adapters(host: &Host, vm: VmId, timeout: Duration) -> Result<Vec<GuestAdapter>, SiteError> {
    let answer = host.libvirt.agent(vm, "guest-network-get-interfaces", Value::Null, timeout).await?;
    let read_address = |address: &Value| {
        Some(format!("{}/{}", address["ip-address"].as_str()?, address["prefix"].as_u64()?))
    };
    let read = |adapter: &Value| {
        let addresses = adapter["ip-addresses"].as_array().map(Vec::as_slice).unwrap_or_default();
        Some(GuestAdapter {
            name: adapter["name"].as_str()?.to_owned(),
            // The loopback has none.
            mac: adapter["hardware-address"].as_str()?.to_lowercase(),
            addresses: addresses.iter().filter_map(read_address).collect(),
        })
    };
    Ok(answer.as_array().map(Vec::as_slice).unwrap_or_default().iter().filter_map(read).collect())
}

/// All addresses that others can reach the guest by.
pub(crate) async fn addresses(host: &Host, vm: VmId) -> Result<Vec<GuestAddress>, SiteError> {
    addresses_within(host, vm, AGENT_TIMEOUT).await
}

/// The same with a guest that has so long to answer.
pub(crate) async fn addresses_within(
    host: &Host,
    vm: VmId,
    timeout: Duration,
) -> Result<Vec<GuestAddress>, SiteError> {
    let adapters = adapters(host, vm, timeout).await?;
    let of_adapter = |adapter: GuestAdapter| {
        let mac = adapter.mac;
        let own = |address: &String| !address.starts_with("fe80:");
        let addresses: Vec<String> = adapter.addresses.into_iter().filter(own).collect();
        addresses.into_iter().map(move |address| GuestAddress { mac: mac.clone(), address })
    };
    Ok(adapters
        .into_iter()
        .filter(|adapter| adapter.mac != "00:00:00:00:00:00")
        .flat_map(of_adapter)
        .collect())
}

/// How a program in the guest ended.
struct Ended {
    code: i64,
    output: String,
}

/// Runs a program in the guest and waits for its end.
async fn run(host: &Host, vm: VmId, program: &str, arguments: &[&str]) -> Result<Ended, SiteError> {
    let command = json!({"path": program, "arg": arguments, "capture-output": true});
    let started = ask(host, vm, "guest-exec", command).await?;
    let deadline = Instant::now() + PROGRAM_TIMEOUT;
    loop {
        let answer = ask(host, vm, "guest-exec-status", json!({"pid": started["pid"]})).await?;
        if answer["exited"] == true {
            let text = |name: &str| {
                let bytes = STANDARD.decode(answer[name].as_str().unwrap_or_default()).unwrap_or_default();
                String::from_utf8_lossy(&bytes).trim().to_owned()
            };
            // A program that was killed by a signal has no code.
            let code = answer["exitcode"].as_i64().unwrap_or(-1);
            return Ok(Ended { code, output: format!("{}{}", text("out-data"), text("err-data")) });
        }
        if Instant::now() > deadline {
            let message = format!("{program} in the guest does not end");
            return Err(SiteError::new(ErrorKind::TimedOut, message));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The same, where every end but a good one is an error.
async fn run_well(host: &Host, vm: VmId, program: &str, arguments: &[&str]) -> Result<(), SiteError> {
    let ended = run(host, vm, program, arguments).await?;
    if ended.code == 0 {
        return Ok(());
    }
    Err(failed(format!("{program} {} in the guest: {}", arguments.join(" "), ended.output)))
}
