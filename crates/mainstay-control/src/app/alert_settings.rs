//! Who is told by mail of what goes wrong.

use serde::{Deserialize, Serialize};

use crate::{
    Control, ControlError,
    db::{Resource, ResourceKind},
};

/// Name of the only alert setting.
pub const ALERT_SETTING: &str = "defaultAlertSetting";

/// The alert setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlertSettingRecord {
    /// Whether the owners, whom the server's configuration names, are told.
    pub tells_owners: bool,
    /// The client's word for that, which it gets back.
    pub owners_word: String,
    /// Who else is told.
    pub addresses: Vec<String>,
    /// The language that the client asked for; mails are in English.
    pub locale: String,
}

impl Default for AlertSettingRecord {
    fn default() -> Self {
        Self {
            tells_owners: false,
            owners_word: "DoNotSend".to_owned(),
            addresses: Vec::new(),
            locale: "en-US".to_owned(),
        }
    }
}

impl Resource for AlertSettingRecord {
    const KIND: ResourceKind = ResourceKind::AlertSetting;

    fn name(&self) -> String {
        ALERT_SETTING.to_owned()
    }
}

impl Control {
    /// The alert setting; before anybody has set it, nobody is told.
    pub async fn alert_setting(&self) -> Result<AlertSettingRecord, ControlError> {
        Ok(self.db.resource(ALERT_SETTING).await?.unwrap_or_default())
    }

    /// Sets who is told.
    pub async fn put_alert_setting(&self, record: &AlertSettingRecord) -> Result<(), ControlError> {
        let mut transaction = self.db.begin().await?;
        transaction.put_resource(record).await?;
        transaction.commit().await?;
        Ok(())
    }
}
