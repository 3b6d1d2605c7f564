//! Sorted maps from blocks to where their bytes are.

use std::collections::BTreeMap;

use uuid::Uuid;

/// Where the bytes of a run of blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) segment: Uuid,
    /// First byte of the frame in its segment.
    pub(crate) offset: u32,
    /// Bytes of the frame.
    pub(crate) length: u32,
    /// Index of the first block among the frame's data blocks.
    pub(crate) index: u16,
}

/// A run of blocks of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) start: u64,
    pub(crate) count: u64,
    /// `None`: zeros.
    pub(crate) place: Option<Location>,
}

impl Entry {
    pub(crate) fn end(&self) -> u64 {
        self.start + self.count
    }

    /// The part within `from..to`; the caller knows that there is one.
    pub(crate) fn clip(&self, from: u64, to: u64) -> Self {
        let start = self.start.max(from);
        let end = self.end().min(to);
        let skipped = (start - self.start) as u16;
        let place = self.place.map(|place| Location { index: place.index.wrapping_add(skipped), ..place });
        Self { start, count: end - start, place }
    }
}

/// Appends, joining neighbours that are one run.
pub(crate) fn push_joined(out: &mut Vec<Entry>, entry: Entry) {
    if let Some(last) = out.last_mut()
        && last.end() == entry.start
    {
        let joins = match (last.place, entry.place) {
            (None, None) => true,
            (Some(a), Some(b)) => {
                (a.segment, a.offset) == (b.segment, b.offset)
                    && u64::from(a.index) + last.count == u64::from(b.index)
            }
            _ => false,
        };
        if joins {
            last.count += entry.count;
            return;
        }
    }
    out.push(entry);
}

/// What reads see when `newer` lies over `older`; both sorted and disjoint.
pub(crate) fn overlay(newer: &[Entry], older: &[Entry]) -> Vec<Entry> {
    let mut out = Vec::with_capacity(newer.len() + older.len());
    let mut older = older.iter().copied().peekable();
    for entry in newer {
        while let Some(below) = older.peek_mut() {
            if below.start < entry.start {
                push_joined(&mut out, below.clip(0, entry.start));
            }
            if below.end() > entry.end() {
                if below.start < entry.end() {
                    *below = below.clip(entry.end(), u64::MAX);
                }
                break;
            }
            if below.start >= entry.end() {
                break;
            }
            older.next();
        }
        push_joined(&mut out, *entry);
    }
    older.for_each(|entry| push_joined(&mut out, entry));
    out
}

/// The parts of `from..to` that no entry covers.
pub(crate) fn gaps(entries: &[Entry], from: u64, to: u64) -> Vec<(u64, u64)> {
    let mut gaps = Vec::new();
    let mut at = from;
    for entry in entries {
        if entry.start > at {
            gaps.push((at, entry.start.min(to)));
        }
        at = at.max(entry.end());
    }
    if at < to {
        gaps.push((at, to));
    }
    gaps
}

/// The map of a session while it grows; later insertions win.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExtentMap {
    entries: BTreeMap<(u16, u64), Entry>,
}

impl ExtentMap {
    pub(crate) fn insert(&mut self, disk: u16, entry: Entry) {
        let overlapping: Vec<Entry> = self
            .entries
            .range(..(disk, entry.end()))
            .rev()
            .take_while(|((of, _), old)| *of == disk && old.end() > entry.start)
            .map(|(_, old)| *old)
            .collect();
        for old in overlapping {
            self.entries.remove(&(disk, old.start));
            if old.start < entry.start {
                self.entries.insert((disk, old.start), old.clip(0, entry.start));
            }
            if old.end() > entry.end() {
                self.entries.insert((disk, entry.end()), old.clip(entry.end(), u64::MAX));
            }
        }
        self.entries.insert((disk, entry.start), entry);
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries of a disk within `from..to`, clipped to it.
    pub(crate) fn range(&self, disk: u16, from: u64, to: u64) -> Vec<Entry> {
        let before = self.entries.range(..(disk, from)).next_back();
        let before = before.filter(|((of, _), entry)| *of == disk && entry.end() > from);
        let inside = self.entries.range((disk, from)..(disk, to));
        before.into_iter().chain(inside).map(|(_, entry)| entry.clip(from, to)).collect()
    }

    /// All entries by disk and block.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u16, Entry)> + '_ {
        self.entries.iter().map(|((disk, _), entry)| (*disk, *entry))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEGMENT: Uuid = Uuid::from_u128(1);

    fn entry(start: u64, count: u64, frame: Option<u32>) -> Entry {
        let place = frame.map(|offset| Location { segment: SEGMENT, offset, length: 1, index: start as u16 });
        Entry { start, count, place }
    }

    fn paint(disk: &mut [Option<(u32, u16)>], entry: &Entry) {
        for at in 0..entry.count {
            let cell = &mut disk[(entry.start + at) as usize];
            *cell = Some(entry.place.map_or((0, 0), |place| (place.offset, place.index + at as u16)));
        }
    }

    fn inserts() -> impl Strategy<Value = Vec<(u64, u64, Option<u32>)>> {
        proptest::collection::vec((0u64..60, 1u64..12, proptest::option::of(1u32..5)), 0..20)
    }

    fn map(inserts: &[(u64, u64, Option<u32>)]) -> (Vec<Entry>, Vec<Option<(u32, u16)>>) {
        let (mut map, mut disk) = (ExtentMap::default(), vec![None; 80]);
        for (start, count, frame) in inserts {
            let entry = entry(*start, *count, *frame);
            map.insert(0, entry);
            paint(&mut disk, &entry);
        }
        (map.iter().map(|(_, entry)| entry).collect(), disk)
    }

    proptest! {
        #[test]
        fn a_range_is_what_is_painted_there(a in inserts(), from in 0u64..60, length in 1u64..20) {
            let mut whole = ExtentMap::default();
            a.iter().for_each(|(start, count, frame)| whole.insert(0, entry(*start, *count, *frame)));
            let (_, disk) = map(&a);
            let to = from + length;
            let mut painted = vec![None; 80];
            whole.range(0, from, to).iter().for_each(|entry| paint(&mut painted, entry));
            prop_assert_eq!(&painted[from as usize..to as usize], &disk[from as usize..to as usize]);
            prop_assert!(painted[..from as usize].iter().chain(&painted[to as usize..]).all(Option::is_none));
            prop_assert!(whole.range(1, from, to).is_empty());
        }

        #[test]
        fn maps_and_overlays_equal_painting(a in inserts(), b in inserts()) {
            let (older, mut disk) = map(&a);
            let (newer, _) = map(&b);
            for entry in &newer {
                paint(&mut disk, entry);
            }
            let both = overlay(&newer, &older);
            let mut painted = vec![None; 80];
            for pair in both.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].start);
            }
            for entry in &both {
                paint(&mut painted, entry);
            }
            prop_assert_eq!(&painted, &disk);
            for (from, to) in gaps(&both, 0, 80) {
                prop_assert!(from < to && disk[from as usize..to as usize].iter().all(Option::is_none));
            }
        }
    }
}
