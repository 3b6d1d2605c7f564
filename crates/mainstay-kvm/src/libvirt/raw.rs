//! Safe, blocking wrappers around the C functions. Every function here runs on a thread that may block.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};

use super::error::LibvirtError;
use super::ffi::{Api, BlockInfo, Connect, DomainObject, NetworkObject, TypedParameter, api, free};

pub(crate) type Result<T> = std::result::Result<T, LibvirtError>;

/// `VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL` of `libvirt/libvirt-domain.h`.
const BACKUP_REUSE_EXTERNAL: c_uint = 1;

/// What libvirt says about the job that runs on a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct JobStatistics {
    /// `virDomainJobOperation`; `None` when no job runs.
    pub(crate) operation: Option<u64>,
    /// Bytes in the scratch files of a backup.
    pub(crate) scratch_bytes: u64,
}

/// A connection to a libvirt daemon.
pub(crate) struct RawConnection {
    api: &'static Api,
    pointer: *mut Connect,
}

// SAFETY: libvirt's connection objects may be used from any thread and from several at once.
unsafe impl Send for RawConnection {}
// SAFETY: as above.
unsafe impl Sync for RawConnection {}

impl Drop for RawConnection {
    fn drop(&mut self) {
        // SAFETY: the pointer came from virConnectOpen and is given back once.
        unsafe { (self.api.virConnectClose)(self.pointer) };
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_nul| LibvirtError::new(0, "a text holds a zero byte"))
}

fn last_error(api: &Api) -> LibvirtError {
    // SAFETY: both read thread-local state of the calling thread, on which the failed call ran; the
    // message is valid until the next call on this thread and is copied at once.
    unsafe {
        let code = (api.virGetLastErrorCode)();
        let message = (api.virGetLastErrorMessage)();
        let message = if message.is_null() {
            "unknown error".into()
        } else {
            CStr::from_ptr(message).to_string_lossy()
        };
        LibvirtError::new(code, message)
    }
}

/// Takes over a string that libvirt allocated; null means that the call failed.
fn take_string(api: &Api, pointer: *mut c_char) -> Result<String> {
    if pointer.is_null() {
        return Err(last_error(api));
    }
    // SAFETY: libvirt answered a zero-terminated string that now belongs to us.
    unsafe {
        let text = CStr::from_ptr(pointer).to_string_lossy().into_owned();
        free(pointer.cast::<c_void>());
        Ok(text)
    }
}

fn copy_name(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the name belongs to a living object and is copied at once.
    unsafe { CStr::from_ptr(pointer).to_string_lossy().into_owned() }
}

impl RawConnection {
    pub(crate) fn open(uri: &str) -> Result<Self> {
        let api = api().map_err(|message| LibvirtError::new(0, message))?;
        let uri = c_string(uri)?;
        // SAFETY: the string lives until the call returns.
        let pointer = unsafe { (api.virConnectOpen)(uri.as_ptr()) };
        if pointer.is_null() {
            let mut error = last_error(api);
            // There is nobody to talk to, whatever the exact reason.
            error.is_disconnected = true;
            return Err(error);
        }
        Ok(Self { api, pointer })
    }

    pub(crate) fn is_alive(&self) -> bool {
        // SAFETY: the connection is open as long as `self` lives.
        unsafe { (self.api.virConnectIsAlive)(self.pointer) == 1 }
    }

    /// Asks the daemon for its version, the cheapest question that crosses the connection.
    pub(crate) fn is_answering(&self) -> bool {
        let mut version = 0;
        // SAFETY: writes one integer.
        self.is_alive() && unsafe { (self.api.virConnectGetLibVersion)(self.pointer, &raw mut version) } == 0
    }

    /// Versions of libvirt and of the hypervisor, as `1000000 * major + 1000 * minor + release`.
    pub(crate) fn versions(&self) -> Result<(u64, u64)> {
        let (mut library, mut hypervisor) = (0, 0);
        // SAFETY: both write one integer.
        unsafe {
            self.check((self.api.virConnectGetLibVersion)(self.pointer, &raw mut library))?;
            self.check((self.api.virConnectGetVersion)(self.pointer, &raw mut hypervisor))?;
        }
        Ok((library, hypervisor))
    }

    pub(crate) fn hostname(&self) -> Result<String> {
        // SAFETY: answers a new string or null.
        take_string(self.api, unsafe { (self.api.virConnectGetHostname)(self.pointer) })
    }

    pub(crate) fn capabilities(&self) -> Result<String> {
        // SAFETY: answers a new string or null.
        take_string(self.api, unsafe { (self.api.virConnectGetCapabilities)(self.pointer) })
    }

    pub(crate) fn domains(&self) -> Result<Vec<RawDomain>> {
        let mut list: *mut *mut DomainObject = null_mut();
        // SAFETY: libvirt allocates an array of that many new references, which are taken over here.
        unsafe {
            let count = self.check((self.api.virConnectListAllDomains)(self.pointer, &raw mut list, 0))?;
            let domains =
                (0..count as usize).map(|index| RawDomain { api: self.api, pointer: *list.add(index) });
            let domains = domains.collect();
            free(list.cast::<c_void>());
            Ok(domains)
        }
    }

    pub(crate) fn domain(&self, uuid: &str) -> Result<RawDomain> {
        let uuid = c_string(uuid)?;
        // SAFETY: the string lives until the call returns.
        self.adopt(unsafe { (self.api.virDomainLookupByUUIDString)(self.pointer, uuid.as_ptr()) })
    }

    pub(crate) fn domain_by_name(&self, name: &str) -> Result<RawDomain> {
        let name = c_string(name)?;
        // SAFETY: the string lives until the call returns.
        self.adopt(unsafe { (self.api.virDomainLookupByName)(self.pointer, name.as_ptr()) })
    }

    pub(crate) fn define(&self, xml: &str) -> Result<RawDomain> {
        let xml = c_string(xml)?;
        // SAFETY: the string lives until the call returns.
        self.adopt(unsafe { (self.api.virDomainDefineXMLFlags)(self.pointer, xml.as_ptr(), 0) })
    }

    /// Names and descriptions of all networks.
    pub(crate) fn networks(&self) -> Result<Vec<(String, String)>> {
        let mut list: *mut *mut NetworkObject = null_mut();
        // SAFETY: libvirt allocates an array of that many new references, which are taken over here.
        let networks: Vec<RawNetwork> = unsafe {
            let count = self.check((self.api.virConnectListAllNetworks)(self.pointer, &raw mut list, 0))?;
            let networks =
                (0..count as usize).map(|index| RawNetwork { api: self.api, pointer: *list.add(index) });
            let networks = networks.collect();
            free(list.cast::<c_void>());
            networks
        };
        networks.iter().map(|network| Ok((network.name(), network.xml()?))).collect()
    }

    /// Makes a network that lives until it is destroyed or the host restarts.
    pub(crate) fn create_network(&self, xml: &str) -> Result<()> {
        let xml = c_string(xml)?;
        // SAFETY: the string lives until the call returns.
        let pointer = unsafe { (self.api.virNetworkCreateXML)(self.pointer, xml.as_ptr()) };
        if pointer.is_null() {
            return Err(last_error(self.api));
        }
        drop(RawNetwork { api: self.api, pointer });
        Ok(())
    }

    /// Changes a part of a network.
    pub(crate) fn update_network(
        &self,
        name: &str,
        command: c_uint,
        section: c_uint,
        xml: &str,
        flags: c_uint,
    ) -> Result<()> {
        let (network, xml) = (self.network(name)?, c_string(xml)?);
        let update = self.api.virNetworkUpdate;
        // SAFETY: the network object is alive, and the string until the call returns.
        self.check(unsafe { update(network.pointer, command, section, -1, xml.as_ptr(), flags) }).map(drop)
    }

    fn network(&self, name: &str) -> Result<RawNetwork> {
        let name = c_string(name)?;
        // SAFETY: the string lives until the call returns; the reference is taken over.
        let pointer = unsafe { (self.api.virNetworkLookupByName)(self.pointer, name.as_ptr()) };
        if pointer.is_null() {
            return Err(last_error(self.api));
        }
        Ok(RawNetwork { api: self.api, pointer })
    }

    pub(crate) fn destroy_network(&self, name: &str) -> Result<()> {
        let network = self.network(name)?;
        // SAFETY: the network object is alive.
        self.check(unsafe { (self.api.virNetworkDestroy)(network.pointer) }).map(drop)
    }

    fn adopt(&self, pointer: *mut DomainObject) -> Result<RawDomain> {
        if pointer.is_null() { Err(last_error(self.api)) } else { Ok(RawDomain { api: self.api, pointer }) }
    }

    fn check(&self, result: c_int) -> Result<c_int> {
        if result < 0 { Err(last_error(self.api)) } else { Ok(result) }
    }
}

struct RawNetwork {
    api: &'static Api,
    pointer: *mut NetworkObject,
}

impl Drop for RawNetwork {
    fn drop(&mut self) {
        // SAFETY: one reference, given back once.
        unsafe { (self.api.virNetworkFree)(self.pointer) };
    }
}

impl RawNetwork {
    fn name(&self) -> String {
        // SAFETY: the name lives as long as the object.
        copy_name(unsafe { (self.api.virNetworkGetName)(self.pointer) })
    }

    fn xml(&self) -> Result<String> {
        // SAFETY: answers a new string or null.
        take_string(self.api, unsafe { (self.api.virNetworkGetXMLDesc)(self.pointer, 0) })
    }
}

/// A reference to a domain.
pub(crate) struct RawDomain {
    api: &'static Api,
    pointer: *mut DomainObject,
}

impl Drop for RawDomain {
    fn drop(&mut self) {
        // SAFETY: one reference, given back once.
        unsafe { (self.api.virDomainFree)(self.pointer) };
    }
}

/// Calls a function that takes the domain and plain arguments and answers a number.
macro_rules! call {
    ($self:ident, $function:ident $(, $argument:expr)*) => {{
        // SAFETY: the domain is alive, and every pointer among the arguments outlives the call.
        let result = unsafe { ($self.api.$function)($self.pointer $(, $argument)*) };
        if result < 0 { Err(last_error($self.api)) } else { Ok(result) }
    }};
}

impl RawDomain {
    pub(crate) fn uuid(&self) -> Result<String> {
        // A UUID as text, and the zero byte: VIR_UUID_STRING_BUFLEN.
        let mut buffer: [c_char; 37] = [0; 37];
        call!(self, virDomainGetUUIDString, buffer.as_mut_ptr())?;
        Ok(copy_name(buffer.as_ptr()))
    }

    pub(crate) fn name(&self) -> String {
        // SAFETY: the name lives as long as the object.
        copy_name(unsafe { (self.api.virDomainGetName)(self.pointer) })
    }

    pub(crate) fn xml(&self, flags: u32) -> Result<String> {
        // SAFETY: answers a new string or null.
        take_string(self.api, unsafe { (self.api.virDomainGetXMLDesc)(self.pointer, flags) })
    }

    /// `virDomainState` and the reason for it.
    pub(crate) fn state(&self) -> Result<(i32, i32)> {
        let (mut state, mut reason) = (0, 0);
        call!(self, virDomainGetState, &raw mut state, &raw mut reason, 0)?;
        Ok((state, reason))
    }

    pub(crate) fn autostart(&self) -> Result<bool> {
        let mut is_on = 0;
        call!(self, virDomainGetAutostart, &raw mut is_on)?;
        Ok(is_on != 0)
    }

    pub(crate) fn set_autostart(&self, is_on: bool) -> Result<()> {
        call!(self, virDomainSetAutostart, c_int::from(is_on)).map(drop)
    }

    pub(crate) fn undefine(&self, flags: u32) -> Result<()> {
        call!(self, virDomainUndefineFlags, flags).map(drop)
    }

    pub(crate) fn create(&self, flags: u32) -> Result<()> {
        call!(self, virDomainCreateWithFlags, flags).map(drop)
    }

    pub(crate) fn suspend(&self) -> Result<()> {
        call!(self, virDomainSuspend).map(drop)
    }

    pub(crate) fn resume(&self) -> Result<()> {
        call!(self, virDomainResume).map(drop)
    }

    pub(crate) fn shut_down(&self, flags: u32) -> Result<()> {
        call!(self, virDomainShutdownFlags, flags).map(drop)
    }

    pub(crate) fn destroy(&self) -> Result<()> {
        call!(self, virDomainDestroyFlags, 0).map(drop)
    }

    pub(crate) fn has_managed_save(&self) -> Result<bool> {
        Ok(call!(self, virDomainHasManagedSaveImage, 0)? != 0)
    }

    pub(crate) fn snapshots(&self) -> Result<u32> {
        Ok(call!(self, virDomainSnapshotNum, 0)? as u32)
    }

    /// The virtual size of a disk.
    pub(crate) fn disk_bytes(&self, key: &str) -> Result<u64> {
        let key = c_string(key)?;
        let mut info = BlockInfo::default();
        call!(self, virDomainGetBlockInfo, key.as_ptr(), &raw mut info, 0)?;
        Ok(info.capacity)
    }

    /// Begins a backup into images that are there already.
    pub(crate) fn backup_begin(&self, xml: &str) -> Result<()> {
        let xml = c_string(xml)?;
        call!(self, virDomainBackupBegin, xml.as_ptr(), null(), BACKUP_REUSE_EXTERNAL).map(drop)
    }

    pub(crate) fn backup_xml(&self) -> Result<String> {
        // SAFETY: answers a new string or null.
        take_string(self.api, unsafe { (self.api.virDomainBackupGetXMLDesc)(self.pointer, 0) })
    }

    pub(crate) fn abort_job(&self) -> Result<()> {
        call!(self, virDomainAbortJob).map(drop)
    }

    pub(crate) fn job(&self) -> Result<JobStatistics> {
        let (mut kind, mut count) = (0, 0);
        let mut parameters: *mut TypedParameter = null_mut();
        call!(self, virDomainGetJobStats, &raw mut kind, &raw mut parameters, &raw mut count, 0)?;
        let mut statistics = JobStatistics::default();
        if kind != 0 {
            statistics.operation = Some(0);
        }
        for index in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: libvirt allocated that many parameters, freed only below.
            let parameter = unsafe { &*parameters.add(index) };
            match copy_name(parameter.field.as_ptr()).as_str() {
                // An `int`; the upper half of the value is not set.
                "operation" if kind != 0 => statistics.operation = Some(parameter.value & 0xffff_ffff),
                "disk_temp_used" => statistics.scratch_bytes = parameter.value,
                _ => {}
            }
        }
        // SAFETY: the array is given back once; null is allowed.
        unsafe { (self.api.virTypedParamsFree)(parameters, count) };
        Ok(statistics)
    }

    pub(crate) fn set_agent_timeout(&self, seconds: i32) -> Result<()> {
        call!(self, virDomainAgentSetResponseTimeout, seconds, 0).map(drop)
    }

    pub(crate) fn freeze(&self) -> Result<()> {
        call!(self, virDomainFSFreeze, null(), 0, 0).map(drop)
    }

    pub(crate) fn thaw(&self) -> Result<()> {
        call!(self, virDomainFSThaw, null(), 0, 0).map(drop)
    }

    pub(crate) fn monitor_command(&self, command: &str) -> Result<String> {
        let command = c_string(command)?;
        let mut answer: *mut c_char = null_mut();
        call!(self, virDomainQemuMonitorCommand, command.as_ptr(), &raw mut answer, 0 as c_uint)?;
        take_string(self.api, answer)
    }

    pub(crate) fn agent_command(&self, command: &str, timeout_seconds: i32) -> Result<String> {
        let command = c_string(command)?;
        // SAFETY: the string lives until the call returns, which answers a new string or null.
        take_string(self.api, unsafe {
            (self.api.virDomainQemuAgentCommand)(self.pointer, command.as_ptr(), timeout_seconds, 0)
        })
    }
}
