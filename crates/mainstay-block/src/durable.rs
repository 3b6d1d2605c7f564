//! Files that are whole after a crash.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

/// Extension of a file that is being written.
pub const UNFINISHED: &str = "new";

/// Writes a file whole or not at all; which of the two a loss of power leaves is open until [`sync_parent`].
///
/// # Errors
/// Those of writing; the file is then what it was.
pub fn write_aside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension(UNFINISHED);
    let mut file = File::create(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&unfinished, path)
}

/// Makes the directory entry of `path` durable. Windows flushes it with the file.
///
/// # Errors
/// Those of opening and syncing the directory.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if cfg!(unix) && parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(parent) if cfg!(unix) => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}
