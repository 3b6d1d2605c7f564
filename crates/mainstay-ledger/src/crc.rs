//! CRC-32 (IEEE 802.3), which tells a torn or foreign record from a whole one.

/// The checksum of `bytes`.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc = TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8);
    }
    !crc
}

/// Appends the checksum of a line of text to it: the last word of every line the ledger writes.
pub(crate) fn seal_line(line: &str) -> String {
    format!("{line} {:08x}\n", crc32(line.as_bytes()))
}

/// The text of a sealed line (without its line feed), if the checksum is right.
pub(crate) fn open_line(line: &str) -> Option<&str> {
    let (text, crc) = line.rsplit_once(' ')?;
    (crc.len() == 8 && u32::from_str_radix(crc, 16).ok()? == crc32(text.as_bytes())).then_some(text)
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_check_value_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_changed_line_does_not_open() {
        let line = seal_line("A 00ff 17");
        assert_eq!(open_line(line.trim_end()), Some("A 00ff 17"));
        assert_eq!(open_line(line.trim_end().replace("17", "18").as_str()), None);
        assert_eq!(open_line("A 00ff"), None);
    }
}
