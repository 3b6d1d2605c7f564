//! The `boots` file: one line `B <boot id> <first number> <crc>` for every start of the ledger, written
//! before its first record. The chain of boots tells which acknowledgements belong to the timeline
//! that this disk is on: a recovery from an older point starts a new branch.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use crate::crc::{open_line, seal_line};
use crate::record::BootId;
use crate::record::boot_text;

/// One start of the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Boot {
    /// Its random identity, as text.
    pub(crate) id: String,
    /// The first number it was going to write.
    pub(crate) first: u64,
}

impl Boot {
    pub(crate) fn new(id: &BootId, first: u64) -> Self {
        Self { id: boot_text(id), first }
    }

    /// The line that stands for it in the file and on the host's channel.
    pub(crate) fn line(&self) -> String {
        seal_line(&format!("B {} {}", self.id, self.first))
    }
}

/// The boots of a disk, oldest first; lines that are not whole are left out.
pub(crate) fn read(path: &Path) -> io::Result<Vec<Boot>> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).lines().filter_map(parse).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse(line: &str) -> Option<Boot> {
    let mut words = open_line(line)?.split(' ');
    let ("B", id, first) = (words.next()?, words.next()?, words.next()?) else { return None };
    Some(Boot { id: id.to_owned(), first: first.parse().ok()? })
}

/// Writes the whole file anew and returns once it is durable.
pub(crate) fn write(path: &Path, boots: &[Boot]) -> io::Result<()> {
    let new_path = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&new_path)?;
    for boot in boots {
        file.write_all(boot.line().as_bytes())?;
    }
    file.sync_all()?;
    fs::rename(&new_path, path)?;
    let directory = path.parent().ok_or_else(|| io::Error::other("the boots file has no directory"))?;
    fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_last_line_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("boots");
        assert_eq!(read(&path).unwrap(), []);
        let boots = [Boot::new(&[1; 16], 1), Boot::new(&[2; 16], 40)];
        write(&path, &boots).unwrap();
        assert_eq!(read(&path).unwrap(), boots);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        assert_eq!(read(&path).unwrap(), boots[..1]);
    }
}
