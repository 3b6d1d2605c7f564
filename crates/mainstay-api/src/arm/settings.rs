//! Settings of the vault: alerts, and what clients keep there.

use serde::{Deserialize, Serialize};

/// Who is told by mail of what goes wrong: request and answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AlertProperties {
    /// `Send` or `DoNotSend`, also `true` or `false`.
    pub send_to_owners: Option<String>,
    /// Who else is told.
    pub custom_email_addresses: Option<Vec<String>>,
    /// A language, `en-US`.
    pub locale: Option<String>,
}

/// The vault's settings: request and answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VaultSettingProperties {
    /// Kept for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_solution_id: Option<String>,
    /// Kept for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmware_to_azure_provider_type: Option<String>,
}

/// The vault's extended information: request and answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtendedInfoProperties {
    /// Kept for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub integrity_key: Option<String>,
    /// Kept for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encryption_key: Option<String>,
    /// Kept for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encryption_key_thumbprint: Option<String>,
    /// Kept for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<String>,
}

/// A certificate for vault credentials.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CertificateInput {
    /// `AAD` or `AzureActiveDirectory`.
    pub auth_type: Option<String>,
    /// X.509, DER, in Base64.
    pub certificate: String,
}

/// A question about a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NameQuestion {
    /// `Microsoft.RecoveryServices/Vaults`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The name.
    pub name: String,
}
