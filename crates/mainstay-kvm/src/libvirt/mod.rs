//! libvirt, as far as site recovery needs it.
//!
//! [`Libvirt`] is a connection that mends itself: every call looks its domain up anew by UUID, so a
//! daemon that was restarted in between does not matter. Calls block in C and therefore run on threads of
//! their own, a bounded number at once. No event loop is registered, hence no keep-alives: a daemon that
//! dies is noticed at once, one that hangs, or a QEMU that it waits for, after [`ANSWER_MAX`].

#![expect(unsafe_code, reason = "libvirt is a C library; everything unsafe in this crate is in this module")]

mod channel;
mod error;
mod ffi;
mod raw;
mod status;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, PowerState, SiteError};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::xml::Domain;
pub use error::LibvirtError;
pub(crate) use error::{NO_DOMAIN, NO_DOMAIN_BACKUP};
pub(crate) use raw::JobStatistics;
use raw::{RawConnection, RawDomain};
pub use status::{StatusError, lock_holder, mend_statuses, status_directory};

/// Calls at once. libvirtd serves twenty clients' calls at once and queues the rest itself.
const CALLS_MAX: usize = 16;

/// How long a call may take: looking at QEMU anew takes minutes on a host with a broken `/dev/kvm`. The thread of a call that has
/// taken longer stays with libvirt until that answers; whoever waits for it goes on.
const ANSWER_MAX: Duration = Duration::from_secs(300);

/// Which description of a domain to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XmlKind {
    /// As it runs now; as it would start when it is off.
    Live,
    /// As it will start next time.
    Inactive,
    /// As it will start next time, written for other hosts and older versions, secrets included.
    Portable,
}

impl XmlKind {
    fn flags(self) -> u32 {
        const SECURE: u32 = 1;
        const INACTIVE: u32 = 2;
        const MIGRATABLE: u32 = 8;
        match self {
            Self::Live => 0,
            Self::Inactive => SECURE | INACTIVE,
            Self::Portable => SECURE | INACTIVE | MIGRATABLE,
        }
    }
}

/// What a domain does, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// Whether it runs.
    pub power: PowerState,
    /// It was paused because a disk reported an error.
    pub is_paused_by_io_error: bool,
    /// The guest has shut down, but libvirt has not ended the process yet.
    pub is_shutting_down: bool,
}

/// A connection to a libvirt daemon that is made anew whenever it broke.
pub struct Libvirt {
    uri: String,
    connection: Arc<Mutex<Option<Arc<RawConnection>>>>,
    permits: Arc<Semaphore>,
}

impl std::fmt::Debug for Libvirt {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Libvirt").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Libvirt {
    /// A connection to `uri`, opened by the first call.
    pub fn new(uri: impl Into<String>) -> Self {
        Self { uri: uri.into(), connection: Arc::default(), permits: Arc::new(Semaphore::new(CALLS_MAX)) }
    }

    /// The URI of the daemon.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&RawConnection) -> Result<T, LibvirtError> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let permits = Arc::clone(&self.permits);
        let (slot, uri) = (Arc::clone(&self.connection), self.uri.clone());
        let answer = async {
            let permit =
                permits.acquire_owned().await.map_err(|_closed| LibvirtError::new(0, "shutting down"))?;
            let task = tokio::task::spawn_blocking(move || {
                // Held until C returns, also when nobody waits for it any more.
                let _permit = permit;
                let connection = connect(&slot, &uri)?;
                work(&connection).map_err(|mut error| {
                    error.is_disconnected = !connection.is_alive();
                    error
                })
            });
            task.await.map_err(|error| LibvirtError::new(0, format!("a call was interrupted: {error}")))?
        };
        tokio::time::timeout(ANSWER_MAX, answer).await.unwrap_or_else(|_| Err(LibvirtError::hung(ANSWER_MAX)))
    }

    async fn with_domain<T: Send + 'static>(
        &self,
        vm: VmId,
        work: impl FnOnce(&RawDomain) -> Result<T, LibvirtError> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        self.call(move |connection| work(&connection.domain(&vm.to_string())?)).await
    }

    /// Fails unless the daemon answers.
    pub async fn ping(&self) -> Result<(), LibvirtError> {
        self.call(|_connection| Ok(())).await
    }

    /// Versions of libvirt and of QEMU. Slow where libvirt has to look at QEMU anew, up to minutes on a host
    /// with a broken `/dev/kvm`.
    pub async fn versions(&self) -> Result<(String, String), LibvirtError> {
        let text = |number: u64| format!("{}.{}.{}", number / 1_000_000, number / 1000 % 1000, number % 1000);
        let (libvirt, qemu) = self.call(RawConnection::versions).await?;
        Ok((text(libvirt), text(qemu)))
    }

    /// The host's name.
    pub async fn hostname(&self) -> Result<String, LibvirtError> {
        self.call(RawConnection::hostname).await
    }

    /// The host's capabilities as XML.
    pub async fn capabilities(&self) -> Result<String, LibvirtError> {
        self.call(RawConnection::capabilities).await
    }

    /// All domains, running or not.
    pub async fn domains(&self) -> Result<Vec<VmId>, LibvirtError> {
        let uuids = self
            .call(|connection| {
                connection.domains()?.iter().map(RawDomain::uuid).collect::<Result<Vec<_>, _>>()
            })
            .await?;
        uuids.iter().map(|uuid| parse_id(uuid)).collect()
    }

    /// The domain of that name, if there is one.
    pub async fn find_by_name(&self, name: &str) -> Result<Option<VmId>, LibvirtError> {
        let name = name.to_owned();
        match self.call(move |connection| connection.domain_by_name(&name)?.uuid()).await {
            Ok(uuid) => parse_id(&uuid).map(Some),
            Err(error) if error.code == NO_DOMAIN => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The domain's name.
    pub async fn name(&self, vm: VmId) -> Result<String, LibvirtError> {
        self.with_domain(vm, |domain| Ok(domain.name())).await
    }

    /// The domain's description.
    pub async fn xml(&self, vm: VmId, kind: XmlKind) -> Result<String, LibvirtError> {
        self.with_domain(vm, move |domain| domain.xml(kind.flags())).await
    }

    /// Defines a domain, or redefines it.
    pub async fn define(&self, xml: impl Into<String>) -> Result<VmId, LibvirtError> {
        let xml = xml.into();
        let uuid = self.call(move |connection| connection.define(&xml)?.uuid()).await?;
        parse_id(&uuid)
    }

    /// Forgets a domain that is off, with everything that libvirt itself keeps of it.
    pub async fn undefine(&self, vm: VmId) -> Result<(), LibvirtError> {
        const MANAGED_SAVE: u32 = 1;
        const SNAPSHOTS_METADATA: u32 = 2;
        const NVRAM: u32 = 4;
        const CHECKPOINTS_METADATA: u32 = 16;
        const FLAGS: u32 = MANAGED_SAVE | SNAPSHOTS_METADATA | NVRAM | CHECKPOINTS_METADATA;
        self.with_domain(vm, |domain| domain.undefine(FLAGS)).await
    }

    /// What the domain does.
    pub async fn state(&self, vm: VmId) -> Result<DomainState, LibvirtError> {
        const PAUSED: i32 = 3;
        const SHUTDOWN: i32 = 4;
        const SHUTOFF: i32 = 5;
        const CRASHED: i32 = 6;
        const PAUSED_IO_ERROR: i32 = 5;
        let (state, reason) = self.with_domain(vm, RawDomain::state).await?;
        Ok(DomainState {
            power: match state {
                PAUSED => PowerState::Paused,
                SHUTOFF | CRASHED => PowerState::Off,
                _ => PowerState::Running,
            },
            is_paused_by_io_error: state == PAUSED && reason == PAUSED_IO_ERROR,
            is_shutting_down: state == SHUTDOWN,
        })
    }

    /// Starts a domain that is off, its processors halted if `is_paused`.
    pub async fn start(&self, vm: VmId, is_paused: bool) -> Result<(), LibvirtError> {
        self.with_domain(vm, move |domain| domain.create(u32::from(is_paused))).await
    }

    /// Halts the processors.
    pub async fn suspend(&self, vm: VmId) -> Result<(), LibvirtError> {
        self.with_domain(vm, RawDomain::suspend).await
    }

    /// Lets the processors go on.
    pub async fn resume(&self, vm: VmId) -> Result<(), LibvirtError> {
        self.with_domain(vm, RawDomain::resume).await
    }

    /// Presses the power button.
    pub async fn press_power_button(&self, vm: VmId) -> Result<(), LibvirtError> {
        const POWER_BUTTON: u32 = 1;
        self.with_domain(vm, |domain| domain.shut_down(POWER_BUTTON)).await
    }

    /// Ends the domain's process.
    pub async fn destroy(&self, vm: VmId) -> Result<(), LibvirtError> {
        self.with_domain(vm, RawDomain::destroy).await
    }

    /// Whether libvirt starts the domain with the host.
    pub async fn autostart(&self, vm: VmId) -> Result<bool, LibvirtError> {
        self.with_domain(vm, RawDomain::autostart).await
    }

    /// Sets whether libvirt starts the domain with the host.
    pub async fn set_autostart(&self, vm: VmId, is_on: bool) -> Result<(), LibvirtError> {
        self.with_domain(vm, move |domain| domain.set_autostart(is_on)).await
    }

    /// Whether the domain's memory lies in a managed save.
    pub async fn has_managed_save(&self, vm: VmId) -> Result<bool, LibvirtError> {
        self.with_domain(vm, RawDomain::has_managed_save).await
    }

    /// How many snapshots libvirt knows of the domain.
    pub async fn snapshots(&self, vm: VmId) -> Result<u32, LibvirtError> {
        self.with_domain(vm, RawDomain::snapshots).await
    }

    /// The virtual size of a disk.
    pub async fn disk_bytes(&self, vm: VmId, key: &str) -> Result<u64, LibvirtError> {
        let key = key.to_owned();
        self.with_domain(vm, move |domain| domain.disk_bytes(&key)).await
    }

    pub(crate) async fn backup_begin(&self, vm: VmId, xml: String) -> Result<(), LibvirtError> {
        self.with_domain(vm, move |domain| domain.backup_begin(&xml)).await
    }

    pub(crate) async fn backup_xml(&self, vm: VmId) -> Result<String, LibvirtError> {
        self.with_domain(vm, RawDomain::backup_xml).await
    }

    pub(crate) async fn abort_job(&self, vm: VmId) -> Result<(), LibvirtError> {
        self.with_domain(vm, RawDomain::abort_job).await
    }

    pub(crate) async fn job(&self, vm: VmId) -> Result<JobStatistics, LibvirtError> {
        self.with_domain(vm, RawDomain::job).await
    }

    /// Freezes all file systems of the guest; the agent has `timeout` to answer.
    pub(crate) async fn freeze(&self, vm: VmId, timeout: Duration) -> Result<(), SiteError> {
        let seconds = seconds(timeout);
        let frozen = self.with_domain(vm, move |domain| {
            // Without it a hung agent holds the domain for ever.
            domain.set_agent_timeout(seconds)?;
            domain.freeze()
        });
        match frozen.await {
            Err(error) if error.code == error::AGENT_UNRESPONSIVE => {
                let request = json!({"execute": "guest-fsfreeze-freeze"});
                self.agent_by_channel(vm, &request, timeout, error).await.map(drop)
            }
            other => Ok(other?),
        }
    }

    pub(crate) async fn thaw(&self, vm: VmId, timeout: Duration) -> Result<(), SiteError> {
        let seconds = seconds(timeout);
        let thawed = self.with_domain(vm, move |domain| {
            domain.set_agent_timeout(seconds)?;
            domain.thaw()
        });
        match thawed.await {
            Err(error) if error.code == error::AGENT_UNRESPONSIVE => {
                let request = json!({"execute": "guest-fsfreeze-thaw"});
                self.agent_by_channel(vm, &request, timeout, error).await.map(drop)
            }
            other => Ok(other?),
        }
    }

    /// A QMP command; answers what QEMU returned.
    pub async fn qmp(&self, vm: VmId, command: &str, arguments: Value) -> Result<Value, SiteError> {
        let mut request = json!({"execute": command});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let text = request.to_string();
        let answer = self.with_domain(vm, move |domain| domain.monitor_command(&text)).await?;
        returned(&answer, &format!("QEMU refused {command}"))
    }

    /// A command to the guest agent; answers what it returned.
    pub async fn agent(
        &self,
        vm: VmId,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, SiteError> {
        let mut request = json!({"execute": command});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let (text, seconds) = (request.to_string(), seconds(timeout));
        match self.with_domain(vm, move |domain| domain.agent_command(&text, seconds)).await {
            Err(error) if error.code == error::AGENT_UNRESPONSIVE => {
                self.agent_by_channel(vm, &request, timeout, error).await
            }
            answer => returned(&answer?, &format!("the guest agent refused {command}")),
        }
    }

    /// The same without libvirt, if it has lost sight of the agent; otherwise its own error.
    async fn agent_by_channel(
        &self,
        vm: VmId,
        request: &Value,
        timeout: Duration,
        error: LibvirtError,
    ) -> Result<Value, SiteError> {
        let Some(socket) = self.forgotten_agent(vm).await? else { return Err(error.into()) };
        let answer = channel::ask(&socket, &request.to_string(), timeout).await?;
        returned(&answer, &format!("the guest agent refused {}", request["execute"]))
    }

    /// Whether an agent has opened its channel in the guest, as far as anybody can tell.
    pub(crate) async fn is_agent_there(&self, domain: &Domain) -> bool {
        domain.agent.as_ref().is_some_and(|agent| agent.is_connected)
            || self.forgotten_agent(domain.id).await.is_ok_and(|socket| socket.is_some())
    }

    /// The socket of an agent that runs in the guest and that libvirt holds for gone.
    async fn forgotten_agent(&self, vm: VmId) -> Result<Option<PathBuf>, SiteError> {
        let Some(agent) = Domain::parse(&self.xml(vm, XmlKind::Live).await?)?.agent else { return Ok(None) };
        if agent.is_connected {
            return Ok(None);
        }
        Ok(channel::forgotten(&agent, &self.qmp(vm, "query-chardev", Value::Null).await?))
    }

    /// Names and descriptions of all networks; none if the daemon has no network driver.
    pub async fn networks(&self) -> Result<Vec<(String, String)>, LibvirtError> {
        match self.call(RawConnection::networks).await {
            Err(error) if error.code == error::NO_SUPPORT => Ok(Vec::new()),
            other => other,
        }
    }

    pub(crate) async fn create_network(&self, xml: String) -> Result<(), LibvirtError> {
        self.call(move |connection| connection.create_network(&xml)).await
    }

    /// Adds a DHCP reservation (`<host mac= ip=/>`) to a network, or removes it; for as long as the network is defined, or
    /// runs if it is not.
    pub(crate) async fn change_reservation(
        &self,
        network: &str,
        xml: String,
        is_added: bool,
    ) -> Result<(), LibvirtError> {
        const DELETE: u32 = 2;
        const ADD_LAST: u32 = 3;
        const DHCP_HOST: u32 = 4;
        const LIVE: u32 = 1;
        const CONFIG: u32 = 2;
        let (network, command) = (network.to_owned(), if is_added { ADD_LAST } else { DELETE });
        self.call(move |connection| {
            let update = |flags| connection.update_network(&network, command, DHCP_HOST, &xml, flags);
            // A network that does not run has only a definition, one that is not defined only runs.
            update(LIVE | CONFIG).or_else(|_| update(LIVE)).or_else(|_| update(CONFIG))
        })
        .await
    }

    /// Takes a network down; one that is gone is no error.
    pub(crate) async fn destroy_network(&self, name: String) -> Result<(), LibvirtError> {
        match self.call(move |connection| connection.destroy_network(&name)).await {
            Err(error) if [error::NO_NETWORK, error::NO_SUPPORT].contains(&error.code) => Ok(()),
            other => other,
        }
    }
}

fn seconds(timeout: Duration) -> i32 {
    // Zero would mean "do not wait" to libvirt.
    i32::try_from(timeout.as_secs()).unwrap_or(i32::MAX).max(1)
}

/// The connection, or a new one. Without an event loop libvirt notices a daemon that died only when it writes to it, so
/// the old connection is tried with a question that costs a tenth of a millisecond: the caller's own request is then
/// not lost to a daemon that was restarted long ago.
fn connect(slot: &Mutex<Option<Arc<RawConnection>>>, uri: &str) -> Result<Arc<RawConnection>, LibvirtError> {
    let known = slot.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(connection) = known.filter(|connection| connection.is_answering()) {
        return Ok(connection);
    }
    let connection = Arc::new(RawConnection::open(uri)?);
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&connection));
    Ok(connection)
}

fn parse_id(uuid: &str) -> Result<VmId, LibvirtError> {
    uuid.parse().map_err(|_invalid| LibvirtError::new(0, format!("'{uuid}' is not a UUID")))
}

/// The `return` of a JSON answer.
fn returned(answer: &str, refused: &str) -> Result<Value, SiteError> {
    let mut answer: Value = serde_json::from_str(answer)
        .map_err(|error| SiteError::new(ErrorKind::Failed, format!("{refused}: no JSON: {error}")))?;
    match answer.get_mut("return") {
        Some(value) => Ok(value.take()),
        None => {
            let text = answer["error"]["desc"].as_str().unwrap_or("no reason given").to_owned();
            Err(SiteError::new(ErrorKind::Failed, format!("{refused}: {text}")))
        }
    }
}
