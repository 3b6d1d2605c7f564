//! Bodies of requests: what their fields may hold, told field by field before anything is done with them.
//!
//! An operation has a table of its fields. The table is checked first, so that whoever sent a wrong value reads which field,
//! which value and what would be right; then the body is read into its type. Fields that no table names are unknown or
//! read-only and are ignored, also with nonsense in them.

use mainstay_api::arm::{HYPERV_REPLICA_AZURE, HYPERV_REPLICA_AZURE_FAILBACK};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{convert::last_segment, error::ApiError};

/// What a field takes. Everywhere an empty text or null stands for leaving the field out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Takes {
    /// One of these words, in any case.
    Word(&'static [&'static str]),
    /// `true` or `false`, as text (as the service has it) or as they are.
    Flag,
    /// A whole number from, to.
    Number(u64, u64),
    /// A fraction from, to.
    Fraction(f64, f64),
    /// Text of so many characters at most, without control characters other than line ends.
    Text(usize),
    /// A name that a VM can have on a host.
    VmName,
    /// The ARM id or name of a resource.
    Id,
    /// A GUID.
    Guid,
    /// A MAC address.
    Mac,
    /// An IP address.
    Ip,
    /// An IPv4 address with the length of its prefix: drivers know no other.
    Address,
    /// `VCPUS` or `VCPUSxMEMORY_MIB`.
    Size,
    /// A time in RFC 3339.
    Time,
    /// An e-mail address.
    Email,
    /// Nothing but its absence: what it would ask for is not offered, for the reason.
    Nothing(&'static str),
    /// An object; its fields have lines of their own.
    Object,
    /// A list of so many entries at most; the entries have lines of their own.
    List(usize),
}

/// A line of an operation's table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    /// Names joined by `.`; `[]` follows the name of a list whose entries are meant.
    path: &'static str,
    takes: Takes,
    is_required: bool,
}

/// A field that can be left out.
pub(super) const fn field(path: &'static str, takes: Takes) -> Field {
    Field { path, takes, is_required: false }
}

/// A field that an operation cannot do without.
pub(super) const fn required(path: &'static str, takes: Takes) -> Field {
    Field { path, takes, is_required: true }
}

/// Longest remark, as long as the service's portal takes one.
pub(super) const COMMENTS_MAX: usize = 1024;
/// Longest name of a VM: what Azure takes for Linux.
const VM_NAME_MAX: usize = 64;
/// Longest id: what ARM itself takes.
const ID_MAX: usize = 2048;
/// What an error repeats of a value or message at most.
const SHOWN_MAX: usize = 120;
/// What is told of an error of the reader at most.
const MESSAGE_MAX: usize = 400;

pub(super) const FABRIC: &[Field] = &[
    field("properties", Takes::Object),
    field("properties.customDetails", Takes::Object),
    // The type of a bare creation, and what a fabric then answers.
    field(
        "properties.customDetails.instanceType",
        Takes::Word(&["FabricSpecificCreationInput", "HyperVSite"]),
    ),
];

pub(super) const PROVIDER: &[Field] = &[
    required("properties", Takes::Object),
    required("properties.machineName", Takes::Text(63)),
    field("properties.machineId", Takes::Text(ID_MAX)),
    field("properties.biosId", Takes::Text(ID_MAX)),
    required("properties.authenticationIdentityInput", Takes::Object),
    required("properties.resourceAccessIdentityInput", Takes::Object),
];

const HISTORY: Takes = Takes::Number(0, mainstay_model::RETENTION_HOURS_MAX as u64);
const INTERVAL: Takes = Takes::Number(
    mainstay_model::COPY_FREQUENCY_SECONDS_MIN as u64,
    mainstay_model::COPY_FREQUENCY_SECONDS_MAX as u64,
);
const SCENARIO: Takes = Takes::Word(&[HYPERV_REPLICA_AZURE]);

macro_rules! policy_fields {
    ($($name:literal),*) => {
        &[
            required("properties", Takes::Object),
            $(
                field(concat!("properties.", $name), Takes::Object),
                field(concat!("properties.", $name, ".instanceType"), SCENARIO),
                field(concat!("properties.", $name, ".recoveryPointHistoryDuration"), HISTORY),
                field(concat!("properties.", $name, ".recoveryPointHistoryDurationInHours"), HISTORY),
                field(concat!("properties.", $name, ".applicationConsistentSnapshotFrequencyInHours"), HISTORY),
                field(concat!("properties.", $name, ".replicationInterval"), INTERVAL),
                field(
                    concat!("properties.", $name, ".onlineReplicationStartTime"),
                    Takes::Nothing("initial replication begins at once; leave it null"),
                ),
            )*
        ]
    };
}

/// Create, update, and a policy as it was answered.
pub(super) const POLICY: &[Field] =
    policy_fields!("providerSpecificInput", "replicationProviderSettings", "providerSpecificDetails");

pub(super) const CONTAINER_MAPPING: &[Field] = &[
    required("properties", Takes::Object),
    required("properties.policyId", Takes::Id),
    required("properties.targetProtectionContainerId", Takes::Id),
    field("properties.providerSpecificInput", Takes::Object),
    field(
        "properties.providerSpecificInput.instanceType",
        Takes::Word(&[HYPERV_REPLICA_AZURE, "ReplicationProviderSpecificContainerMappingInput"]),
    ),
];

pub(super) const REMOVE_CONTAINER_MAPPING: &[Field] = &[
    field("properties", Takes::Object),
    field("properties.providerSpecificInput", Takes::Object),
    field(
        "properties.providerSpecificInput.instanceType",
        Takes::Word(&[HYPERV_REPLICA_AZURE, "ReplicationProviderContainerUnmappingInput"]),
    ),
];

pub(super) const DISCOVER: &[Field] = &[
    field("properties", Takes::Object),
    field("properties.friendlyName", Takes::Text(256)),
    field("properties.ipAddress", Takes::Ip),
    field("properties.osType", Takes::Word(&["Windows", "Linux"])),
];

const OS_TYPE: Takes = Takes::Word(&["Windows", "Linux", "Other"]);
const RDP: Takes = Takes::Word(&["Never", "OnlyOnTestFailover", "Always"]);
const LICENSE: Takes = Takes::Word(&["NotSpecified", "NoLicenseType", "WindowsServer"]);
const SQL_LICENSE: Takes = Takes::Word(&["NotSpecified", "NoLicenseType", "PAYG", "AHUB"]);

pub(super) const ENABLE: &[Field] = &[
    required("properties", Takes::Object),
    required("properties.policyId", Takes::Id),
    required("properties.protectableItemId", Takes::Id),
    field("properties.providerSpecificDetails", Takes::Object),
    field("properties.providerSpecificDetails.instanceType", SCENARIO),
    field("properties.providerSpecificDetails.hvHostVmId", Takes::Guid),
    field("properties.providerSpecificDetails.vmName", Takes::Text(256)),
    field("properties.providerSpecificDetails.osType", OS_TYPE),
    field("properties.providerSpecificDetails.vhdId", Takes::Text(256)),
    field("properties.providerSpecificDetails.targetAzureVmName", Takes::VmName),
    field("properties.providerSpecificDetails.targetAzureNetworkId", Takes::Id),
    field("properties.providerSpecificDetails.targetVmSize", Takes::Size),
    field("properties.providerSpecificDetails.disksToInclude", Takes::List(64)),
    field("properties.providerSpecificDetails.disksToInclude[]", Takes::Text(256)),
    field("properties.providerSpecificDetails.useManagedDisks", Takes::Flag),
    field("properties.providerSpecificDetails.useManagedDisksForReplication", Takes::Flag),
    field("properties.providerSpecificDetails.enableRdpOnTargetOption", RDP),
    field("properties.providerSpecificDetails.licenseType", LICENSE),
    field("properties.providerSpecificDetails.sqlServerLicenseType", SQL_LICENSE),
];

pub(super) const UPDATE_ITEM: &[Field] = &[
    field("properties", Takes::Object),
    field("properties.recoveryAzureVMName", Takes::VmName),
    field("properties.recoveryAzureVmName", Takes::VmName),
    field("properties.recoveryAzureVMSize", Takes::Size),
    field("properties.selectedRecoveryAzureNetworkId", Takes::Id),
    field("properties.selectedTfoAzureNetworkId", Takes::Id),
    field("properties.selectedSourceNicId", Takes::Mac),
    field("properties.enableRdpOnTargetOption", RDP),
    field("properties.licenseType", LICENSE),
    field("properties.vmNics", Takes::List(64)),
    field("properties.vmNics[]", Takes::Object),
    required("properties.vmNics[].nicId", Takes::Mac),
    field("properties.vmNics[].selectionType", Takes::Word(&["SelectedByUser", "SelectedByDefault"])),
    field("properties.vmNics[].recoveryVMNetworkId", Takes::Id),
    field("properties.vmNics[].tfoVMNetworkId", Takes::Id),
    field("properties.vmNics[].macPolicy", Takes::Word(&["Keep", "Generate"])),
    field("properties.vmNics[].ipConfigs", Takes::List(64)),
    field("properties.vmNics[].ipConfigs[]", Takes::Object),
    field("properties.vmNics[].ipConfigs[].isPrimary", Takes::Flag),
    field("properties.vmNics[].ipConfigs[].isSeletedForFailover", Takes::Flag),
    field("properties.vmNics[].ipConfigs[].recoveryStaticIPAddress", Takes::Address),
    field("properties.providerSpecificDetails", Takes::Object),
    field("properties.providerSpecificDetails.instanceType", SCENARIO),
    field("properties.providerSpecificDetails.useManagedDisks", Takes::Flag),
    field("properties.providerSpecificDetails.sqlServerLicenseType", SQL_LICENSE),
];

const PRIMARY_TO_RECOVERY: Field = field("properties.failoverDirection", DIRECTION);
const DIRECTION: Takes = Takes::Word(&["PrimaryToRecovery", "RecoveryToPrimary"]);
const DETAILS: Field = field("properties.providerSpecificDetails", Takes::Object);
const DETAILS_TYPE: Field = field("properties.providerSpecificDetails.instanceType", SCENARIO);
const DETAILS_POINT: Field = field("properties.providerSpecificDetails.recoveryPointId", Takes::Id);
const PROPERTIES: Field = field("properties", Takes::Object);

pub(super) const TEST_FAILOVER: &[Field] = &[
    PROPERTIES,
    PRIMARY_TO_RECOVERY,
    field("properties.networkType", Takes::Word(&["VmNetworkAsInput", "NoNetworkAttachAsInput"])),
    field("properties.networkId", Takes::Id),
    field("properties.skipTestFailoverCleanup", Takes::Flag),
    DETAILS,
    DETAILS_TYPE,
    DETAILS_POINT,
];

pub(super) const UNPLANNED_FAILOVER: &[Field] = &[
    PROPERTIES,
    PRIMARY_TO_RECOVERY,
    field("properties.sourceSiteOperations", Takes::Word(&["Required", "NotRequired"])),
    DETAILS,
    DETAILS_TYPE,
    DETAILS_POINT,
];

pub(super) const PLANNED_FAILOVER: &[Field] = &[
    PROPERTIES,
    field("properties.failoverDirection", DIRECTION),
    DETAILS,
    field(
        "properties.providerSpecificDetails.instanceType",
        Takes::Word(&[HYPERV_REPLICA_AZURE, HYPERV_REPLICA_AZURE_FAILBACK]),
    ),
    DETAILS_POINT,
    field(
        "properties.providerSpecificDetails.dataSyncOption",
        Takes::Word(&["ForDownTime", "ForSynchronization"]),
    ),
    field(
        "properties.providerSpecificDetails.recoveryVmCreationOption",
        Takes::Word(&["CreateVmIfNotFound", "NoAction"]),
    ),
    field("properties.providerSpecificDetails.providerIdForAlternateRecovery", Takes::Id),
];

pub(super) const APPLY_RECOVERY_POINT: &[Field] = &[
    required("properties", Takes::Object),
    required("properties.recoveryPointId", Takes::Id),
    DETAILS,
    DETAILS_TYPE,
];

pub(super) const REPROTECT: &[Field] = &[
    PROPERTIES,
    PRIMARY_TO_RECOVERY,
    DETAILS,
    DETAILS_TYPE,
    field("properties.providerSpecificDetails.hvHostVmId", Takes::Guid),
    field("properties.providerSpecificDetails.osType", OS_TYPE),
];

pub(super) const DISABLE: &[Field] = &[
    PROPERTIES,
    field("properties.disableProtectionReason", Takes::Word(&["NotSpecified", "MigrationComplete"])),
    field("properties.replicationProviderInput", Takes::Object),
    field(
        "properties.replicationProviderInput.instanceType",
        Takes::Word(&["DisableProtectionProviderSpecificInput", HYPERV_REPLICA_AZURE]),
    ),
];

pub(super) const EXPORT_JOBS: &[Field] = &[
    field("startTime", Takes::Time),
    field("endTime", Takes::Time),
    field("fabricId", Takes::Id),
    field("affectedObjectTypes", Takes::Text(256)),
    field("jobStatus", Takes::Text(256)),
    field("jobOutputType", Takes::Word(&["Json", "Xml", "Excel"])),
    field("jobName", Takes::Text(256)),
    // Minutes; the places that are farthest ahead of or behind UTC are 14 and 12 hours away.
    field("timezoneOffset", Takes::Fraction(-840.0, 840.0)),
];

pub(super) const ALERT_SETTING: &[Field] = &[
    PROPERTIES,
    field("properties.sendToOwners", Takes::Word(&["Send", "DoNotSend", "true", "false"])),
    field("properties.customEmailAddresses", Takes::List(50)),
    field("properties.customEmailAddresses[]", Takes::Email),
    field("properties.locale", Takes::Text(35)),
];

pub(super) const VAULT_SETTING: &[Field] = &[
    required("properties", Takes::Object),
    field("properties.migrationSolutionId", Takes::Id),
    field("properties.vmwareToAzureProviderType", Takes::Text(64)),
];

pub(super) const EXTENDED_INFO: &[Field] = &[
    PROPERTIES,
    field("properties.integrityKey", Takes::Text(4096)),
    field("properties.encryptionKey", Takes::Text(4096)),
    field("properties.encryptionKeyThumbprint", Takes::Text(256)),
    field("properties.algorithm", Takes::Text(64)),
];

pub(super) const CERTIFICATE: &[Field] = &[
    required("properties", Takes::Object),
    field("properties.authType", Takes::Word(&["AAD", "AzureActiveDirectory"])),
    // No real one has more than a few KiB.
    required("properties.certificate", Takes::Text(65_536)),
];

pub(super) const CHECK_NAME: &[Field] = &[
    required("type", Takes::Word(&["Microsoft.RecoveryServices/Vaults"])),
    required("name", Takes::Text(50)),
];

const MAPPING_TYPE: Takes = Takes::Word(&["VmmToAzure", "VmmToVmm"]);

pub(super) const CREATE_NETWORK_MAPPING: &[Field] = &[
    required("properties", Takes::Object),
    field("properties.recoveryFabricName", Takes::Id),
    required("properties.recoveryNetworkId", Takes::Id),
    field("properties.fabricSpecificDetails", Takes::Object),
    field("properties.fabricSpecificDetails.instanceType", MAPPING_TYPE),
];

pub(super) const UPDATE_NETWORK_MAPPING: &[Field] = &[
    PROPERTIES,
    field("properties.recoveryFabricName", Takes::Id),
    field("properties.recoveryNetworkId", Takes::Id),
    field("properties.fabricSpecificDetails", Takes::Object),
    field("properties.fabricSpecificDetails.instanceType", MAPPING_TYPE),
];

pub(super) const RESOLVE_HEALTH: &[Field] = &[
    required("properties", Takes::Object),
    required("properties.healthErrors", Takes::List(100)),
    field("properties.healthErrors[]", Takes::Object),
    required("properties.healthErrors[].healthErrorId", Takes::Text(256)),
];

/// Besides [`ENABLE`].
pub(super) const PUT_ITEM_AGAIN: &[Field] = &[
    field("properties.providerSpecificDetails.recoveryAzureVmName", Takes::VmName),
    field("properties.providerSpecificDetails.recoveryAzureVMName", Takes::VmName),
    field("properties.providerSpecificDetails.recoveryAzureVMSize", Takes::Size),
    field("properties.providerSpecificDetails.selectedRecoveryAzureNetworkId", Takes::Id),
    field("properties.providerSpecificDetails.vmNics", Takes::List(64)),
    field("properties.providerSpecificDetails.vmNics[]", Takes::Object),
    required("properties.providerSpecificDetails.vmNics[].nicId", Takes::Mac),
    field("properties.providerSpecificDetails.vmNics[].recoveryVMNetworkId", Takes::Id),
    field("properties.providerSpecificDetails.vmNics[].ipConfigs", Takes::List(64)),
    field("properties.providerSpecificDetails.vmNics[].ipConfigs[]", Takes::Object),
    field("properties.providerSpecificDetails.vmNics[].ipConfigs[].recoveryStaticIPAddress", Takes::Address),
];

macro_rules! plan_fields {
    ([$($ids:expr),*], $groups:expr, $($side:literal),*) => {
        &[
            required("properties", Takes::Object),
            $($ids,)*
            field("properties.failoverDeploymentModel", Takes::Word(&["NotApplicable", "Classic", "ResourceManager"])),
            $groups,
            field("properties.groups[]", Takes::Object),
            required("properties.groups[].groupType", Takes::Word(&["Shutdown", "Failover", "Boot"])),
            field("properties.groups[].replicationProtectedItems", Takes::List(MACHINES)),
            field("properties.groups[].replicationProtectedItems[]", Takes::Object),
            required("properties.groups[].replicationProtectedItems[].id", Takes::Id),
            field("properties.groups[].replicationProtectedItems[].virtualMachineId", Takes::Id),
            $(
                field(concat!("properties.groups[].", $side), Takes::List(ACTIONS)),
                field(concat!("properties.groups[].", $side, "[]"), Takes::Object),
                required(concat!("properties.groups[].", $side, "[].actionName"), Takes::Text(200)),
                required(concat!("properties.groups[].", $side, "[].failoverTypes"), Takes::List(3)),
                field(concat!("properties.groups[].", $side, "[].failoverTypes[]"), FAILOVER_TYPE),
                required(concat!("properties.groups[].", $side, "[].failoverDirections"), Takes::List(2)),
                field(concat!("properties.groups[].", $side, "[].failoverDirections[]"), DIRECTION),
                required(concat!("properties.groups[].", $side, "[].customDetails"), Takes::Object),
                required(concat!("properties.groups[].", $side, "[].customDetails.instanceType"), ACTION_TYPE),
                field(concat!("properties.groups[].", $side, "[].customDetails.description"), Takes::Text(COMMENTS_MAX)),
                field(concat!("properties.groups[].", $side, "[].customDetails.path"), Takes::Text(255)),
                field(concat!("properties.groups[].", $side, "[].customDetails.timeout"), Takes::Text(64)),
                field(concat!("properties.groups[].", $side, "[].customDetails.fabricLocation"), FABRIC_LOCATION),
            )*
        ]
    };
}

const MACHINES: usize = mainstay_model::recovery_plan::MACHINES_MAX;
const ACTIONS: usize = mainstay_model::recovery_plan::ACTIONS_MAX;
/// Those of machines, and those of the shutdown and of the failover.
const GROUPS: usize = mainstay_model::recovery_plan::GROUPS_MAX + 2;
const FAILOVER_TYPE: Takes = Takes::Word(&["TestFailover", "PlannedFailover", "UnplannedFailover"]);
const ACTION_TYPE: Takes = Takes::Word(&["ManualActionDetails", "ScriptActionDetails"]);
const FABRIC_LOCATION: Takes = Takes::Word(&["Primary", "Recovery"]);

pub(super) const CREATE_RECOVERY_PLAN: &[Field] = plan_fields!(
    [required("properties.primaryFabricId", Takes::Id), required("properties.recoveryFabricId", Takes::Id)],
    required("properties.groups", Takes::List(GROUPS)),
    "startGroupActions",
    "endGroupActions"
);

pub(super) const UPDATE_RECOVERY_PLAN: &[Field] =
    plan_fields!([], field("properties.groups", Takes::List(GROUPS)), "startGroupActions", "endGroupActions");

/// All failovers of a plan; what only one of them knows the others ignore.
pub(super) const PLAN_FAILOVER: &[Field] = &[
    PROPERTIES,
    field("properties.failoverDirection", DIRECTION),
    field("properties.networkType", Takes::Word(&["VmNetworkAsInput", "NoNetworkAttachAsInput"])),
    field("properties.networkId", Takes::Id),
    field("properties.sourceSiteOperations", Takes::Word(&["Required", "NotRequired"])),
    // One pair of sites has one kind of replication.
    field("properties.providerSpecificDetails", Takes::List(1)),
    field("properties.providerSpecificDetails[]", Takes::Object),
    field(
        "properties.providerSpecificDetails[].instanceType",
        Takes::Word(&[HYPERV_REPLICA_AZURE, HYPERV_REPLICA_AZURE_FAILBACK]),
    ),
    field(
        "properties.providerSpecificDetails[].recoveryPointType",
        Takes::Word(&["Latest", "LatestApplicationConsistent", "LatestProcessed"]),
    ),
    field(
        "properties.providerSpecificDetails[].dataSyncOption",
        Takes::Word(&["ForDownTime", "ForSynchronization"]),
    ),
    field(
        "properties.providerSpecificDetails[].recoveryVmCreationOption",
        Takes::Word(&["CreateVmIfNotFound", "NoAction"]),
    ),
];

/// The vault itself. What it says of alerts, keys and networks belongs to Azure.
pub(super) const VAULT: &[Field] = &vault(field("location", Takes::Text(64)));

/// A vault that is to be made.
pub(super) const NEW_VAULT: &[Field] = &vault(required("location", Takes::Text(64)));

const fn vault(location: Field) -> [Field; 7] {
    [
        location,
        field("tags", Takes::Object),
        field("sku", Takes::Object),
        field("sku.name", Takes::Word(&["Standard", "RS0"])),
        field("identity", Takes::Object),
        PROPERTIES,
        field("properties.publicNetworkAccess", Takes::Word(&["Enabled", "Disabled"])),
    ]
}

/// Longest life of a token or a service principal: a century, which is for ever.
const DAYS: Takes = Takes::Number(0, 36_500);

pub(super) const TOKEN: &[Field] =
    &[required("label", Takes::Text(128)), required("role", Takes::Text(32)), field("days", DAYS)];

pub(super) const SERVICE_PRINCIPAL: &[Field] =
    &[required("name", Takes::Text(128)), required("role", Takes::Text(32)), field("days", DAYS)];

pub(super) const REGISTER: &[Field] = &[
    required("secret", Takes::Text(256)),
    required("host", Takes::Text(63)),
    required("version", Takes::Text(64)),
];

pub(super) const COMMENTS: &[Field] = &[PROPERTIES, field("properties.comments", Takes::Text(COMMENTS_MAX))];

/// Reads a body; `null` and an empty body are an empty object.
pub(super) fn read<T: DeserializeOwned>(body: &[u8], fields: &[Field]) -> Result<T, ApiError> {
    let body = if body.is_empty() || body == b"null" { b"{}" } else { body };
    check(body, fields)?;
    let mut reader = serde_json::Deserializer::from_slice(body);
    let read = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { String::new() } else { format!("{path}: ") };
        unreadable(format!("{place}{}", error.inner()))
    })?;
    reader.end().map_err(|error| unreadable(error.to_string()))?;
    Ok(read)
}

fn unreadable(what: impl AsRef<str>) -> ApiError {
    ApiError::bad_request(
        "InvalidRequestBody",
        format!("the request body cannot be read: {}", cut(what.as_ref(), MESSAGE_MAX)),
        "Correct it and try again.",
    )
}

/// Holds a body against a table.
fn check(body: &[u8], fields: &[Field]) -> Result<(), ApiError> {
    let body: Value = serde_json::from_slice(body).map_err(|error| unreadable(error.to_string()))?;
    if !body.is_object() {
        return Err(unreadable("it is not an object"));
    }
    fields.iter().try_for_each(|field| check_below(&body, "", field.path, field))
}

/// Follows what is left of a field's path.
fn check_below(value: &Value, above: &str, rest: &str, field: &Field) -> Result<(), ApiError> {
    let (name, below) = rest.split_once('.').map_or((rest, None), |(name, below)| (name, Some(below)));
    let (name, is_each) = name.strip_suffix("[]").map_or((name, false), |name| (name, true));
    let place = if above.is_empty() { name.to_owned() } else { format!("{above}.{name}") };
    let found = value.get(name).unwrap_or(&Value::Null);
    let check_one = |found: &Value, place: &str| match below {
        // What is absent holds nothing that could be required: the line of the object itself says whether it is.
        Some(_) if found.is_null() => Ok(()),
        Some(below) => check_below(found, place, below, field),
        None => check_value(found, place, field),
    };
    match (is_each, found) {
        (true, Value::Array(entries)) => entries
            .iter()
            .enumerate()
            .try_for_each(|(index, entry)| check_one(entry, &format!("{place}[{index}]"))),
        (true, _) => Ok(()),
        (false, found) => check_one(found, &place),
    }
}

fn check_value(value: &Value, place: &str, field: &Field) -> Result<(), ApiError> {
    let is_absent = value.is_null() || value.as_str().is_some_and(str::is_empty);
    if is_absent && !field.is_required {
        return Ok(());
    }
    if !is_absent && field.takes.is_fulfilled(value) {
        return Ok(());
    }
    let shown = value.to_string();
    let what =
        if is_absent { "is missing".to_owned() } else { format!("cannot be {}", cut(&shown, SHOWN_MAX)) };
    Err(ApiError::bad_request(
        "InvalidParameter",
        format!("{place} {what}: expected is {}", field.takes.expected()),
        "Correct it and try again; nothing was changed.",
    ))
}

/// The beginning of a text.
pub(super) fn cut(text: &str, characters_max: usize) -> String {
    match text.char_indices().nth(characters_max) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl Takes {
    fn is_fulfilled(self, value: &Value) -> bool {
        match (self, value) {
            (Self::Object, Value::Object(_)) | (Self::Flag, Value::Bool(_)) => true,
            (Self::List(length_max), Value::Array(entries)) => entries.len() <= length_max,
            (Self::Number(from, to), Value::Number(number)) => {
                // `7.0` is whole too.
                let whole = number.as_u64().or_else(|| {
                    number
                        .as_f64()
                        .filter(|it| it.fract() == 0.0 && (0.0..1e15).contains(it))
                        .map(|it| it as u64)
                });
                whole.is_some_and(|it| (from..=to).contains(&it))
            }
            (Self::Fraction(from, to), Value::Number(number)) => {
                number.as_f64().is_some_and(|number| (from..=to).contains(&number))
            }
            (takes, Value::String(text)) => takes.is_text(text),
            _ => false,
        }
    }

    fn is_text(self, text: &str) -> bool {
        let is_plain = |c: char| !c.is_control();
        match self {
            Self::Word(words) => words.iter().any(|word| word.eq_ignore_ascii_case(text)),
            Self::Flag => ["true", "false"].iter().any(|word| word.eq_ignore_ascii_case(text)),
            Self::Text(characters_max) => {
                text.chars().count() <= characters_max
                    && text.chars().all(|c| is_plain(c) || matches!(c, '\n' | '\r' | '\t'))
            }
            Self::VmName => {
                text.chars().count() <= VM_NAME_MAX
                    && text.chars().all(|c| is_plain(c) && c != '/')
                    && !text.trim().is_empty()
                    && !matches!(text, "." | "..")
            }
            Self::Id => {
                text.len() <= ID_MAX && text.chars().all(is_plain) && !last_segment(text).trim().is_empty()
            }
            Self::Guid => text.parse::<uuid::Uuid>().is_ok(),
            Self::Mac => is_mac(text),
            Self::Ip => text.parse::<std::net::IpAddr>().is_ok(),
            Self::Address => mainstay_control::app::check_address(text).is_ok(),
            Self::Size => super::items::parse_size(text).is_ok(),
            Self::Time => text.parse::<jiff::Timestamp>().is_ok(),
            Self::Email => text.parse::<lettre::Address>().is_ok(),
            Self::Number(..) | Self::Fraction(..) | Self::Nothing(_) | Self::Object | Self::List(_) => false,
        }
    }

    fn expected(self) -> String {
        match self {
            Self::Word(words) => words.join(" or "),
            Self::Flag => "true or false".to_owned(),
            Self::Number(from, to) => format!("a whole number from {from} to {to}"),
            Self::Fraction(from, to) => format!("a number from {from} to {to}"),
            Self::Text(characters_max) => format!("plain text of {characters_max} characters at most"),
            Self::VmName => format!("a name of {VM_NAME_MAX} characters at most without '/'"),
            Self::Id => "the id or name of a resource".to_owned(),
            Self::Guid => "a GUID".to_owned(),
            Self::Mac => "a MAC address such as 52:54:00:12:34:56".to_owned(),
            Self::Ip => "an IP address such as 10.0.0.7".to_owned(),
            Self::Address => {
                "an IPv4 address with its prefix length such as 10.0.0.7/24 (IPv6 addresses cannot be set)"
                    .to_owned()
            }
            Self::Size => "VCPUSxMEMORY_MIB such as 2x1024 (at least 1x16)".to_owned(),
            Self::Time => "a time such as 2026-01-31T23:59:59Z".to_owned(),
            Self::Email => "an e-mail address".to_owned(),
            Self::Nothing(reason) => format!("nothing, because {reason}"),
            Self::Object => "an object".to_owned(),
            Self::List(length_max) => format!("a list of {length_max} entries at most"),
        }
    }
}

fn is_mac(text: &str) -> bool {
    let is_octet = |octet: &str| octet.len() == 2 && octet.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.split(':').count() == 6 && text.split(':').all(is_octet)
}

#[cfg(test)]
mod tests {
    use hyper::StatusCode;
    use serde_json::json;

    use super::*;

    fn refused(body: &Value, fields: &[Field]) -> String {
        let error = read::<Value>(body.to_string().as_bytes(), fields).unwrap_err();
        assert_eq!(error.status(), StatusCode::BAD_REQUEST);
        error.message().to_owned()
    }

    #[test]
    fn a_refusal_names_field_value_and_what_is_expected() {
        let body = json!({ "properties": { "providerSpecificInput": { "replicationInterval": 4 } } });
        let message = refused(&body, POLICY);
        assert!(
            message.contains("properties.providerSpecificInput.replicationInterval cannot be 4"),
            "{message}"
        );
        assert!(message.contains("from 5 to 3600"), "{message}");
        let body =
            json!({ "properties": { "vmNics": [{ "nicId": "52:54:00:00:00:01" }, { "nicId": "eth0" }] } });
        let message = refused(&body, UPDATE_ITEM);
        assert!(message.starts_with("properties.vmNics[1].nicId cannot be \"eth0\""), "{message}");
        let message = refused(&json!({ "properties": { "policyId": "p" } }), CONTAINER_MAPPING);
        assert!(message.starts_with("properties.targetProtectionContainerId is missing"), "{message}");
        assert!(refused(&json!([1]), POLICY).contains("not an object"));
    }

    #[test]
    fn long_values_are_not_repeated_whole() {
        let body = json!({ "properties": { "failoverDirection": "ä".repeat(100_000) } });
        assert!(refused(&body, UNPLANNED_FAILOVER).len() < 1000);
    }

    #[test]
    fn the_type_names_the_path_where_no_table_does() {
        #[derive(Debug, serde::Deserialize)]
        struct Inner {
            #[expect(dead_code, reason = "only read into")]
            number: u32,
        }
        #[derive(Debug, serde::Deserialize)]
        struct Outer {
            #[expect(dead_code, reason = "only read into")]
            inner: Vec<Inner>,
        }
        let error = read::<Outer>(br#"{"inner":[{"number":1},{"number":"x"}]}"#, &[]).unwrap_err();
        assert!(error.message().contains("inner[1].number: invalid type: string \"x\", expected u32"));
    }

    #[test]
    fn what_is_absent_null_or_unknown_is_left_alone() {
        for body in [json!({}), json!({ "properties": null }), json!({ "properties": { "colour": [1] } })] {
            read::<Value>(body.to_string().as_bytes(), UNPLANNED_FAILOVER).unwrap();
        }
        read::<Value>(b"", UPDATE_ITEM).unwrap();
        read::<Value>(b"null", COMMENTS).unwrap();
        let empty = json!({ "properties": { "networkId": "", "skipTestFailoverCleanup": "true" } });
        read::<Value>(empty.to_string().as_bytes(), TEST_FAILOVER).unwrap();
    }

    #[test]
    fn words_addresses_and_flags_are_told_from_what_is_not() {
        for (takes, good, bad) in [
            (Takes::Mac, "52:54:00:aa:BB:01", "52-54-00-aa-bb-01"),
            (Takes::Address, "10.0.0.7/24", "10.0.0.7/33"),
            (Takes::Address, "10.0.0.7/32", "fd00::1/64"),
            (Takes::Ip, "10.0.0.7", "10.0.0.7/24"),
            (Takes::Size, "2x1024", "Standard_D2"),
            (Takes::VmName, "web 1", "a/b"),
            (Takes::Size, "1x16", "0x1024"),
            (Takes::Size, "4096", "4x15"),
            (Takes::Guid, "f8491e4f-817a-40dd-a90c-af773978c75b", "f8491e4f"),
            (Takes::Time, "2026-01-31T23:59:59Z", "yesterday"),
            (Takes::Email, "ops@example.org", "ops at example.org"),
            (Takes::Flag, "True", "yes"),
            (Takes::Word(&["Keep"]), "keep", "Hold"),
            (Takes::Id, "/a/b", "///"),
            (Takes::Text(3), "äöü", "a\u{0}"),
        ] {
            assert!(takes.is_fulfilled(&json!(good)), "{takes:?}");
            assert!(!takes.is_fulfilled(&json!(bad)), "{takes:?}");
            assert!(!takes.is_fulfilled(&json!(1)), "{takes:?}");
        }
    }
}
