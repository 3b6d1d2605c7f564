//! The form of small objects: a header, then a compressed document; the object has it twice, one copy after the other.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4 | version |
//! | 12 | 4 | bytes of the document |
//! | 16 | 16 | first 16 bytes of BLAKE3 over bytes 0..16, the context, and the rest |
//! | 32 | … | the document, zstd |
//!
//! The context is what the reader knows beforehand, so that one object's bytes are not taken for another's. Objects of
//! version 1 have one copy.

use crate::storage::Copies;

pub(crate) const VERSION: u32 = 2;
pub(crate) const HEADER_BYTES: usize = 32;
const ZSTD_LEVEL: i32 = 3;

/// A kind of object.
pub(crate) struct Envelope {
    pub(crate) magic: &'static [u8; 8],
    /// Longest document, in bytes.
    pub(crate) bytes_max: usize,
}

impl Envelope {
    pub(crate) fn seal(&self, context: &[u8], document: &[u8]) -> Result<Vec<u8>, &'static str> {
        if document.len() > self.bytes_max {
            return Err("the document is too large");
        }
        let packed = zstd::bulk::compress(document, ZSTD_LEVEL).map_err(|_| "compression failed")?;
        let mut out = Vec::with_capacity(HEADER_BYTES + packed.len());
        out.extend_from_slice(self.magic);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(document.len() as u32).to_le_bytes());
        out.extend_from_slice(&checksum(&out, context, &packed));
        out.extend_from_slice(&packed);
        Ok(out)
    }

    /// The document, from a copy that is sound.
    pub(crate) fn read(&self, context: &[u8], object: &Copies) -> Result<Opened, &'static str> {
        let [first, second] = &object.copies;
        match (self.open_copy(VERSION, context, first), self.open_copy(VERSION, context, second)) {
            (Ok(document), Ok(_)) => Ok(Opened { document, is_damaged: false }),
            (Ok(document), Err(_)) | (Err(_), Ok(document)) => Ok(Opened { document, is_damaged: true }),
            (Err(what), Err(_)) => match self.open_copy(1, context, &object.raw) {
                Ok(document) => Ok(Opened { document, is_damaged: false }),
                Err(_) => Err(what),
            },
        }
    }

    fn open_copy(&self, version: u32, context: &[u8], bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
        if bytes.len() < HEADER_BYTES || &bytes[..8] != self.magic || bytes[8..12] != version.to_le_bytes() {
            return Err("magic or version");
        }
        let (header, packed) = bytes.split_at(HEADER_BYTES);
        if header[16..] != checksum(&header[..16], context, packed) {
            return Err("checksum");
        }
        let length = u32::from_le_bytes([header[12], header[13], header[14], header[15]]) as usize;
        if length > self.bytes_max {
            return Err("too large");
        }
        zstd::bulk::decompress(packed, length).map_err(|_| "compression")
    }
}

/// What was found in an object.
pub(crate) struct Opened {
    pub(crate) document: Vec<u8>,
    /// Of two copies one cannot be read.
    pub(crate) is_damaged: bool,
}

pub(crate) fn checksum(header: &[u8], context: &[u8], packed: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(context).update(packed);
    let mut sum = [0; 16];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    sum
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    const ENVELOPE: Envelope = Envelope { magic: b"MSTEST01", bytes_max: 1 << 20 };

    fn sealed() -> Vec<u8> {
        ENVELOPE.seal(b"name", b"what it says").unwrap()
    }

    fn object(raw: Vec<u8>) -> Copies {
        let raw = Bytes::from(raw);
        Copies::new([raw.slice(..raw.len() / 2), raw.slice(raw.len() / 2..)])
    }

    #[test]
    fn one_flipped_byte_anywhere_costs_nothing_and_is_seen() {
        let bytes = [sealed(), sealed()].concat();
        assert!(!ENVELOPE.read(b"name", &object(bytes.clone())).unwrap().is_damaged);
        assert!(ENVELOPE.read(b"another", &object(bytes.clone())).is_err());
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            let opened = ENVELOPE.read(b"name", &object(bad.clone())).unwrap();
            assert_eq!((opened.document.as_slice(), opened.is_damaged), (&b"what it says"[..], true), "{at}");
            // The same place in both copies is more than two copies can bear.
            bad[(at + bytes.len() / 2) % bytes.len()] ^= 0x10;
            assert!(ENVELOPE.read(b"name", &object(bad)).is_err(), "{at}");
        }
    }

    #[test]
    fn objects_of_version_1_are_read() {
        let mut old = sealed();
        old[8] = 1;
        let sum = checksum(&old[..16], b"name", &old[HEADER_BYTES..]);
        old[16..HEADER_BYTES].copy_from_slice(&sum);
        assert_eq!(ENVELOPE.read(b"name", &object(old)).unwrap().document, b"what it says");
    }
}
