//! Access tokens: secrets are shown once and stored as digests.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    Control, ControlError,
    db::{Resource, ResourceKind},
};

/// What a token's holder may do; Site Recovery's built-in roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Site Recovery Reader: look.
    Reader,
    /// Site Recovery Operator: also fail over and fail back.
    Operator,
    /// Site Recovery Contributor: everything.
    Contributor,
}

/// A token as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// SHA-256 of the secret, hexadecimal.
    pub digest: String,
    /// For people: whose it is.
    pub label: String,
    /// What it allows.
    pub role: Role,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// When it stops to work; `None` = never.
    pub expires_ms: Option<i64>,
}

impl Resource for TokenRecord {
    const KIND: ResourceKind = ResourceKind::Token;

    fn name(&self) -> String {
        self.digest.clone()
    }
}

/// A secret that is shown once. Its `Debug` form hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSecret(pub String);

impl std::fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenSecret(…)")
    }
}

/// Bytes of randomness in a secret: 256 bits cannot be guessed, whatever the digest's speed.
const SECRET_BYTES: usize = 32;

/// Never begins with `-`: command lines, also those of others (`az login --password`), would take it for an option.
pub(super) fn new_secret() -> String {
    loop {
        let bytes: [u8; SECRET_BYTES] = rand::rng().random();
        let secret = URL_SAFE_NO_PAD.encode(bytes);
        if !secret.starts_with('-') {
            return secret;
        }
    }
}

pub(super) fn digest(secret: &str) -> String {
    Sha256::digest(secret.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether something that may expire still works.
pub(super) fn is_before(now_ms: i64, expires_ms: Option<i64>) -> bool {
    expires_ms.is_none_or(|expires_ms| now_ms < expires_ms)
}

impl Control {
    /// Makes a token.
    pub async fn create_token(
        &self,
        label: &str,
        role: Role,
        expires_ms: Option<i64>,
    ) -> Result<(TokenRecord, TokenSecret), ControlError> {
        let secret = new_secret();
        let record = TokenRecord {
            digest: digest(&secret),
            label: label.to_owned(),
            role,
            created_ms: self.clock.now_ms(),
            expires_ms,
        };
        let mut transaction = self.db.begin().await?;
        transaction.put_resource(&record).await?;
        transaction.commit().await?;
        Ok((record, TokenSecret(secret)))
    }

    /// The token that a secret belongs to, if it is valid now. Looked up by digest: timing tells nothing about secrets.
    pub async fn authenticate(&self, secret: &str) -> Result<Option<TokenRecord>, ControlError> {
        let token: Option<TokenRecord> = self.db.resource(&digest(secret)).await?;
        let now_ms = self.clock.now_ms();
        Ok(token.filter(|token| is_before(now_ms, token.expires_ms)))
    }

    /// All tokens, without their secrets.
    pub async fn tokens(&self) -> Result<Vec<TokenRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// Removes a token by the beginning of its digest.
    pub async fn revoke_token(&self, digest: &str) -> Result<(), ControlError> {
        let mut transaction = self.db.begin().await?;
        if !transaction.remove_resource::<TokenRecord>(digest).await? {
            return Err(ControlError::not_found("token", digest));
        }
        Ok(transaction.commit().await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of 64 would be an option, were they taken as they fall.
    #[test]
    fn no_secret_looks_like_an_option() {
        for _ in 0..2_000 {
            let secret = new_secret();
            assert!(!secret.starts_with('-'), "{secret}");
        }
    }
}
