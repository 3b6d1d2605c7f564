//! Writing files past the host's page cache.
//!
//! A transfer of gigabytes would push everything else on the host out of memory, and a page that the cache takes anew costs
//! several copies where memory is lent to the host page by page.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use bytes::Bytes;
use mainstay_block::durable::sync_parent;
use nix::fcntl::OFlag;

/// What devices want buffers, places and lengths to be multiples of.
pub(crate) const ALIGNMENT: usize = 4096;
/// Bytes per write: many requests of a device at once, and few enough that the copy into the buffer stays in the processor's
/// cache.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes `parts`, one after the other, as a file that is whole and durable when this returns, or as none. `staging` is
/// beside it and must not exist. Answers whether it could be done at all: not every file system writes so.
///
/// # Errors
/// Those of writing; nothing is left then.
pub(crate) fn write(path: &Path, staging: &Path, parts: &[Bytes]) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).custom_flags(OFlag::O_DIRECT.bits());
    let file = match options.open(staging) {
        Ok(file) => file,
        // The directory is not there yet.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        // The file system knows only its cache; Linux says so when it has made the file already.
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            remove(staging)?;
            return Ok(false);
        }
        Err(error) => return Err(error),
    };
    let written = fill(&file, parts)
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(staging, path))
        .and_then(|()| sync_parent(path));
    match written {
        Ok(()) => Ok(true),
        Err(error) => {
            // Removed at the next start otherwise; why writing failed is what matters.
            let _ = remove(staging);
            // Some file systems take the flag and refuse the write.
            if error.kind() == ErrorKind::InvalidInput { Ok(false) } else { Err(error) }
        }
    }
}

fn remove(staging: &Path) -> io::Result<()> {
    match std::fs::remove_file(staging) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn fill(file: &File, parts: &[Bytes]) -> io::Result<()> {
    let mut space = vec![0; BUFFER_BYTES + ALIGNMENT];
    let start = space.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut space[start..start + BUFFER_BYTES];
    let (mut at, mut filled) = (0, 0);
    for part in parts {
        let mut part = &part[..];
        if filled == 0 && part.as_ptr().align_offset(ALIGNMENT) == 0 {
            let (aligned, later) = part.split_at(part.len() - part.len() % ALIGNMENT);
            for now in aligned.chunks(BUFFER_BYTES) {
                file.write_all_at(now, at)?;
                at += now.len() as u64;
            }
            part = later;
        }
        while !part.is_empty() {
            let (now, later) = part.split_at(part.len().min(BUFFER_BYTES - filled));
            buffer[filled..filled + now.len()].copy_from_slice(now);
            filled += now.len();
            part = later;
            if filled == BUFFER_BYTES {
                file.write_all_at(buffer, at)?;
                at += BUFFER_BYTES as u64;
                filled = 0;
            }
        }
    }
    let rest = filled.next_multiple_of(ALIGNMENT);
    buffer[filled..rest].fill(0);
    file.write_all_at(&buffer[..rest], at)?;
    file.set_len(at + filled as u64)
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn what_was_given_in_parts_is_in_the_file(
            lengths in prop::collection::vec((0..2_500_000_usize, any::<bool>()), 0..5),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (path, staging) = (dir.path().join("object"), dir.path().join("object#1"));
            let part = |(length, is_aligned): &(usize, bool)| {
                let mut bytes = BytesMut::with_capacity(length + ALIGNMENT);
                if *is_aligned {
                    bytes = bytes.split_off(bytes.as_ptr().align_offset(ALIGNMENT));
                }
                bytes.extend((0..*length).map(|at| (at * 31 % 251) as u8));
                bytes.freeze()
            };
            let parts: Vec<Bytes> = lengths.iter().map(part).collect();
            let mut probe = OpenOptions::new();
            probe.write(true).create(true).truncate(true).custom_flags(OFlag::O_DIRECT.bits());
            let is_possible = probe.open(dir.path().join("probe")).is_ok();
            prop_assert_eq!(write(&path, &staging, &parts).unwrap(), is_possible);
            if is_possible {
                prop_assert_eq!(std::fs::read(&path).unwrap(), parts.concat());
            }
            prop_assert!(!staging.exists());
            prop_assert!(!write(&dir.path().join("none/object"), &dir.path().join("none/object#1"), &parts).unwrap());
        }
    }
}
