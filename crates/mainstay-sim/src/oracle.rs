//! What every disk held at the moment of every capture.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use mainstay_control::{Clock, ManualClock};

/// The bytes of all disks of a VM.
pub(crate) type Disks = Vec<Vec<u8>>;

/// Remembers captures by their moment, which no two captures share.
pub struct Oracle {
    clock: Arc<ManualClock>,
    captures: Mutex<BTreeMap<i64, Arc<Disks>>>,
}

impl Oracle {
    /// An oracle that has seen nothing.
    pub fn new(clock: Arc<ManualClock>) -> Self {
        Self { clock, captures: Mutex::default() }
    }

    /// Records a capture and answers its moment: now, or a millisecond after the last one.
    pub(crate) fn record(&self, disks: Disks) -> (i64, Arc<Disks>) {
        let mut captures = self.captures.lock().unwrap_or_else(PoisonError::into_inner);
        let after_last = captures.last_key_value().map_or(0, |(last_ms, _)| last_ms + 1);
        let taken_at_ms = self.clock.now_ms().max(after_last);
        let disks = Arc::new(disks);
        captures.insert(taken_at_ms, disks.clone());
        (taken_at_ms, disks)
    }

    /// What the disks held at the moment of a capture.
    pub fn disks_at(&self, taken_at_ms: i64) -> Option<Arc<Vec<Vec<u8>>>> {
        self.captures.lock().unwrap_or_else(PoisonError::into_inner).get(&taken_at_ms).cloned()
    }
}
