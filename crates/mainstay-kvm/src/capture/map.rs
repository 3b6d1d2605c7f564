//! Reading what changed: dirty bitmaps and depths of allocation, as NBD contexts.

use std::ops::Range;

use mainstay_block::BlockDevice as _;
use mainstay_nbd::Client;
use mainstay_provider::{Changed, SiteError};

use crate::error::failed;
use crate::nodes::{Node, PREFIX};

/// QEMU's context for the depth at which a range is allocated: 1 is the image itself, more is beneath it.
pub(crate) const DEPTH_CONTEXT: &str = "qemu:allocation-depth";

/// Where the answer to "what changed since" comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MapSource {
    /// The dirty bitmap of this name.
    Bitmap(String),
    /// Everything that the top image holds.
    Depth,
    /// Nowhere; the reason.
    None(String),
}

impl MapSource {
    /// Chooses the source for a disk. `has_overlay`: the disk is an overlay made with the VM, so that all that was
    /// ever written to the VM is in it, a superset of the changes since any tracker.
    pub(crate) fn choose(since: Option<&str>, bitmaps: &[(String, bool)], has_overlay: bool) -> Self {
        let Some(since) = since else { return Self::None("no tracker was asked for".to_owned()) };
        let found = bitmaps.iter().find(|(name, _)| name == since);
        match found {
            Some((_, true)) => Self::Bitmap(since.to_owned()),
            _ if has_overlay => Self::Depth,
            Some((_, false)) => {
                Self::None(format!("the tracker {since} is damaged: QEMU did not end cleanly"))
            }
            None => {
                Self::None(format!("the tracker {since} is not there: QEMU ended, or the disk was replaced"))
            }
        }
    }

    /// The same from a live node.
    pub(crate) fn choose_live(since: Option<&str>, node: &Node, has_overlay: bool) -> Self {
        let bitmaps = node.bitmaps.iter().filter(|bitmap| bitmap.name.starts_with(PREFIX));
        let bitmaps: Vec<_> = bitmaps.map(|bitmap| (bitmap.name.clone(), bitmap.is_usable)).collect();
        Self::choose(since, &bitmaps, has_overlay)
    }
}

/// The context of a bitmap.
pub(crate) fn bitmap_context(name: &str) -> String {
    format!("qemu:dirty-bitmap:{name}")
}

/// Reads the changed ranges from a context.
pub(crate) async fn read(client: &Client, context: &str) -> Result<Changed, SiteError> {
    let extents = client.block_status(context, 0, client.size()).await;
    let extents = extents.map_err(|error| failed(format!("reading what changed: {error}")))?;
    let is_changed = |flags: u32| if context == DEPTH_CONTEXT { flags == 1 } else { flags & 1 != 0 };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for extent in extents.iter().filter(|extent| is_changed(extent.flags)) {
        match ranges.last_mut() {
            Some(last) if last.end == extent.offset => last.end += extent.length,
            _ => ranges.push(extent.offset..extent.offset + extent.length),
        }
    }
    Ok(Changed::Since(ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tracker_is_a_reason_unless_the_overlay_knows() {
        let bitmaps = [("ms-1".to_owned(), true), ("ms-2".to_owned(), false)];
        let choose = |since, overlay| MapSource::choose(since, &bitmaps, overlay);
        assert_eq!(choose(Some("ms-1"), false), MapSource::Bitmap("ms-1".to_owned()));
        assert_eq!(choose(Some("ms-1"), true), MapSource::Bitmap("ms-1".to_owned()));
        assert!(matches!(choose(Some("ms-2"), false), MapSource::None(_)));
        assert!(matches!(choose(Some("ms-3"), false), MapSource::None(_)));
        assert!(matches!(choose(None, true), MapSource::None(_)));
        assert_eq!(choose(Some("ms-2"), true), MapSource::Depth);
        assert_eq!(choose(Some("ms-creation"), true), MapSource::Depth);
    }
}
