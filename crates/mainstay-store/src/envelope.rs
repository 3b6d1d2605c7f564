//! The form of small objects: a header, then a compressed document.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4 | version |
//! | 12 | 4 | bytes of the document |
//! | 16 | 16 | first 16 bytes of BLAKE3 over bytes 0..16, the context, and the rest |
//! | 32 | … | the document, zstd |
//!
//! The context is what the reader knows beforehand, so that one object's bytes are not taken for another's.

pub(crate) const HEADER_BYTES: usize = 32;
const ZSTD_LEVEL: i32 = 3;

/// A kind of object.
pub(crate) struct Envelope {
    pub(crate) magic: &'static [u8; 8],
    pub(crate) version: u32,
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
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&(document.len() as u32).to_le_bytes());
        out.extend_from_slice(&checksum(&out, context, &packed));
        out.extend_from_slice(&packed);
        Ok(out)
    }

    pub(crate) fn open(&self, context: &[u8], bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
        if bytes.len() < HEADER_BYTES
            || &bytes[..8] != self.magic
            || bytes[8..12] != self.version.to_le_bytes()
        {
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

pub(crate) fn checksum(header: &[u8], context: &[u8], packed: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(context).update(packed);
    let mut sum = [0; 16];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    sum
}
