//! A body with the JSON that it came as.

use std::ops::Deref;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use serde_json::Value;

/// Something that was received, and is passed on as it came but for the order of its keys: what a newer server says of it, and this
/// program does not know, is among it.
#[derive(Clone, Debug)]
pub struct Received<T> {
    known: T,
    whole: Value,
}

impl<T> Received<T> {
    /// What is known of it.
    pub fn into_known(self) -> T {
        self.known
    }
}

impl<T> Deref for Received<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.known
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Received<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let whole = Value::deserialize(deserializer)?;
        let known = T::deserialize(&whole).map_err(serde::de::Error::custom)?;
        Ok(Self { known, whole })
    }
}

impl<T> Serialize for Received<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.whole.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::arm::Resource;

    #[derive(Deserialize)]
    struct Known {
        health: String,
    }

    #[test]
    fn what_is_not_known_is_passed_on() {
        let came = json!({
            "id": "/f/home", "name": "home", "type": "fabric", "location": null, "etag": "7",
            "properties": { "health": "Normal", "colour": "green" },
        });
        let received: Received<Resource<Known>> = serde_json::from_value(came.clone()).unwrap();
        assert_eq!(received.properties.health, "Normal");
        assert_eq!(serde_json::to_value(&received).unwrap(), came);
    }
}
