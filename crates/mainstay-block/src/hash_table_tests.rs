use std::io::Write;

use super::*;

const KEY: HashKey = HashKey([9; 32]);

fn id(value: u128) -> Uuid {
    Uuid::from_u128(value)
}

fn block(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK_LENGTH]
}

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vda.hashes");
    Bench { _dir: dir, path }
}

#[test]
fn staged_hashes_count_only_after_the_commit() {
    let bench = bench();
    let table = HashTable::create(&bench.path, 40_000, KEY, Fill::Zeros).unwrap();
    assert_eq!(table.blocks(), 10);
    let data = [block(1), block(0)].concat();
    let verdicts = table.compare(3, &data).unwrap();
    let Verdict::Data(hash) = verdicts[0] else { panic!("{verdicts:?}") };
    assert_eq!(verdicts[1], Verdict::Same);
    table.stage(id(1), 3, &[hash]).unwrap();
    assert_ne!(table.compare(3, &data).unwrap()[0], Verdict::Same);
    assert!(matches!(table.stage(id(2), 0, &[hash]), Err(HashTableError::Pending(_))));
    table.prepare(id(1)).unwrap();
    table.commit(id(1), id(100)).unwrap();
    table.commit(id(1), id(100)).unwrap();
    assert_eq!(table.compare(3, &data).unwrap()[0], Verdict::Same);
    assert_eq!(table.not_zero(0, 10).unwrap(), vec![(3, 1)]);
    assert_eq!(table.point(), Some(id(100)));

    table.stage_zeros(id(2), 0, 10).unwrap();
    table.abandon(id(2)).unwrap();
    table.stage_zeros(id(3), 2, 4).unwrap();
    table.commit(id(3), id(101)).unwrap();
    let table = HashTable::open(&bench.path).unwrap();
    assert_eq!(table.point(), Some(id(101)));
    assert!(table.not_zero(0, 10).unwrap().is_empty());
    table.grow(50_000).unwrap();
    assert_eq!(HashTable::open(&bench.path).unwrap().blocks(), 13);
    assert!(matches!(table.grow(1), Err(HashTableError::Shrink)));
    assert!(matches!(table.hashes(13, 1), Err(HashTableError::OutOfRange(_))));
}

#[test]
fn unknown_equals_nothing() {
    let bench = bench();
    let table = HashTable::create(&bench.path, 3 * 4096, KEY, Fill::Unknown).unwrap();
    let verdicts = table.compare(0, &[block(0), block(5), block(0)].concat()).unwrap();
    assert!(matches!(verdicts[..], [Verdict::Zero, Verdict::Data(_), Verdict::Zero]));
    assert_eq!(table.not_zero(0, 3).unwrap(), vec![(0, 3)]);
}

#[test]
fn a_table_that_knows_nothing_takes_no_space_and_learns_like_any_other() {
    use std::os::unix::fs::MetadataExt as _;
    let bench = bench();
    let blocks = 1 << 20;
    let table = HashTable::create(&bench.path, blocks * 4096, KEY, Fill::Unknown).unwrap();
    let occupied = std::fs::metadata(&bench.path).unwrap().blocks() * 512;
    assert!(occupied < 64 << 10, "{occupied} bytes are written");
    let Verdict::Data(hash) = table.compare(7, &block(5)).unwrap()[0] else { panic!("not data") };
    table.stage(id(1), 7, &[hash]).unwrap();
    table.stage_zeros(id(1), 8, 2).unwrap();
    table.commit(id(1), id(100)).unwrap();
    table.grow((blocks + 2) * 4096).unwrap();
    let table = HashTable::open(&bench.path).unwrap();
    let verdicts = table.compare(6, &[block(5), block(5), block(0), block(0), block(0)].concat()).unwrap();
    assert_eq!(verdicts, [Verdict::Data(hash), Verdict::Same, Verdict::Same, Verdict::Same, Verdict::Zero]);
    // What grew is zeros, as in the replica.
    assert_eq!(table.not_zero(blocks - 1, 3).unwrap(), vec![(blocks - 1, 1)]);
}

#[test]
fn a_crash_at_every_byte_of_the_log_leaves_the_old_or_the_new_state() {
    let bench = bench();
    let table = HashTable::create(&bench.path, 100 * 4096, KEY, Fill::Zeros).unwrap();
    for at in 0..5 {
        table.stage(id(1), at * 7, &[BlockHash(50 + at), BlockHash(60 + at)]).unwrap();
    }
    table.prepare(id(1)).unwrap();
    let prepared = std::fs::read(log_path(&bench.path)).unwrap();
    lock(&table.log).as_mut().unwrap().committed(id(77)).unwrap();
    let committed = std::fs::read(log_path(&bench.path)).unwrap();
    drop(table);
    let before = std::fs::read(&bench.path).unwrap();
    for length in 0..=committed.len() {
        std::fs::write(&bench.path, &before).unwrap();
        File::create(log_path(&bench.path)).unwrap().write_all(&committed[..length]).unwrap();
        let table = HashTable::open(&bench.path).unwrap();
        let changed = table.not_zero(0, 100).unwrap().len();
        if length < prepared.len() {
            assert_eq!((table.pending(), changed), (None, 0), "{length}");
        } else if length < committed.len() {
            assert_eq!((table.pending(), changed), (Some(id(1)), 0), "{length}");
            if length == prepared.len() {
                table.commit(id(1), id(77)).unwrap();
                assert_eq!(table.not_zero(0, 100).unwrap().len(), 5);
            }
        } else {
            assert_eq!((table.pending(), changed, table.point()), (None, 5, Some(id(77))));
        }
    }
}

/// Power is lost when the server has answered and the table has taken some of the log, but the answer is not on disk. Then
/// the server is restored from a backup in which there is no such session: what it holds is not what the table has taken.
#[test]
fn a_session_that_the_server_has_forgotten_leaves_its_blocks_unknown() {
    let bench = bench();
    let table = HashTable::create(&bench.path, 10 * 4096, KEY, Fill::Zeros).unwrap();
    table.stage(id(1), 2, &[BlockHash(50), BlockHash(51)]).unwrap();
    table.stage_zeros(id(1), 6, 1).unwrap();
    table.prepare(id(1)).unwrap();
    let prepared = std::fs::read(log_path(&bench.path)).unwrap();
    table.commit(id(1), id(77)).unwrap();
    drop(table);
    std::fs::write(log_path(&bench.path), &prepared).unwrap();
    let table = HashTable::open(&bench.path).unwrap();
    assert_eq!(table.pending(), Some(id(1)));
    table.abandon(id(1)).unwrap();
    let table = HashTable::open(&bench.path).unwrap();
    assert_eq!(table.pending(), None);
    assert_eq!(table.hashes(2, 2).unwrap(), [BlockHash::UNKNOWN; 2]);
    assert_eq!(table.not_zero(0, 10).unwrap(), [(2, 2), (6, 1)]);
}

/// Each cycle of each disk would sync the directory otherwise.
#[test]
fn the_log_keeps_its_name() {
    let bench = bench();
    let table = HashTable::create(&bench.path, 4096, KEY, Fill::Zeros).unwrap();
    for session in 1..4 {
        let is_there = || std::fs::metadata(log_path(&bench.path)).unwrap().len();
        assert_eq!(is_there(), 0);
        table.stage(id(session), 0, &[BlockHash(50)]).unwrap();
        match session {
            2 => table.abandon(id(session)).unwrap(),
            _ => table.commit(id(session), id(session + 10)).unwrap(),
        }
        assert_eq!(is_there(), 0);
        drop(HashTable::open(&bench.path).unwrap());
    }
}

#[test]
fn damage_of_the_header_is_noticed() {
    let bench = bench();
    drop(HashTable::create(&bench.path, 4096, KEY, Fill::Zeros).unwrap());
    for at in 0..CHECKED_BYTES + 16 {
        let mut bytes = std::fs::read(&bench.path).unwrap();
        bytes[at] ^= 0x10;
        std::fs::write(&bench.path, &bytes).unwrap();
        assert!(matches!(HashTable::open(&bench.path), Err(HashTableError::Damaged(_))), "{at}");
        bytes[at] ^= 0x10;
        std::fs::write(&bench.path, &bytes).unwrap();
    }
    HashTable::open(&bench.path).unwrap();
}
