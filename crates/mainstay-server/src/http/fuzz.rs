//! What fuzzing reads bytes as. Whether they can be read is told to whoever sends them; that it can be told is what is tried.

use mainstay_api::{
    arm::{FabricProperties, ItemProperties, Resource},
    v1::RegisterRequest,
};
use serde_json::Value;

use super::{
    body::{self, Field, read},
    filter, parse_query,
};

const TABLES: &[&[Field]] = &[
    body::FABRIC,
    body::PROVIDER,
    body::POLICY,
    body::CONTAINER_MAPPING,
    body::REMOVE_CONTAINER_MAPPING,
    body::DISCOVER,
    body::ENABLE,
    body::UPDATE_ITEM,
    body::TEST_FAILOVER,
    body::UNPLANNED_FAILOVER,
    body::PLANNED_FAILOVER,
    body::APPLY_RECOVERY_POINT,
    body::REPROTECT,
    body::DISABLE,
    body::EXPORT_JOBS,
    body::ALERT_SETTING,
    body::VAULT_SETTING,
    body::EXTENDED_INFO,
    body::CERTIFICATE,
    body::CHECK_NAME,
    body::CREATE_NETWORK_MAPPING,
    body::UPDATE_NETWORK_MAPPING,
    body::RESOLVE_HEALTH,
    body::PUT_ITEM_AGAIN,
    body::CREATE_RECOVERY_PLAN,
    body::UPDATE_RECOVERY_PLAN,
    body::PLAN_FAILOVER,
    body::VAULT,
    body::NEW_VAULT,
    body::TOKEN,
    body::SERVICE_PRINCIPAL,
    body::REGISTER,
    body::COMMENTS,
];

/// Reads bytes as a body of the operation that the first of them chooses, and as a filter and a query.
pub(crate) fn fuzz(data: &[u8]) {
    if let Some((operation, body)) = data.split_first() {
        let table = TABLES[usize::from(*operation) % TABLES.len()];
        let _ = read::<Value>(body, table);
        let _ = read::<RegisterRequest>(body, table);
        let _ = read::<Resource<ItemProperties>>(body, table);
        let _ = read::<Resource<FabricProperties>>(body, table);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = filter::parse(text);
        let _ = parse_query(text);
    }
}
