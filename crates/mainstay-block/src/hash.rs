//! Keyed 64-bit hashes of blocks.

use highway::{HighwayHash, HighwayHasher, Key};

use crate::{BLOCK_LENGTH, is_zero};

/// The secret of one disk's hashes, 32 bytes.
///
/// Keyed, because with a known hash function a guest can craft two blocks with the same hash, and the
/// second would silently never be replicated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(pub [u8; 32]);

impl std::fmt::Debug for HashKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("HashKey(…)")
    }
}

/// What is known of a block's content: a hash, or one of two reserved values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u64);

impl BlockHash {
    /// The block holds only zeros. A sparse table file is full of these.
    pub const ZERO: Self = Self(0);
    /// Nothing is known; equal to no content.
    pub const UNKNOWN: Self = Self(1);

    /// Whether it stands for a definite content.
    pub fn is_known(self) -> bool {
        self != Self::UNKNOWN
    }
}

/// Hashes blocks with one key (HighwayHash-64: 11 GB/s per core, and a keyed pseudo-random function).
#[derive(Clone, Copy, Debug)]
pub struct BlockHasher {
    key: [u64; 4],
}

impl BlockHasher {
    /// A hasher with this key, read as four little-endian words.
    pub fn new(key: HashKey) -> Self {
        let mut words = [0u64; 4];
        for (word, bytes) in words.iter_mut().zip(key.0.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
        }
        Self { key: words }
    }

    /// The hash of one block. A block shorter than 4 KiB (the end of a disk) hashes as if padded with
    /// zeros. Zeros hash to [`BlockHash::ZERO`]; other contents never to a reserved value.
    pub fn hash(&self, block: &[u8]) -> BlockHash {
        if is_zero(block) {
            return BlockHash::ZERO;
        }
        let mut hasher = HighwayHasher::new(Key(self.key));
        hasher.append(block);
        if block.len() < BLOCK_LENGTH {
            hasher.append(&[0u8; BLOCK_LENGTH][block.len()..]);
        }
        let hash = hasher.finalize64();
        BlockHash(if hash < 2 { hash + 2 } else { hash })
    }

    /// The hashes of contiguous blocks; a partial last block counts as padded with zeros.
    pub fn hash_all(&self, data: &[u8]) -> Vec<BlockHash> {
        data.chunks(BLOCK_LENGTH).map(|block| self.hash(block)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_key_and_zeros() {
        let hasher = BlockHasher::new(HashKey([7; 32]));
        let mut block = vec![0u8; BLOCK_LENGTH];
        assert_eq!(hasher.hash(&block), BlockHash::ZERO);
        block[..3].copy_from_slice(b"abc");
        assert_eq!(hasher.hash(&block), hasher.hash(b"abc"));
        assert_ne!(hasher.hash(&block), BlockHasher::new(HashKey([8; 32])).hash(&block));
        block[4095] = 1;
        assert!(!is_zero(&block));
    }
}
