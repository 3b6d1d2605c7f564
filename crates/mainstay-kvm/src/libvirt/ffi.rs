//! The C functions of libvirt that we use, found at run time.
//!
//! Linking would make a server without libvirt fail to start, and the existing bindings lack backups.

use std::ffi::{c_char, c_int, c_uint, c_ulong, c_ulonglong, c_void};
use std::sync::OnceLock;

use libloading::Library;

macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub(super) struct $name {
            _private: [u8; 0],
        }
    )* };
}
opaque!(Connect, DomainObject, NetworkObject);

/// `virTypedParameter`: a name, a type, and eight bytes of value.
#[repr(C)]
pub(super) struct TypedParameter {
    pub(super) field: [c_char; 80],
    pub(super) kind: c_int,
    pub(super) value: u64,
}

/// `virDomainBlockInfo`.
#[repr(C)]
#[derive(Default)]
pub(super) struct BlockInfo {
    pub(super) capacity: c_ulonglong,
    pub(super) allocation: c_ulonglong,
    pub(super) physical: c_ulonglong,
}

pub(super) type ErrorHandler = extern "C" fn(*mut c_void, *mut c_void);

macro_rules! api {
    ($($library:ident { $($name:ident: fn($($argument:ty),*) -> $result:ty;)* })*) => {
        /// The functions, under their own names.
        #[expect(non_snake_case, reason = "the names are libvirt's")]
        pub(super) struct Api {
            $($(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*)*
        }

        impl Api {
            fn load() -> Result<Self, String> {
                $(let $library = open(concat!(stringify!($library), ".so.0").replace('_', "-").as_str())?;)*
                Ok(Self { $($($name: {
                    let name = concat!(stringify!($name), "\0");
                    // SAFETY: the declared type is the function's type in libvirt's public headers, whose
                    // ABI has been stable since 0.x; the library is never unloaded.
                    let symbol = unsafe { $library.get::<unsafe extern "C" fn($($argument),*) -> $result>(name.as_bytes()) };
                    *symbol.map_err(|error| format!("libvirt is too old: {error}"))?
                },)*)* })
            }
        }
    };
}

api! {
    libvirt {
        virInitialize: fn() -> c_int;
        virSetErrorFunc: fn(*mut c_void, ErrorHandler) -> ();
        virGetLastErrorCode: fn() -> c_int;
        virGetLastErrorMessage: fn() -> *const c_char;
        virConnectOpen: fn(*const c_char) -> *mut Connect;
        virConnectClose: fn(*mut Connect) -> c_int;
        virConnectIsAlive: fn(*mut Connect) -> c_int;
        virConnectGetLibVersion: fn(*mut Connect, *mut c_ulong) -> c_int;
        virConnectGetVersion: fn(*mut Connect, *mut c_ulong) -> c_int;
        virConnectGetHostname: fn(*mut Connect) -> *mut c_char;
        virConnectGetCapabilities: fn(*mut Connect) -> *mut c_char;
        virConnectListAllDomains: fn(*mut Connect, *mut *mut *mut DomainObject, c_uint) -> c_int;
        virConnectListAllNetworks: fn(*mut Connect, *mut *mut *mut NetworkObject, c_uint) -> c_int;
        virDomainLookupByUUIDString: fn(*mut Connect, *const c_char) -> *mut DomainObject;
        virDomainLookupByName: fn(*mut Connect, *const c_char) -> *mut DomainObject;
        virDomainFree: fn(*mut DomainObject) -> c_int;
        virDomainGetUUIDString: fn(*mut DomainObject, *mut c_char) -> c_int;
        virDomainGetName: fn(*mut DomainObject) -> *const c_char;
        virDomainGetXMLDesc: fn(*mut DomainObject, c_uint) -> *mut c_char;
        virDomainGetState: fn(*mut DomainObject, *mut c_int, *mut c_int, c_uint) -> c_int;
        virDomainGetAutostart: fn(*mut DomainObject, *mut c_int) -> c_int;
        virDomainSetAutostart: fn(*mut DomainObject, c_int) -> c_int;
        virDomainDefineXMLFlags: fn(*mut Connect, *const c_char, c_uint) -> *mut DomainObject;
        virDomainUndefineFlags: fn(*mut DomainObject, c_uint) -> c_int;
        virDomainCreateWithFlags: fn(*mut DomainObject, c_uint) -> c_int;
        virDomainSuspend: fn(*mut DomainObject) -> c_int;
        virDomainResume: fn(*mut DomainObject) -> c_int;
        virDomainShutdownFlags: fn(*mut DomainObject, c_uint) -> c_int;
        virDomainDestroyFlags: fn(*mut DomainObject, c_uint) -> c_int;
        virDomainHasManagedSaveImage: fn(*mut DomainObject, c_uint) -> c_int;
        virDomainSnapshotNum: fn(*mut DomainObject, c_uint) -> c_int;
        virDomainGetBlockInfo: fn(*mut DomainObject, *const c_char, *mut BlockInfo, c_uint) -> c_int;
        virDomainBackupBegin: fn(*mut DomainObject, *const c_char, *const c_char, c_uint) -> c_int;
        virDomainBackupGetXMLDesc: fn(*mut DomainObject, c_uint) -> *mut c_char;
        virDomainAbortJob: fn(*mut DomainObject) -> c_int;
        virDomainGetJobStats: fn(*mut DomainObject, *mut c_int, *mut *mut TypedParameter, *mut c_int, c_uint) -> c_int;
        virTypedParamsFree: fn(*mut TypedParameter, c_int) -> ();
        virDomainAgentSetResponseTimeout: fn(*mut DomainObject, c_int, c_uint) -> c_int;
        virDomainFSFreeze: fn(*mut DomainObject, *const *const c_char, c_uint, c_uint) -> c_int;
        virDomainFSThaw: fn(*mut DomainObject, *const *const c_char, c_uint, c_uint) -> c_int;
        virNetworkGetName: fn(*mut NetworkObject) -> *const c_char;
        virNetworkGetXMLDesc: fn(*mut NetworkObject, c_uint) -> *mut c_char;
        virNetworkLookupByName: fn(*mut Connect, *const c_char) -> *mut NetworkObject;
        virNetworkCreateXML: fn(*mut Connect, *const c_char) -> *mut NetworkObject;
        virNetworkUpdate: fn(*mut NetworkObject, c_uint, c_uint, c_int, *const c_char, c_uint) -> c_int;
        virNetworkDestroy: fn(*mut NetworkObject) -> c_int;
        virNetworkFree: fn(*mut NetworkObject) -> c_int;
    }
    libvirt_qemu {
        virDomainQemuMonitorCommand: fn(*mut DomainObject, *const c_char, *mut *mut c_char, c_uint) -> c_int;
        virDomainQemuAgentCommand: fn(*mut DomainObject, *const c_char, c_int, c_uint) -> *mut c_char;
    }
}

unsafe extern "C" {
    /// The C library's own; libvirt's answers come from its `malloc`.
    pub(super) fn free(pointer: *mut c_void);
}

fn open(name: &str) -> Result<&'static Library, String> {
    // SAFETY: libvirt's initialisers only register themselves; it is meant to be loaded this way.
    let library = unsafe { Library::new(name) };
    let library = library.map_err(|error| format!("libvirt is not installed: {error}"))?;
    // Its functions are used from threads whose end we do not wait for.
    Ok(Box::leak(Box::new(library)))
}

/// libvirt prints every error by itself unless told otherwise.
extern "C" fn be_silent(_: *mut c_void, _: *mut c_void) {}

/// The functions, loaded on first use.
pub(super) fn api() -> Result<&'static Api, String> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    let loaded = API.get_or_init(|| {
        let api = Api::load()?;
        // SAFETY: no arguments; may be called more than once.
        if unsafe { (api.virInitialize)() } < 0 {
            return Err("libvirt does not initialise".to_owned());
        }
        // SAFETY: the handler ignores its arguments and lives for ever.
        unsafe { (api.virSetErrorFunc)(std::ptr::null_mut(), be_silent) };
        Ok(api)
    });
    loaded.as_ref().map_err(Clone::clone)
}
