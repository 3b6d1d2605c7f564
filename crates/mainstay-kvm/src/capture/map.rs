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
    /// The dirty bitmap of this name, together with those of that name in the nodes given: a snapshot has left there what
    /// was noted before it.
    Bitmap {
        /// The bitmap's name.
        name: String,
        /// Nodes beneath the disk's top one that have it too.
        beneath: Vec<String>,
    },
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
            Some((_, true)) => Self::Bitmap { name: since.to_owned(), beneath: Vec::new() },
            _ if has_overlay => Self::Depth,
            Some((_, false)) => {
                Self::None(format!("the tracker {since} is damaged: QEMU did not end cleanly"))
            }
            None => {
                Self::None(format!("the tracker {since} is not there: QEMU ended, or the disk was replaced"))
            }
        }
    }

    /// The same from live nodes: the disk's top one, and those beneath it as far as they are known.
    ///
    /// When somebody takes an external snapshot, libvirt gives the new top image empty bitmaps of the same names, and the old
    /// ones keep what they have noted: only together do they tell what changed.
    pub(crate) fn choose_live(
        since: Option<&str>,
        node: &Node,
        beneath: &[Option<&Node>],
        has_overlay: bool,
    ) -> Self {
        let bitmaps = node.bitmaps.iter().filter(|bitmap| bitmap.name.starts_with(PREFIX));
        let bitmaps: Vec<_> = bitmaps.map(|bitmap| (bitmap.name.clone(), bitmap.is_usable)).collect();
        let name = match Self::choose(since, &bitmaps, has_overlay) {
            Self::Bitmap { name, .. } => name,
            other => return other,
        };
        // A recovery VM's images are of our own making, and no tracker is older than its top one.
        if has_overlay {
            return Self::Bitmap { name, beneath: Vec::new() };
        }
        let mut nodes = Vec::new();
        for found in beneath {
            let Some(found) = found else {
                return Self::None("an image beneath the disk is not known to QEMU".to_owned());
            };
            match found.bitmap(&name) {
                None => {}
                Some(bitmap) if bitmap.is_usable && found.size_bytes == node.size_bytes => {
                    nodes.push(found.name.clone());
                }
                Some(_) => {
                    return Self::None(format!(
                        "the tracker {name} cannot be read in an image beneath the disk"
                    ));
                }
            }
        }
        Self::Bitmap { name, beneath: nodes }
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
        let found = MapSource::Bitmap { name: "ms-1".to_owned(), beneath: Vec::new() };
        assert_eq!(choose(Some("ms-1"), false), found);
        assert_eq!(choose(Some("ms-1"), true), found);
        assert!(matches!(choose(Some("ms-2"), false), MapSource::None(_)));
        assert!(matches!(choose(Some("ms-3"), false), MapSource::None(_)));
        assert!(matches!(choose(None, true), MapSource::None(_)));
        assert_eq!(choose(Some("ms-2"), true), MapSource::Depth);
        assert_eq!(choose(Some("ms-creation"), true), MapSource::Depth);
    }

    fn node(name: &str, size_bytes: u64, bitmaps: &[(&str, bool)]) -> Node {
        let bitmap = |(name, is_usable): &(&str, bool)| crate::nodes::Bitmap {
            name: (*name).to_owned(),
            is_usable: *is_usable,
        };
        Node {
            name: name.to_owned(),
            file: "/r/image".into(),
            is_qcow2: true,
            keeps_bitmaps: true,
            size_bytes,
            is_writable: true,
            bitmaps: bitmaps.iter().map(bitmap).collect(),
        }
    }

    #[test]
    fn a_tracker_beneath_a_snapshot_counts_too() {
        let top = node("top", 1 << 20, &[("ms-1", true), ("ms-2", true)]);
        let (with, without) = (node("with", 1 << 20, &[("ms-1", true)]), node("without", 1 << 20, &[]));
        let choose =
            |since, beneath: &[Option<&Node>]| MapSource::choose_live(Some(since), &top, beneath, false);
        let both = |beneath: &[&str]| MapSource::Bitmap {
            name: "ms-1".to_owned(),
            beneath: beneath.iter().map(|&name| name.to_owned()).collect(),
        };
        assert_eq!(choose("ms-1", &[]), both(&[]));
        assert_eq!(choose("ms-1", &[Some(&without), Some(&with)]), both(&["with"]));
        assert!(
            matches!(choose("ms-2", &[Some(&with)]), MapSource::Bitmap { beneath, .. } if beneath.is_empty())
        );
        for beneath in [
            None,
            Some(&node("damaged", 1 << 20, &[("ms-1", false)])),
            Some(&node("smaller", 1 << 19, &[("ms-1", true)])),
        ] {
            assert!(matches!(choose("ms-1", &[beneath]), MapSource::None(_)), "{beneath:?}");
        }
    }
}
