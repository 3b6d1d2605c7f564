//! One record of the ledger.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic `MSLEDGR1` |
//! | 8 | 8 | number, little endian; the first record is 1 |
//! | 16 | 16 | id of the boot that wrote it |
//! | 32 | 8 | nanoseconds since 1970 |
//! | 40 | 4052 | pseudo-random bytes, so that the record cannot be compressed or deduplicated away |
//! | 4092 | 4 | CRC-32 of everything before |

use crate::crc::crc32;

/// The size of a record: one page of the guest, one block of the replica.
pub(crate) const RECORD_BYTES: usize = 4096;

const MAGIC: &[u8; 8] = b"MSLEDGR1";
const CRC_AT: usize = RECORD_BYTES - 4;

/// A boot's random identity.
pub(crate) type BootId = [u8; 16];

/// What a slot of the ring holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Never written.
    Empty,
    /// A whole record.
    Record { number: u64, boot: BootId },
    /// Neither.
    Corrupt,
}

/// Makes a record.
pub(crate) fn encode(number: u64, boot: &BootId, time_ns: u64) -> Vec<u8> {
    let mut bytes = vec![0; RECORD_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes[16..32].copy_from_slice(boot);
    bytes[32..40].copy_from_slice(&time_ns.to_le_bytes());
    let mut noise = Noise::new(time_ns ^ number.rotate_left(32));
    for chunk in bytes[40..CRC_AT].chunks_mut(8) {
        let random = noise.next().to_le_bytes();
        chunk.copy_from_slice(&random[..chunk.len()]);
    }
    let crc = crc32(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Reads a slot.
pub(crate) fn decode(bytes: &[u8]) -> Slot {
    if bytes.len() != RECORD_BYTES {
        return Slot::Corrupt;
    }
    if bytes.iter().all(|byte| *byte == 0) {
        return Slot::Empty;
    }
    if bytes[..8] != MAGIC[..] || crc32(&bytes[..CRC_AT]).to_le_bytes() != bytes[CRC_AT..] {
        return Slot::Corrupt;
    }
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[8..16]);
    let mut boot = [0; 16];
    boot.copy_from_slice(&bytes[16..32]);
    Slot::Record { number: u64::from_le_bytes(number), boot }
}

/// A boot id as text.
pub(crate) fn boot_text(boot: &BootId) -> String {
    boot.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Pseudo-random numbers (xorshift64*), good enough to look like data.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_every_flipped_byte_is_noticed() {
        let bytes = encode(7, &[3; 16], 12345);
        assert_eq!(decode(&bytes), Slot::Record { number: 7, boot: [3; 16] });
        for at in (0..RECORD_BYTES).step_by(97) {
            let mut torn = bytes.clone();
            torn[at] ^= 0x10;
            assert_eq!(decode(&torn), Slot::Corrupt, "byte {at}");
        }
        assert_eq!(decode(&[0; RECORD_BYTES]), Slot::Empty);
        assert_eq!(decode(&[]), Slot::Corrupt);
    }
}
