//! A raw file as a block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::{BlockDevice, BlockError, Extent, ExtentKind, check_range};

/// Most bytes of zeros written in one piece where the file system cannot punch holes.
const ZERO_CHUNK_BYTES: usize = 1 << 20;

/// A raw file or block special file. Extents come from `SEEK_DATA`/`SEEK_HOLE` where the system has
/// them; zeros are punched as holes where the file system can. Requests run on the runtime's blocking
/// threads, so a tokio runtime must be there.
#[derive(Clone, Debug)]
pub struct FileDevice {
    file: Arc<File>,
    size: u64,
    writable: bool,
}

impl FileDevice {
    /// Opens an existing file; its length is the device's size for good.
    ///
    /// # Errors
    /// Those of opening and measuring the file.
    pub fn open(path: &Path, writable: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(writable).open(path)?;
        Self::from_file(file, writable)
    }

    /// Creates a sparse file of `size` bytes; the file must not exist.
    ///
    /// # Errors
    /// Those of creating the file.
    pub fn create(path: &Path, size: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        file.set_len(size)?;
        Self::from_file(file, true)
    }

    fn from_file(file: File, writable: bool) -> io::Result<Self> {
        use std::io::{Seek, SeekFrom};
        // Seeking to the end also measures block special files, whose metadata says 0.
        let size = (&file).seek(SeekFrom::End(0))?;
        Ok(Self { file: Arc::new(file), size, writable })
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, BlockError> {
        let file = Arc::clone(&self.file);
        let done = crate::elsewhere::spawn_blocking(move || work(&file)).await;
        Ok(done.map_err(io::Error::other)??)
    }

    fn check_writable(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range(offset, length, self.size)?;
        if self.writable { Ok(()) } else { Err(BlockError::ReadOnly) }
    }
}

#[async_trait]
impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        check_range(offset, length, self.size)?;
        self.run(move |file| {
            let mut buffer = vec![0; length as usize];
            read_exact_at(file, &mut buffer, offset)?;
            Ok(Bytes::from(buffer))
        })
        .await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.check_writable(offset, data.len() as u64)?;
        self.run(move |file| write_all_at(file, &data, offset)).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check_writable(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        self.run(move |file| {
            if punch_hole(file, offset, length) {
                return Ok(());
            }
            let zeros = vec![0; ZERO_CHUNK_BYTES.min(length as usize)];
            let end = offset + length;
            let mut at = offset;
            while at < end {
                let count = zeros.len().min((end - at) as usize);
                write_all_at(file, &zeros[..count], at)?;
                at += count as u64;
            }
            Ok(())
        })
        .await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        if !self.writable {
            return Ok(());
        }
        self.run(|file| file.sync_data()).await
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        check_range(offset, length, self.size)?;
        if length == 0 {
            return Ok(Vec::new());
        }
        self.run(move |file| Ok(file_extents(file, offset, offset + length))).await
    }
}

/// Reads at a position without moving a cursor.
#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// Writes at a position without moving a cursor.
#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, data, offset)
}

/// Reads at a position; moves the cursor, which nobody uses.
#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_read(file, buffer, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[count..];
        offset += count as u64;
    }
    Ok(())
}

/// Writes at a position; moves the cursor, which nobody uses.
#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut data: &[u8], mut offset: u64) -> io::Result<()> {
    while !data.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_write(file, data, offset)?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        data = &data[count..];
        offset += count as u64;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn punch_hole(file: &File, offset: u64, length: u64) -> bool {
    use nix::fcntl::{FallocateFlags, fallocate};
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match (i64::try_from(offset), i64::try_from(length)) {
        (Ok(offset), Ok(length)) => fallocate(file, flags, offset, length).is_ok(),
        _ => false,
    }
}

#[cfg(not(target_os = "linux"))]
fn punch_hole(_file: &File, _offset: u64, _length: u64) -> bool {
    false
}

/// Holes and data of a range. A file system that cannot tell answers all data: never wrong, only slow.
#[cfg(target_os = "linux")]
fn file_extents(file: &File, offset: u64, end: u64) -> Vec<Extent> {
    use nix::errno::Errno;
    use nix::unistd::{Whence, lseek};
    let seek = |at: u64, whence| match lseek(file, at as i64, whence) {
        Ok(found) => Some((found as u64).clamp(at, end)),
        // No data, or no hole, from here on.
        Err(Errno::ENXIO) => Some(end),
        Err(_) => None,
    };
    let mut extents = Vec::new();
    let mut at = offset;
    while at < end {
        let Some(data) = seek(at, Whence::SeekData) else { break };
        if data > at {
            extents.push(Extent { offset: at, length: data - at, kind: ExtentKind::Zero });
            at = data;
            continue;
        }
        let Some(hole) = seek(at, Whence::SeekHole).filter(|hole| *hole > at) else { break };
        extents.push(Extent { offset: at, length: hole - at, kind: ExtentKind::Data });
        at = hole;
    }
    if at < end {
        extents.push(Extent { offset: at, length: end - at, kind: ExtentKind::Data });
    }
    extents
}

#[cfg(not(target_os = "linux"))]
fn file_extents(_file: &File, offset: u64, end: u64) -> Vec<Extent> {
    vec![Extent { offset, length: end - offset, kind: ExtentKind::Data }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn holes_are_seen_and_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let device = FileDevice::create(&path, 1 << 20).unwrap();
        device.write(65536, Bytes::from(vec![7; 65536])).await.unwrap();
        device.flush().await.unwrap();
        let kinds = |extents: Vec<Extent>| {
            let total: u64 = extents.iter().map(|extent| extent.length).sum();
            assert_eq!(total, 1 << 20);
            extents.iter().filter(|extent| extent.kind == ExtentKind::Data).map(|e| e.length).sum::<u64>()
        };
        assert_eq!(kinds(device.extents(0, 1 << 20).await.unwrap()), 65536);
        device.write_zeroes(65536, 65536).await.unwrap();
        assert!(crate::is_zero(&device.read(0, 1 << 20).await.unwrap()));
        assert_eq!(kinds(device.extents(0, 1 << 20).await.unwrap()), 0);

        let reader = FileDevice::open(&path, false).unwrap();
        assert!(matches!(reader.write(0, Bytes::from_static(b"x")).await, Err(BlockError::ReadOnly)));
        assert!(matches!(reader.read(1 << 20, 1).await, Err(BlockError::OutOfRange { .. })));
    }
}
