//! Sealed objects: encrypted and authenticated, readable in parts (`docs/formats/sealed.md`).
//!
//! Each copy of an object is a header and chunks of 64 KiB, each sealed by itself with AES-256-GCM under a key of the copy's
//! own, which follows from the data key, the object's name and a random salt.

use bytes::{Bytes, BytesMut};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"MSSEALD1";
const VERSION: u32 = 1;
pub(crate) const HEADER_BYTES: usize = 64;
pub(crate) const CHUNK_BYTES: usize = 64 << 10;
const TAG_BYTES: usize = 16;
const SALT_BYTES: usize = 16;

/// What a copy is encrypted with.
#[derive(Clone)]
pub(crate) struct DataKey {
    pub(crate) id: Uuid,
    pub(crate) secret: [u8; 32],
}

/// Bytes of a sealed copy of so many.
pub(crate) fn sealed_bytes(plain: u64) -> u64 {
    HEADER_BYTES as u64 + plain + plain.div_ceil(CHUNK_BYTES as u64).max(1) * TAG_BYTES as u64
}

/// The first bytes of a sealed copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    bytes: [u8; HEADER_BYTES],
}

impl Header {
    /// `None` when the bytes are no header of ours: the object is not sealed, or damaged.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; HEADER_BYTES] = bytes.get(..HEADER_BYTES)?.try_into().ok()?;
        let is_ours = bytes[..8] == *MAGIC
            && bytes[8..12] == VERSION.to_le_bytes()
            && bytes[12..16] == (CHUNK_BYTES as u32).to_le_bytes()
            && bytes[56..] == [0; 8];
        is_ours.then_some(Self { bytes })
    }

    /// The data key.
    pub(crate) fn key(&self) -> Uuid {
        let mut id = [0; 16];
        id.copy_from_slice(&self.bytes[16..32]);
        Uuid::from_bytes(id)
    }

    /// Bytes of the copy's content.
    pub(crate) fn plain_bytes(&self) -> u64 {
        let mut length = [0; 8];
        length.copy_from_slice(&self.bytes[48..56]);
        u64::from_le_bytes(length)
    }
}

/// One copy of an object, being sealed or opened.
pub(crate) struct Copy {
    header: Header,
    key: LessSafeKey,
    chunks: u64,
}

struct KeyLength;

impl ring::hkdf::KeyType for KeyLength {
    fn len(&self) -> usize {
        32
    }
}

impl Copy {
    /// A copy of the object `name` whose header was read; `None` when the parameters are impossible.
    pub(crate) fn open(header: Header, data_key: &DataKey, name: &str) -> Option<Self> {
        let salt = Salt::new(HKDF_SHA256, &header.bytes[32..32 + SALT_BYTES]);
        let info: [&[u8]; 2] = [b"mainstay object 1", name.as_bytes()];
        let mut secret = [0; 32];
        salt.extract(&data_key.secret).expand(&info, KeyLength).ok()?.fill(&mut secret).ok()?;
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &secret).ok()?);
        let chunks = header.plain_bytes().div_ceil(CHUNK_BYTES as u64).max(1);
        // The number of a chunk is 32 bits of its nonce.
        u32::try_from(chunks).ok()?;
        Some(Self { header, key, chunks })
    }

    fn nonce(&self, chunk: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&chunk.to_le_bytes());
        // A copy that was cut at the end of a chunk is noticed.
        nonce[11] = u8::from(chunk + 1 == self.chunks);
        Nonce::assume_unique_for_key(nonce)
    }

    fn chunk_bytes(&self, chunk: u64) -> u64 {
        let left = self.header.plain_bytes().saturating_sub(chunk * CHUNK_BYTES as u64);
        left.min(CHUNK_BYTES as u64)
    }

    /// Which chunks a range of the content lies in, and the range of the sealed copy that holds them.
    pub(crate) fn place(&self, from: u64, length: u64) -> Option<(u64, std::ops::Range<u64>)> {
        let end = from.checked_add(length).filter(|end| *end <= self.header.plain_bytes())?;
        let step = (CHUNK_BYTES + TAG_BYTES) as u64;
        let first = from / CHUNK_BYTES as u64;
        let last = end.saturating_sub(1).max(from) / CHUNK_BYTES as u64;
        let last = last.min(self.chunks - 1);
        let start = HEADER_BYTES as u64 + first * step;
        let stop = HEADER_BYTES as u64 + last * step + self.chunk_bytes(last) + TAG_BYTES as u64;
        Some((first, start..stop))
    }

    /// Opens chunks from `first` on, in place of which zeros stand where they are damaged; answers also how many are.
    pub(crate) fn unseal(&self, first: u64, sealed: &[u8]) -> (BytesMut, usize) {
        let (mut plain, mut damaged, mut rest, mut chunk) = (BytesMut::new(), 0, sealed, first);
        plain.reserve(sealed.len());
        while !rest.is_empty() && chunk < self.chunks {
            let length = self.chunk_bytes(chunk) as usize + TAG_BYTES;
            let (this, after) = rest.split_at(length.min(rest.len()));
            let mut buffer = this.to_vec();
            let aad = Aad::from(self.header.bytes);
            match self.key.open_in_place(self.nonce(chunk), aad, &mut buffer) {
                Ok(opened) => plain.extend_from_slice(opened),
                Err(_) => {
                    damaged += 1;
                    plain.resize(plain.len() + length - TAG_BYTES, 0);
                }
            }
            (rest, chunk) = (after, chunk + 1);
        }
        (plain, damaged)
    }
}

/// Seals a copy of the object `name`.
pub(crate) fn seal(data_key: &DataKey, name: &str, salt: [u8; SALT_BYTES], plain: &[Bytes]) -> Option<Bytes> {
    let length: usize = plain.iter().map(Bytes::len).sum();
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
    header[16..32].copy_from_slice(data_key.id.as_bytes());
    header[32..48].copy_from_slice(&salt);
    header[48..56].copy_from_slice(&(length as u64).to_le_bytes());
    let header = Header { bytes: header };
    let copy = Copy::open(header, data_key, name)?;
    let mut out = BytesMut::with_capacity(sealed_bytes(length as u64) as usize);
    out.extend_from_slice(&header.bytes);
    let mut parts = plain.iter().map(|part| &part[..]);
    let mut part: &[u8] = &[];
    for chunk in 0..copy.chunks {
        let start = out.len();
        let mut wanted = copy.chunk_bytes(chunk) as usize;
        while wanted > 0 {
            if part.is_empty() {
                part = parts.next()?;
                continue;
            }
            let (take, rest) = part.split_at(wanted.min(part.len()));
            out.extend_from_slice(take);
            (part, wanted) = (rest, wanted - take.len());
        }
        let nonce = copy.nonce(chunk);
        let aad = Aad::from(header.bytes);
        let tag = copy.key.seal_in_place_separate_tag(nonce, aad, &mut out[start..]).ok()?;
        out.extend_from_slice(tag.as_ref());
    }
    Some(out.freeze())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(id: u128) -> DataKey {
        DataKey { id: Uuid::from_u128(id), secret: [id as u8; 32] }
    }

    fn content(length: usize) -> Bytes {
        (0..length).map(|at| (at * 31 + at / 251) as u8).collect()
    }

    fn open(sealed: &[u8], data_key: &DataKey, name: &str) -> Option<Copy> {
        Copy::open(Header::parse(sealed)?, data_key, name)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_part_is_what_was_sealed(length in 0usize..200_000, from in 0usize..200_000, part in 0usize..90_000, cut in 0usize..200_000) {
            let plain = content(length);
            let parts = [plain.slice(..cut.min(length)), plain.slice(cut.min(length)..)];
            let sealed = seal(&key(1), "name", [5; 16], &parts).unwrap();
            prop_assert_eq!(sealed.len() as u64, sealed_bytes(length as u64));
            let copy = open(&sealed, &key(1), "name").unwrap();
            let from = from.min(length);
            let part = part.min(length - from);
            let (first, range) = copy.place(from as u64, part as u64).unwrap();
            let (opened, damaged) = copy.unseal(first, &sealed[range.start as usize..range.end as usize]);
            prop_assert_eq!(damaged, 0);
            let at = from - first as usize * CHUNK_BYTES;
            prop_assert_eq!(&opened[at..at + part], &plain[from..from + part]);
            prop_assert!(copy.place(from as u64, (length - from) as u64 + 1).is_none());
        }
    }

    #[test]
    fn nothing_but_the_right_key_and_name_opens_it_and_every_flip_is_found() {
        let plain = content(100_000);
        let sealed = seal(&key(1), "name", [5; 16], std::slice::from_ref(&plain)).unwrap();
        let whole = |sealed: &[u8], key: &DataKey, name: &str| {
            let copy = open(sealed, key, name)?;
            let (opened, damaged) = copy.unseal(0, &sealed[HEADER_BYTES..]);
            Some((opened.freeze(), damaged))
        };
        assert_eq!(whole(&sealed, &key(1), "name"), Some((plain, 0)));
        assert_eq!(whole(&sealed, &key(2), "name").unwrap().1, 2);
        assert_eq!(whole(&sealed, &key(1), "another").unwrap().1, 2);
        for at in (0..sealed.len()).step_by(997).chain(0..HEADER_BYTES) {
            let mut bad = sealed.to_vec();
            bad[at] ^= 1;
            assert!(whole(&bad, &key(1), "name").is_none_or(|(_, damaged)| damaged > 0), "{at}");
        }
        // The first chunk alone is not taken for all of it.
        let mut cut = sealed[..HEADER_BYTES + CHUNK_BYTES + TAG_BYTES].to_vec();
        cut[48..56].copy_from_slice(&(CHUNK_BYTES as u64).to_le_bytes());
        assert_eq!(whole(&cut, &key(1), "name").unwrap().1, 1);
    }
}
