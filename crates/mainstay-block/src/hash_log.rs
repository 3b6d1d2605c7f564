//! The pending log of a hash table: hashes staged by one session until its recovery point is committed.
//!
//! Layout (little-endian): a 48-byte header (magic `MSHLOG01`, session id 16 bytes, 8 reserved bytes,
//! first 16 bytes of the BLAKE3 of the bytes before), then records: tag u8, body length u32, body, first
//! 8 bytes of the BLAKE3 of tag, length and body. Tags: 1 hashes (first block u64, then u64 each), 2 zeros (first
//! block u64, blocks u64), 3 prepared (number of records before it u64), 4 committed (point id 16 bytes).

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::BlockHash;
use crate::durable::sync_parent;

const MAGIC: &[u8; 8] = b"MSHLOG01";
const HEADER_BYTES: usize = 48;
/// Most hashes in one record, so that replay needs a bounded buffer.
const RECORD_HASHES_MAX: usize = 8192;
const RECORD_BYTES_MAX: usize = 8 + RECORD_HASHES_MAX * 8;

/// One record, as replay sees it.
pub(crate) enum Record {
    Hashes(u64, Vec<BlockHash>),
    Zeros(u64, u64),
    Prepared(u64),
    Committed(Uuid),
}

/// The writing end.
pub(crate) struct LogWriter {
    pub(crate) session: Uuid,
    pub(crate) prepared: bool,
    /// Found at opening the table: nobody knows how much of it the table has taken.
    pub(crate) is_found: bool,
    records: u64,
    file: BufWriter<File>,
}

fn sum(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

impl LogWriter {
    /// Starts an empty log in the file, whose name is durable when this returns.
    pub(crate) fn create(path: &Path, session: Uuid) -> io::Result<Self> {
        let file = match OpenOptions::new().write(true).truncate(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = File::create(path)?;
                sync_parent(path)?;
                file
            }
            opened => opened?,
        };
        let mut file = BufWriter::with_capacity(1 << 17, file);
        let mut header = [0u8; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..24].copy_from_slice(session.as_bytes());
        let check = sum(&[&header[..32]]);
        header[32..].copy_from_slice(&check[..16]);
        file.write_all(&header)?;
        Ok(Self { session, prepared: false, is_found: false, records: 0, file })
    }

    /// Continues the log that [`read_log`] found prepared.
    pub(crate) fn reopen(path: &Path, session: Uuid) -> io::Result<Self> {
        let file = BufWriter::new(OpenOptions::new().append(true).open(path)?);
        Ok(Self { session, prepared: true, is_found: true, records: 0, file })
    }

    fn append(&mut self, tag: u8, body: &[u8]) -> io::Result<()> {
        let length = (body.len() as u32).to_le_bytes();
        let check = sum(&[&[tag], &length, body]);
        self.file.write_all(&[tag])?;
        self.file.write_all(&length)?;
        self.file.write_all(body)?;
        self.file.write_all(&check[..8])?;
        self.records += 1;
        Ok(())
    }

    pub(crate) fn hashes(&mut self, first: u64, hashes: &[BlockHash]) -> io::Result<()> {
        for (at, part) in hashes.chunks(RECORD_HASHES_MAX).enumerate() {
            let mut body = Vec::with_capacity(8 + part.len() * 8);
            body.extend_from_slice(&(first + (at * RECORD_HASHES_MAX) as u64).to_le_bytes());
            part.iter().for_each(|hash| body.extend_from_slice(&hash.0.to_le_bytes()));
            self.append(1, &body)?;
        }
        Ok(())
    }

    pub(crate) fn zeros(&mut self, first: u64, count: u64) -> io::Result<()> {
        let mut body = first.to_le_bytes().to_vec();
        body.extend_from_slice(&count.to_le_bytes());
        self.append(2, &body)
    }

    /// Makes everything staged durable.
    pub(crate) fn prepare(&mut self) -> io::Result<()> {
        if !self.prepared {
            let records = self.records;
            self.append(3, &records.to_le_bytes())?;
            self.file.flush()?;
            self.file.get_ref().sync_all()?;
            self.prepared = true;
        }
        Ok(())
    }

    /// Notes the decision; from here replay finishes without asking anybody. Not synced: after a loss of power without it the
    /// server is asked again.
    pub(crate) fn committed(&mut self, point: Uuid) -> io::Result<()> {
        self.append(4, point.as_bytes())?;
        self.file.flush()
    }
}

/// What a log on disk amounts to.
pub(crate) enum LogState {
    /// No log, or one that was never prepared: its session cannot have been committed.
    Nothing,
    /// Complete; whether its point was committed is the server's knowledge.
    Prepared(Uuid),
    /// Complete and committed as this point.
    Committed(Uuid),
}

/// Reads the log, handing each staged record to `each`, up to the first damaged or torn one.
pub(crate) fn read_log(path: &Path, mut each: impl FnMut(Record) -> io::Result<()>) -> io::Result<LogState> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LogState::Nothing),
        Err(error) => return Err(error),
    };
    let mut input = BufReader::with_capacity(1 << 17, file);
    let mut header = [0u8; HEADER_BYTES];
    if input.read_exact(&mut header).is_err()
        || &header[..8] != MAGIC
        || sum(&[&header[..32]])[..16] != header[32..]
    {
        return Ok(LogState::Nothing);
    }
    let session = Uuid::from_slice(&header[8..24]).map_err(io::Error::other)?;
    let (mut records, mut state) = (0, LogState::Nothing);
    while let Some(record) = read_record(&mut input) {
        match &record {
            Record::Prepared(count) if *count == records => state = LogState::Prepared(session),
            Record::Prepared(_) => break,
            Record::Committed(point) if matches!(state, LogState::Prepared(_)) => {
                return Ok(LogState::Committed(*point));
            }
            Record::Committed(_) => break,
            Record::Hashes(..) | Record::Zeros(..) => records += 1,
        }
        each(record)?;
    }
    Ok(state)
}

fn read_record(input: &mut impl Read) -> Option<Record> {
    let mut head = [0u8; 5];
    input.read_exact(&mut head).ok()?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > RECORD_BYTES_MAX {
        return None;
    }
    let mut body = vec![0; length + 8];
    input.read_exact(&mut body).ok()?;
    let check = body.split_off(length);
    if sum(&[&head, &body])[..8] != check {
        return None;
    }
    let words: Vec<u64> = body.chunks_exact(8).map(word).collect();
    match (head[0], words.as_slice()) {
        (1, [first, hashes @ ..]) => {
            Some(Record::Hashes(*first, hashes.iter().map(|hash| BlockHash(*hash)).collect()))
        }
        (2, [first, count]) => Some(Record::Zeros(*first, *count)),
        (3, [count]) => Some(Record::Prepared(*count)),
        (4, [_, _]) => Some(Record::Committed(Uuid::from_slice(&body).ok()?)),
        _ => None,
    }
}

/// Reads eight little-endian bytes.
pub(crate) fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// The log's file beside a table's.
pub(crate) fn log_path(table: &Path) -> PathBuf {
    let mut name = table.as_os_str().to_owned();
    name.push(".pending");
    name.into()
}

/// Empties the log; its name stays, so that the next session need not make one durable.
pub(crate) fn clear(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).open(path) {
        Ok(file) => file.set_len(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
