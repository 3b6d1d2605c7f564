//! What the disks of the measurements hold. The same seed gives the same bytes.

/// Bytes of one kind in a row: what a file system allocates together.
const PIECE_BYTES: usize = 64 << 10;

/// Pseudo-random numbers (SplitMix64): fast, and good enough to look like data.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Fills with bytes that cannot be compressed: media, archives, ciphertext.
    pub(crate) fn noise(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let random = self.next().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }

    /// Fills with lines of words and numbers, which a fast compressor makes about a third of: logs, tables, text.
    pub(crate) fn text(&mut self, bytes: &mut [u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let random = self.next();
            // The smaller of two: some words are frequent, most are rare.
            let rank = (random & 0x3ff).min((random >> 10) & 0x3ff);
            let number = random >> 40;
            let end = if random & 0xf00_0000 == 0 { '\n' } else { ' ' };
            let word = if random & 0x7000_0000 == 0 {
                format!("{number}{end}")
            } else {
                // A word of its own for every rank.
                let mut letters = Self::new(rank);
                let length = 2 + (letters.next() % 9) as usize;
                let mut word: String =
                    (0..length).map(|_| char::from(b'a' + (letters.next() % 26) as u8)).collect();
                word.push(end);
                word
            };
            let length = word.len().min(bytes.len() - at);
            bytes[at..at + length].copy_from_slice(&word.as_bytes()[..length]);
            at += length;
        }
    }

    /// Half noise, half text, in pieces of 64 KiB.
    pub(crate) fn mixed(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(PIECE_BYTES) {
            if self.next() & 1 == 0 { self.noise(piece) } else { self.text(piece) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_as_compressible_as_it_says() {
        let share = |fill: fn(&mut Random, &mut [u8])| {
            let mut bytes = vec![0; 1 << 20];
            fill(&mut Random::new(7), &mut bytes);
            zstd::bulk::compress(&bytes, 1).unwrap().len() as f64 / bytes.len() as f64
        };
        assert!(share(Random::noise) > 0.99);
        assert!((0.2..0.5).contains(&share(Random::text)), "{}", share(Random::text));
        assert!((0.5..0.8).contains(&share(Random::mixed)), "{}", share(Random::mixed));
    }
}
