//! `replicationAlertSettings`: who is told by mail of what goes wrong.

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{AlertProperties, NAMESPACE, Resource};
use mainstay_control::{
    ControlError,
    app::{ALERT_SETTING, AlertSettingRecord},
};

use super::{Call, body, error::ApiError, json, list};

pub(super) async fn dispatch(call: &Call, rest: &[&str]) -> Result<Response, ApiError> {
    if let [name, ..] = rest
        && !name.eq_ignore_ascii_case(ALERT_SETTING)
    {
        return Err(ControlError::not_found("alert setting", *name).into());
    }
    match (&call.method, rest) {
        (&Method::GET, []) => list(vec![shown(call, call.control().alert_setting().await?)]),
        (&Method::GET, [_]) => json(&shown(call, call.control().alert_setting().await?)),
        (&Method::PUT, [_]) => {
            let input: AlertProperties = call.properties(body::ALERT_SETTING)?;
            let present = AlertSettingRecord::default();
            let word = input.send_to_owners.filter(|word| !word.is_empty()).unwrap_or(present.owners_word);
            let locale = input.locale.filter(|locale| !locale.is_empty()).unwrap_or(present.locale);
            let mut addresses = input.custom_email_addresses.unwrap_or_default();
            addresses.retain(|address| !address.is_empty());
            let record = AlertSettingRecord {
                tells_owners: ["send", "true"].iter().any(|yes| word.eq_ignore_ascii_case(yes)),
                owners_word: word,
                addresses,
                locale,
            };
            call.control().put_alert_setting(&record).await?;
            json(&shown(call, record))
        }
        _ => Err(ApiError::no_such_path()),
    }
}

fn shown(call: &Call, record: AlertSettingRecord) -> Resource<AlertProperties> {
    Resource {
        id: format!("{}/replicationAlertSettings/{ALERT_SETTING}", call.vault.id()),
        name: ALERT_SETTING.to_owned(),
        kind: format!("{NAMESPACE}/vaults/replicationAlertSettings"),
        location: None,
        properties: AlertProperties {
            send_to_owners: Some(record.owners_word),
            custom_email_addresses: Some(record.addresses),
            locale: Some(record.locale),
        },
    }
}
