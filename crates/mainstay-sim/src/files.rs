//! What a power cut leaves of a process's files: what it had synced, and of everything later as much as is drawn.
//!
//! libc's `fsync` and `fdatasync` are defined here in its place. For files in a directory that is watched they note what is durable
//! from then on: of a file its content, of a directory its entries. [`after_power_cut`] puts together from it, and from what is there
//! now, one of the trees that may be found afterwards. A directory's entry is durable only once the directory was synced, as POSIX has
//! it, and a file's blocks reach the disk in any order.

#![expect(
    unsafe_code,
    reason = "these functions have the signatures of libc's, and ask the system in its place"
)]

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs, io,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// What a disk writes as one.
const PAGE_BYTES: usize = 4096;

/// What is durable below a directory, by inode. None is used twice: in memory their numbers only go up.
#[derive(Default)]
struct Durable {
    files: HashMap<u64, Vec<u8>>,
    directories: HashMap<u64, BTreeMap<OsString, u64>>,
}

static WATCHED: Mutex<BTreeMap<PathBuf, Durable>> = Mutex::new(BTreeMap::new());
/// How many are watched, so that all other threads of all other tests need not ask.
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn watched() -> MutexGuard<'static, BTreeMap<PathBuf, Durable>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory below which it is known what is durable, until this is dropped.
pub(crate) struct Watch(PathBuf);

impl Watch {
    /// Nothing in it is durable yet.
    pub(crate) fn begin(directory: &Path) -> Self {
        watched().insert(directory.to_owned(), Durable::default());
        COUNT.fetch_add(1, Ordering::SeqCst);
        Self(directory.to_owned())
    }

    /// Everything below a directory is durable from now on.
    pub(crate) fn note_all(&self, directory: &Path) -> io::Result<()> {
        let mut watched = watched();
        let durable = watched.entry(self.0.clone()).or_default();
        durable.note_all(directory)
    }

    /// One of the trees that are found below a directory after a loss of power at this moment; `draw` answers a number below its
    /// argument.
    pub(crate) fn after_power_cut(
        &self,
        directory: &Path,
        draw: &mut dyn FnMut(u64) -> u64,
    ) -> io::Result<Tree> {
        let mut watched = watched();
        let durable = watched.entry(self.0.clone()).or_default();
        let mut loss = Loss { durable, draw, is_new: HashMap::new() };
        let inode = fs::metadata(directory)?.ino();
        loss.tree(inode, Some(directory))
    }

    /// Replaces what is below a directory by such a tree, which is durable then.
    pub(crate) fn replace(&self, directory: &Path, tree: &Tree) -> io::Result<()> {
        if directory.exists() {
            fs::remove_dir_all(directory)?;
        }
        tree.write(directory)?;
        self.note_all(directory)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        COUNT.fetch_sub(1, Ordering::SeqCst);
        watched().remove(&self.0);
    }
}

fn entries(directory: &Path) -> io::Result<BTreeMap<OsString, u64>> {
    let entry = |entry: io::Result<fs::DirEntry>| entry.map(|entry| (entry.file_name(), entry.ino()));
    fs::read_dir(directory)?.map(entry).collect()
}

impl Durable {
    fn note(&mut self, path: &Path) -> io::Result<()> {
        let metadata = fs::metadata(path)?;
        if metadata.is_dir() {
            self.directories.insert(metadata.ino(), entries(path)?);
        } else if metadata.is_file() {
            self.files.insert(metadata.ino(), fs::read(path)?);
        }
        Ok(())
    }

    fn note_all(&mut self, path: &Path) -> io::Result<()> {
        self.note(path)?;
        if path.is_dir() {
            for name in entries(path)?.into_keys() {
                self.note_all(&path.join(name))?;
            }
        }
        Ok(())
    }
}

/// Files and directories.
pub(crate) enum Tree {
    File(Vec<u8>),
    Directory(BTreeMap<OsString, Tree>),
}

impl Tree {
    fn write(&self, path: &Path) -> io::Result<()> {
        match self {
            Self::File(content) => fs::write(path, content),
            Self::Directory(entries) => {
                fs::create_dir(path)?;
                entries.iter().try_for_each(|(name, tree)| tree.write(&path.join(name)))
            }
        }
    }
}

/// What is drawn of one power cut.
struct Loss<'a> {
    durable: &'a Durable,
    draw: &'a mut dyn FnMut(u64) -> u64,
    /// By inode, whether what was done to its name since the last sync has become durable: a renaming takes place as a whole.
    is_new: HashMap<u64, bool>,
}

impl Loss<'_> {
    /// What is found in the place of an inode, which may have a path still.
    fn tree(&mut self, inode: u64, path: Option<&Path>) -> io::Result<Tree> {
        let metadata = path.map(fs::metadata).transpose()?;
        if metadata.as_ref().is_some_and(fs::Metadata::is_file) {
            let now = path.map(fs::read).transpose()?.unwrap_or_default();
            return Ok(Tree::File(self.content(inode, now)));
        }
        let before = self.durable.directories.get(&inode).cloned();
        if metadata.is_none() && before.is_none() {
            return Ok(Tree::File(self.durable.files.get(&inode).cloned().unwrap_or_default()));
        }
        let (before, now) = (before.unwrap_or_default(), path.map(entries).transpose()?.unwrap_or_default());
        let mut found = BTreeMap::new();
        let names: std::collections::BTreeSet<_> = before.keys().chain(now.keys()).cloned().collect();
        for name in names {
            let (old, new) = (before.get(&name).copied(), now.get(&name).copied());
            let Some(key) = new.or(old) else { continue };
            let chosen = if old == new || self.is_new(key) { new } else { old };
            let Some(chosen) = chosen else { continue };
            // Where it is now: here, or where it was renamed to.
            let present = now.iter().find(|(_, inode)| **inode == chosen).map(|(name, _)| name);
            let present = path.zip(present).map(|(path, name)| path.join(name));
            found.insert(name, self.tree(chosen, present.as_deref())?);
        }
        Ok(Tree::Directory(found))
    }

    fn is_new(&mut self, inode: u64) -> bool {
        let draw = &mut self.draw;
        *self.is_new.entry(inode).or_insert_with(|| draw(2) == 0)
    }

    /// Of a file that was written since it was synced: as it was then, as it is now, or a part of its pages.
    fn content(&mut self, inode: u64, now: Vec<u8>) -> Vec<u8> {
        let before = self.durable.files.get(&inode).cloned().unwrap_or_default();
        if before == now {
            return now;
        }
        match (self.draw)(4) {
            0 => before,
            1 => now,
            way => {
                let length = if way == 2 { now.len() } else { before.len() };
                let mut mixed = vec![0; length];
                for (index, page) in mixed.chunks_mut(PAGE_BYTES).enumerate() {
                    let from = if (self.draw)(2) == 0 { &before } else { &now };
                    let start = (index * PAGE_BYTES).min(from.len());
                    let length = page.len().min(from.len() - start);
                    page[..length].copy_from_slice(&from[start..start + length]);
                }
                mixed
            }
        }
    }
}

fn note(descriptor: i32) {
    if COUNT.load(Ordering::SeqCst) == 0 {
        return;
    }
    let Ok(path) = fs::read_link(format!("/proc/self/fd/{descriptor}")) else { return };
    let mut watched = watched();
    let Some((_, durable)) = watched.iter_mut().find(|(directory, _)| path.starts_with(directory)) else {
        return;
    };
    // A file that has lost its name is not found any more after a loss of power.
    if let Err(error) = durable.note(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::error!(%error, path = %path.display(), "what was synced could not be read");
    }
}

/// As libc's; notes what is durable from now on.
///
/// # Safety
///
/// As for libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fsync(descriptor: i32) -> i32 {
    note(descriptor);
    // SAFETY: any number may be given for a descriptor.
    unsafe { libc::syscall(libc::SYS_fsync, descriptor) as i32 }
}

/// As libc's; notes what is durable from now on.
///
/// # Safety
///
/// As for libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fdatasync(descriptor: i32) -> i32 {
    note(descriptor);
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_fdatasync, descriptor) as i32 }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    /// What is found of `file` in a directory after power cuts of many draws.
    fn found(directory: &Path, watch: &Watch, file: &str) -> std::collections::BTreeSet<Option<Vec<u8>>> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut all = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let tree = watch.after_power_cut(directory, &mut |below| rng.random_range(0..below)).unwrap();
            let Tree::Directory(mut entries) = tree else { panic!("a directory") };
            all.insert(entries.remove(&OsString::from(file)).map(|tree| match tree {
                Tree::File(content) => content,
                Tree::Directory(_) => panic!("a file"),
            }));
        }
        all
    }

    #[test]
    fn what_was_synced_is_found_and_what_was_not_may_be() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let (directory, path) = (directory.path(), directory.path().join("file"));
        let watch = Watch::begin(directory);
        watch.note_all(directory).unwrap();
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(b"one").unwrap();
        file.sync_all().unwrap();
        let whole = |text: &str| Some(text.as_bytes().to_vec());
        assert_eq!(found(directory, &watch, "file"), [None, whole("one")].into(), "its name is not durable");
        fs::File::open(directory).unwrap().sync_all().unwrap();
        assert_eq!(found(directory, &watch, "file"), [whole("one")].into());
        file.write_all(b"two").unwrap();
        let torn = [whole("one"), whole("onetwo"), Some(b"one\0\0\0".to_vec())];
        assert_eq!(found(directory, &watch, "file"), torn.into());
        file.sync_data().unwrap();
        assert_eq!(found(directory, &watch, "file"), [whole("onetwo")].into());
        // Replaced: the one or the other.
        fs::write(directory.join("file.new"), "three").unwrap();
        fs::File::open(directory.join("file.new")).unwrap().sync_all().unwrap();
        fs::rename(directory.join("file.new"), &path).unwrap();
        assert_eq!(found(directory, &watch, "file"), [whole("onetwo"), whole("three")].into());
        fs::remove_file(&path).unwrap();
        assert_eq!(found(directory, &watch, "file"), [None, whole("onetwo")].into());
        watch
            .replace(directory, &Tree::Directory([("file".into(), Tree::File(b"x".to_vec()))].into()))
            .unwrap();
        assert_eq!(found(directory, &watch, "file"), [whole("x")].into());
    }
}
