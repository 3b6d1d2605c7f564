//! Files that are whole after a crash.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

/// Extension of a file that is being written.
pub const UNFINISHED: &str = "new";

/// Writes a file whole or not at all; which of the two a loss of power leaves is open until [`sync_parent`].
///
/// # Errors
/// Those of writing; the file is then what it was.
pub fn write_aside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    put(path, bytes, &mut File::options())
}

/// The same for a secret: only its owner may read the file (on Windows who may read the directory), and it lasts from now on.
///
/// # Errors
/// Those of writing and of [`sync_parent`].
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    put(path, bytes, &mut options)?;
    sync_parent(path)
}

fn put(path: &Path, bytes: &[u8], options: &mut OpenOptions) -> io::Result<()> {
    let unfinished = path.with_extension(UNFINISHED);
    let mut file = options.write(true).create(true).truncate(true).open(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&unfinished, path)
}

/// Makes a directory, with those above it, and each of their names durable. Nothing is done if it is there.
///
/// # Errors
/// Those of making and syncing directories.
pub fn create_directory(path: &Path) -> io::Result<()> {
    create_with(path, &DirBuilder::new())
}

/// The same for secrets: only their owner may look into the directories that are made.
///
/// # Errors
/// Those of [`create_directory`].
pub fn create_private_directory(path: &Path) -> io::Result<()> {
    #[cfg_attr(not(unix), expect(unused_mut, reason = "there is no mode to set"))]
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    create_with(path, &builder)
}

fn create_with(path: &Path, builder: &DirBuilder) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        create_with(parent, builder)?;
    }
    match builder.create(path) {
        // Somebody else may have made it in the same moment.
        Err(error) if !path.is_dir() => return Err(error),
        _ => {}
    }
    sync_parent(path)
}

/// Makes the directory entry of `path`, or that there is none any more, durable. Windows flushes it with the file.
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
