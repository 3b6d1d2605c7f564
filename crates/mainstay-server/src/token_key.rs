//! The key that access tokens are signed with, and their form: JSON Web Tokens with ES256 (RFC 7515, 7517, 7518).

use std::{fs, path::Path};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rcgen::KeyPair;
use ring::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
        UnparsedPublicKey,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::authority::{AuthorityError, file_error, write_secret};

/// Longest access token that is looked at; ours have less than 1 KiB.
const TOKEN_BYTES_MAX: usize = 8 << 10;
/// The only algorithm that is accepted: what a token says of itself chooses nothing.
const ALGORITHM: &str = "ES256";
/// Bytes of a coordinate of the curve P-256.
const COORDINATE_BYTES: usize = 32;

/// What an access token says; names and meanings as in Microsoft's tokens for applications.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// Who made it.
    pub(crate) iss: String,
    /// Whom it is meant for.
    pub(crate) aud: String,
    /// The service principal's object id; ours is its client id.
    pub(crate) sub: String,
    /// The service principal's client id.
    pub(crate) appid: String,
    /// The same as `sub`.
    pub(crate) oid: String,
    /// The tenant.
    pub(crate) tid: String,
    /// The role when it was made; what counts is the record's role when it is used.
    pub(crate) roles: Vec<String>,
    /// When it was made, seconds since the Unix epoch.
    pub(crate) iat: i64,
    /// From when it is valid.
    pub(crate) nbf: i64,
    /// Until when it is valid.
    pub(crate) exp: i64,
    /// `1.0` or `2.0`: the endpoint it was asked from.
    pub(crate) ver: String,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: String,
}

/// The key of this server.
pub(crate) struct TokenKey {
    pair: EcdsaKeyPair,
    random: SystemRandom,
    /// The key's thumbprint.
    id: String,
}

impl TokenKey {
    /// Opens the key in a directory that is there, or makes it.
    pub(crate) fn open(dir: &Path) -> Result<Self, AuthorityError> {
        let path = dir.join("token.key");
        if !path.exists() {
            write_secret(&path, &KeyPair::generate()?.serialize_pem())?;
        }
        let pem = fs::read_to_string(&path).map_err(file_error(&path))?;
        let random = SystemRandom::new();
        let pair = KeyPair::from_pem(&pem).ok().and_then(|pair| {
            let der = pair.serialize_der();
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &der, &random).ok()
        });
        let pair = pair.ok_or(AuthorityError::Pem { path })?;
        let mut key = Self { pair, random, id: String::new() };
        key.id = key.thumbprint();
        Ok(key)
    }

    /// The coordinates of the public key, base64url.
    fn coordinates(&self) -> (String, String) {
        // An uncompressed point: 4, x, y (SEC 1, 2.3.3).
        let point = self.pair.public_key().as_ref().get(1..).unwrap_or_default();
        let (x, y) = point.split_at(COORDINATE_BYTES.min(point.len()));
        (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y))
    }

    /// The key's name (RFC 7638): the members in this order, without spaces.
    fn thumbprint(&self) -> String {
        let (x, y) = self.coordinates();
        let text = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
        URL_SAFE_NO_PAD.encode(ring::digest::digest(&ring::digest::SHA256, text.as_bytes()))
    }

    /// The public key as a JSON Web Key.
    pub(crate) fn public(&self) -> Value {
        let (x, y) = self.coordinates();
        json!({ "kty": "EC", "use": "sig", "alg": ALGORITHM, "kid": self.id, "crv": "P-256", "x": x, "y": y })
    }

    /// Signs a token. `None` if the system has no randomness to give.
    pub(crate) fn sign(&self, claims: &Claims) -> Option<String> {
        let header = json!({ "typ": "JWT", "alg": ALGORITHM, "kid": self.id }).to_string();
        let claims = serde_json::to_vec(claims).ok()?;
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = self.pair.sign(&self.random, signed.as_bytes()).ok()?;
        Some(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    /// What a token says, if this key signed it. Whether it is valid now is for the caller to say.
    pub(crate) fn verify(&self, token: &str) -> Option<Claims> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let header: Header = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
        if header.alg != ALGORITHM || header.kid != self.id {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.pair.public_key())
            .verify(signed.as_bytes(), &signature)
            .ok()?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn claims() -> Claims {
        let text = |text: &str| text.to_owned();
        Claims {
            iss: text("https://localhost/t/v2.0"),
            aud: text("https://management.azure.com"),
            sub: text("p"),
            appid: text("p"),
            oid: text("p"),
            tid: text("t"),
            roles: vec![text("Reader")],
            iat: 1,
            nbf: 1,
            exp: 2,
            ver: text("2.0"),
        }
    }

    #[test]
    fn only_what_this_key_signed_as_it_signed_it_is_believed() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let token = TokenKey::open(dir.path()).unwrap().sign(&claims()).unwrap();
        // A second opening finds the same key.
        let key = TokenKey::open(dir.path()).unwrap();
        assert_eq!(key.verify(&token), Some(claims()));
        assert_eq!(TokenKey::open(other.path()).unwrap().verify(&token), None);
        let mode = fs::metadata(dir.path().join("token.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let parts: Vec<&str> = token.split('.').collect();
        let raised = Claims { roles: vec!["Contributor".to_owned()], ..claims() };
        let raised = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&raised).unwrap());
        assert_eq!(key.verify(&format!("{}.{raised}.{}", parts[0], parts[2])), None);
        // Whoever signs with nothing is not believed because the header says so.
        let unsigned = json!({ "alg": "none", "kid": key.id }).to_string();
        assert_eq!(key.verify(&format!("{}.{}.", URL_SAFE_NO_PAD.encode(unsigned), parts[1])), None);
        for broken in ["", ".", "..", "a.b.c", parts[0], &token[..token.len() - 1]] {
            assert_eq!(key.verify(broken), None, "{broken}");
        }
    }
}
