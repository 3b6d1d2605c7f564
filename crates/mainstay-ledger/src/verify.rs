//! Judging what the disks hold.

use std::io;
use std::path::Path;

use crate::boots::{self, Boot};
use crate::record::{Slot, boot_text};
use crate::ring::{Ring, last_number};

/// The directories in which the disks are mounted.
pub(crate) const DISKS: [&str; 2] = ["/ledger0", "/ledger1"];

/// What one disk holds.
pub(crate) struct DiskState {
    pub(crate) boots: Vec<Boot>,
    pub(crate) slots: Vec<Slot>,
}

impl DiskState {
    pub(crate) fn read(directory: &Path) -> io::Result<Self> {
        Ok(Self {
            boots: boots::read(&directory.join("boots"))?,
            slots: Ring::open(&directory.join("ledger"))?.slots()?,
        })
    }

    pub(crate) fn last(&self) -> u64 {
        last_number(&self.slots)
    }

    /// Slots that are damaged, or written by a boot that had no right to that number.
    pub(crate) fn corrupt(&self) -> u64 {
        let in_flight = (self.last() + 1) % self.slots.len() as u64;
        let wrong = |(index, slot): (usize, &Slot)| match slot {
            Slot::Empty => false,
            // The record that was being written in a crash was never acknowledged; its slot is written next.
            Slot::Corrupt => index as u64 != in_flight,
            Slot::Record { number, boot } => owner(&self.boots, *number) != Some(boot_text(boot).as_str()),
        };
        self.slots.iter().enumerate().filter(|(index, slot)| wrong((*index, slot))).count() as u64
    }

    /// Numbers that ought to be in the ring and are not.
    pub(crate) fn gaps(&self) -> u64 {
        let (last, capacity) = (self.last(), self.slots.len() as u64);
        // The oldest slot is the one that the record in flight may have taken already.
        let oldest = if last < capacity { 1 } else { last - capacity + 2 };
        let missing = |number: &u64| {
            let slot = self.slots[(number % capacity) as usize];
            !matches!(slot, Slot::Record { number: found, .. } if found == *number)
        };
        (oldest..=last).filter(missing).count() as u64
    }
}

/// The boot that wrote a number, according to the chain.
fn owner(boots: &[Boot], number: u64) -> Option<&str> {
    boots.iter().rev().find(|boot| boot.first <= number).map(|boot| boot.id.as_str())
}

/// Whether the second disk is what the order of writes allows: equal to the first, or behind it by the
/// record (or the line of `boots`) that was in flight.
pub(crate) fn disks_agree(first: &DiskState, second: &DiskState) -> bool {
    let (ahead, behind) = (first.last(), second.last());
    if first.slots.len() != second.slots.len() || behind > ahead || ahead - behind > 1 {
        return false;
    }
    let boots_agree = first.boots.starts_with(&second.boots) && first.boots.len() - second.boots.len() <= 1;
    let in_flight = [ahead, ahead + 1].map(|number| (number % first.slots.len() as u64) as usize);
    let differs = |index: usize| first.slots[index] != second.slots[index] && !in_flight.contains(&index);
    boots_agree && !(0..first.slots.len()).any(differs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(capacity: usize, numbers: std::ops::RangeInclusive<u64>) -> DiskState {
        let mut slots = vec![Slot::Empty; capacity];
        for number in numbers {
            slots[(number % capacity as u64) as usize] = Slot::Record { number, boot: [1; 16] };
        }
        DiskState { boots: vec![Boot::new(&[1; 16], 1)], slots }
    }

    #[test]
    fn a_whole_ring_is_clean() {
        for last in 0..40 {
            let state = disk(8, 1..=last);
            assert_eq!((state.last(), state.corrupt(), state.gaps()), (last, 0, 0));
        }
    }

    #[test]
    fn a_lost_record_is_a_gap_and_a_foreign_one_is_corrupt() {
        let mut state = disk(16, 1..=10);
        state.slots[4] = Slot::Empty;
        assert_eq!((state.corrupt(), state.gaps()), (0, 1));
        state.slots[5] = Slot::Record { number: 5, boot: [9; 16] };
        assert_eq!(state.corrupt(), 1);
        state.slots[6] = Slot::Corrupt;
        assert_eq!((state.corrupt(), state.gaps()), (2, 2));
    }

    #[test]
    fn a_torn_record_in_flight_is_neither() {
        let mut state = disk(16, 1..=10);
        state.slots[11] = Slot::Corrupt;
        assert_eq!((state.corrupt(), state.gaps()), (0, 0));
    }

    #[test]
    fn the_second_disk_may_be_one_record_behind_and_never_ahead() {
        assert!(disks_agree(&disk(8, 1..=10), &disk(8, 1..=10)));
        assert!(disks_agree(&disk(8, 1..=10), &disk(8, 1..=9)));
        assert!(!disks_agree(&disk(8, 1..=10), &disk(8, 1..=8)));
        assert!(!disks_agree(&disk(8, 1..=9), &disk(8, 1..=10)));
        let mut stale = disk(8, 1..=10);
        stale.slots[5] = Slot::Empty;
        assert!(!disks_agree(&disk(8, 1..=10), &stale));
    }
}
